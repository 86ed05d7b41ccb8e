"""What a solver is: a central half, and a worker half for each shard.

    turn t of shard s, on whichever worker has the shard
        half.take(answer)                              the answer of the round, or of the centre
        gradient = gradient of the piece's rows, at half.point()
        half.turn(gradient, settings)                  may move its local model
        message = half.send()                          None: nothing is sent after this turn

Both halves are pure: equal inputs give equal bits, and they use no clock, I/O, thread, Spark or global random
number.  A solver decides; an engine carries it out.  There are three families, by how messages meet:

    rounds      the messages of all shards, or of the first ones, are summed; one step; one answer for all
    arrivals    each message reaches the centre by itself, which answers at once or holds the shard back
                (its central half: arrivals.py)
    gossip      each message goes to other shards, along a graph that may change with the turn (gossip.py)

What a half keeps belongs to its shard, never to a worker or a host: local models, clocks, versions.

Legend: S shards, P elements of K parameters, Q running statistics, C counters, H turns of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import reduce
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from sparksgd.arithmetic.changes import Changes, unite
from sparksgd.arithmetic.flat import FlatModule, FlatStrip, Weights

__all__ = [
    "CHANCES",
    "Answer",
    "CentralSolver",
    "Gradient",
    "HalfState",
    "Halves",
    "MakeReplica",
    "Message",
    "MessageShape",
    "Need",
    "Quorum",
    "RoundSolver",
    "Settings",
    "Solver",
    "SolverState",
    "StepOutcome",
    "Touched",
    "Vector",
    "Weighed",
    "WorkerHalf",
    "added_weights",
    "either",
    "total_weight",
]

Vector = npt.NDArray[np.floating]
"""float32[P]."""

Settings = Mapping[str, Any]
"""What a schedule sets for one turn, by torch's names: lr, and momentum or betas if it changes them."""


Touched = npt.NDArray[np.bool_] | None
"""Which trainable parameters have a gradient, bool[K]; None: all of them."""


def either(one: Touched, other: Touched) -> Touched:
    """Return which parameters have a gradient in one sum or in the other."""
    if one is None or other is None:
        return None
    found = one | other
    return None if found.all() else found


class Weighed(Protocol):
    """Sums over rows that may have weights."""

    @property
    def rows(self) -> int:
        """Return how many rows."""
        ...

    @property
    def weight(self) -> float | None:
        """Return the sum of their weights; None: they have none, and each weighs 1."""
        ...


def total_weight(sums: Weighed) -> float:
    """Return what a mean divides these sums by."""
    return sums.rows if sums.weight is None else sums.weight


def added_weights(one: float | None, other: float | None) -> float | None:
    """Return the weight of the rows of two sums."""
    return None if one is None or other is None else one + other


class Need(Enum):
    """What a solver needs of its engine; the value completes the words "needs ..."."""

    ROUNDS = "messages of all shards in one sum"
    ARRIVALS = "messages that reach the centre one by one"
    RECORDED_ARRIVALS = "messages in the order of a trace"
    GOSSIP = "messages from shard to shard"
    QUORUM = "steps that end when the first shards have arrived"
    REPLAY = "steps of the shards that a trace names"
    SHARD_STATE = "a state of each shard that outlives the round"
    LAG = "an exchange that runs beside the next turn"


CHANCES = frozenset({Need.QUORUM, Need.ARRIVALS})
"""Needs of solvers whose steps are shaped by chance: their runs write a trace."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """What a worker computes in one turn of a shard: sums over the rows of its piece."""

    vector: Vector
    """Sum of the gradients of the loss over the rows, float32[P]."""

    statistics: npt.NDArray[np.floating]
    """The running statistics after the piece, float32[Q]."""

    counters: npt.NDArray[np.int64]
    """Batch-norm's counters, int64[C]."""

    loss: float
    """Sum of the loss over the rows, by weight, as the gradient is."""

    rows: int
    """How many rows."""

    weight: float | None = None
    """The sum of their weights; None: they have none, and each weighs 1."""

    touched: Touched = None
    """The parameters that the backward passes gave a gradient; the others have zeros in the vector."""

    changes: Changes | None = None
    """What forward changed in parameters and constants; None if nothing."""

    shard: int = 0
    """Which shard's piece it is."""

    turn: int = 0
    """Which piece of the shard it is, from 0."""


@dataclass(kw_only=True)
class Message:
    """What a shard sends, or the sum of the messages of several shards."""

    vectors: dict[str, Vector]
    """float32[P] each."""

    scalars: dict[str, float] = field(default_factory=dict)

    statistics: npt.NDArray[np.floating]
    """Running statistics times the rows, float32[Q]."""

    counters: npt.NDArray[np.int64]
    """Batch-norm's counters, the largest of any shard, int64[C]."""

    loss: float
    """Sum of the loss over the rows, by weight."""

    rows: int
    """How many rows it sums over."""

    weight: float | None = None
    """The sum of their weights; None: they have none, and each weighs 1."""

    shards: int = 1
    """How many shards took part."""

    touched: Touched = None
    """The parameters that had a gradient in any turn of any shard."""

    changes: Changes | None = None
    """What forward changed in parameters and constants; None if nothing."""

    def __post_init__(self) -> None:
        self.scalars = _floats(self.scalars)

    @classmethod
    def of(cls, gradients: Sequence[Gradient], vectors: dict[str, Vector], **scalars: float) -> Self:
        """Return the message of some turns of a shard, with the statistics after the last one."""
        rows, last = sum(gradient.rows for gradient in gradients), gradients[-1]
        return cls(
            vectors=vectors,
            scalars=scalars,
            statistics=last.statistics * np.asarray(rows, last.statistics.dtype),
            counters=last.counters,
            loss=sum(gradient.loss for gradient in gradients),
            rows=rows,
            weight=reduce(added_weights, [gradient.weight for gradient in gradients]),
            touched=reduce(either, [gradient.touched for gradient in gradients]),
            changes=reduce(unite, [gradient.changes for gradient in gradients]),
        )

    def __iadd__(self, other: Self) -> Self:
        for name, vector in self.vectors.items():
            vector += other.vectors[name]
        for name, value in other.scalars.items():
            self.scalars[name] += value
        self.statistics += other.statistics
        np.maximum(self.counters, other.counters, out=self.counters)
        self.loss += other.loss
        self.rows += other.rows
        self.weight = added_weights(self.weight, other.weight)
        self.shards += other.shards
        self.touched = either(self.touched, other.touched)
        self.changes = unite(self.changes, other.changes)
        return self

    def mean_statistics(self) -> npt.NDArray[np.floating]:
        """Return the row-weighted mean of the running statistics, float32[Q]."""
        return self.statistics / np.asarray(self.rows, self.statistics.dtype)


@dataclass(frozen=True, kw_only=True)
class MessageShape:
    """The names in a message, so that buffers can be made for it."""

    vectors: tuple[str, ...]
    scalars: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the centre gives to the worker halves: the weights to start from, and settings."""

    weights: Weights
    """Parameters, statistics, and their version."""

    turn: int
    """The first turn that it is for."""

    turns: int = 1
    """How many turns it is for; H in a round."""

    settings: tuple[Settings, ...] = ()
    """The settings of each turn, if halves make updates themselves."""

    vectors: Mapping[str, Vector] = field(default_factory=dict)
    """What else every half gets, float32[P] each."""

    scalars: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scalars", _floats(self.scalars))


def _floats(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return a rule's numbers, which may be numpy's or tensors, as what they are after a wire, too."""
    return {name: float(value) for name, value in scalars.items()}


@dataclass(frozen=True, kw_only=True)
class Quorum:
    """Which shards' messages a step needs."""

    shards: frozenset[int]
    """The shards that are asked."""

    enough: int
    """How many of them are enough for the step; messages that arrive later are dropped."""

    @classmethod
    def of_all(cls, shards: frozenset[int]) -> Self:
        """Return a quorum that waits for all of these shards."""
        return cls(shards=shards, enough=len(shards))


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one update did."""

    lr: float
    """The learning rate that it used (of the first parameter group, in the first turn)."""

    gradient_norm: float | None
    """Euclidean norm of the mean gradient before clipping; None if gradients are not clipped."""


@dataclass(frozen=True, kw_only=True)
class SolverState:
    """All that a solver's next step depends on, except its messages."""

    weights: Weights
    """Parameters, statistics, and the version they are."""

    turns: int
    """Turns that every shard has made."""

    vectors: Mapping[str, Vector] = field(default_factory=dict)
    """What it keeps for each parameter, float32[P] each."""

    rest: Mapping[str, Any] = field(default_factory=dict)
    """What else it keeps; it is the same for every strip of the vector."""

    def strip(self, strip: range) -> SolverState:
        """Return the part of a strip; only for a solver that can be updated by strips."""
        part = slice(strip.start, strip.stop)
        return self._with(
            self.weights.parameters[part], {name: vector[part] for name, vector in self.vectors.items()}
        )

    @classmethod
    def joined(cls, strips: Sequence[SolverState]) -> SolverState:
        """Return the whole state, from the states of all strips in their order."""
        first = strips[0]
        return first._with(
            np.concatenate([state.weights.parameters for state in strips]),
            {name: np.concatenate([state.vectors[name] for state in strips]) for name in first.vectors},
        )

    def _with(self, parameters: Vector, vectors: Mapping[str, Vector]) -> SolverState:
        return replace(self, weights=replace(self.weights, parameters=parameters), vectors=vectors)


HalfState = dict[str, Any]
"""What a worker half keeps, by name: arrays, and as bytes what an optimiser of the user's own keeps."""

Taken = TypeVar("Taken", contravariant=True)
"""What a half takes: an Answer; in gossip, the messages of its peers by shard."""


class WorkerHalf(Protocol[Taken]):
    """The part of a solver beside the gradients of one shard."""

    lag: int
    """0: what is sent is answered before the next turn.  1: the exchange runs beside the next turn, and its
    answer is taken after that turn.  It is never taken "when it comes", because that would be chance."""

    def take(self, taken: Taken) -> None:
        """Continue from the answer of the round or the centre, or from the messages of the peers."""
        ...

    def point(self) -> Vector:
        """Return the point of the next gradient, float32[P]; the same object only if no value changed."""
        ...

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Take a new gradient; this may move the local model."""
        ...

    def send(self) -> Message | None:
        """Return what to send after this turn; None: nothing."""
        ...

    def state(self) -> HalfState:
        """Return what it keeps between rounds, or between turns in gossip; the arrays may be views."""
        ...

    def load_state(self, state: HalfState) -> None:
        """Continue from the state of another half of the same shard."""
        ...


@dataclass(frozen=True, kw_only=True)
class Halves:
    """How a solver's worker halves are made, and what an engine must know about them; it can be pickled."""

    make: Callable[[FlatModule, int], WorkerHalf[Any]]
    """Makes the half of a shard, for a module of these shapes."""

    send_gradients: bool = False
    """Whether a message is just the new gradient: then parts of it may be sent before it is complete."""

    have_local_models: bool = False
    """Whether they have models that differ from the centre's."""

    keep_state: bool = False
    """Whether a half keeps a state from round to round; if not, one half can serve any shard."""

    vectors: int = 1
    """The most vectors that a message has, or that go to every half."""

    names: tuple[str, ...] | None = None
    """Which vectors every message has; None: the rule does not say so, and looks itself."""


class Solver(Protocol):
    """The central half: what all families have in common."""

    needs: frozenset[Need]
    """What its engine must carry."""

    halves: Halves
    """The worker halves."""

    @property
    def version(self) -> int:
        """How many steps made the weights."""
        ...

    def state(self) -> SolverState:
        """Return all that its next step depends on: a view, to be copied or sent before the step."""
        ...

    def load_state(self, state: SolverState) -> None:
        """Continue from the state of another solver of the same kind."""
        ...


class CentralSolver(Solver, Protocol):
    """The central half of a solver that has a centre: rounds and arrivals."""

    by_strips: bool
    """Whether updates of separate strips give the same bits as one update of the whole vector."""

    remarks: list[str]
    """What a person should know before the first step."""

    revision: int
    """How often evaluations have changed its state, which has the same version then."""

    @property
    def turns(self) -> int:
        """Return how many turns every shard has made, which is the number of the next one.

        Shards of arrivals make turns at their own pace: then it counts the rows that steps have used, in
        K-ths of an epoch.
        """
        ...

    def readout(self) -> Weights:
        """Return a copy of the weights that are evaluated and saved; the same object until the next step."""
        ...

    def evaluated(self, loss: float, accuracy: float | None) -> None:
        """Take the result of an evaluation of these weights, which may change the rate of the next steps."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether its state is of one version: not after `step_back`, nor if a step was cut off."""
        ...

    def step_back(self) -> None:
        """Return to the weights before the last step; the run must end there."""
        ...


class RoundSolver(CentralSolver, Protocol):
    """The central half of a solver whose messages meet in one sum."""

    def turns_at(self, turn: int) -> int:
        """Return how many turns a round has that begins at this turn."""
        ...

    def shape_at(self, turn: int) -> MessageShape:
        """Return the names in the messages of that round."""
        ...

    def answer(self) -> Answer:
        """Return what every half takes when the next round begins; the same object until the next step."""
        ...

    def quorum(self) -> Quorum:
        """Return which shards' messages the next step needs."""
        ...

    def receive(self, total: Message) -> StepOutcome:
        """Take the sum of a round, and make one step; if this raises, the weights are as before."""
        ...

    def make_replica(self) -> MakeReplica:
        """Return a function that makes another solver of this kind, at version 0; it can be pickled."""
        ...


MakeReplica = Callable[[FlatModule | FlatStrip], RoundSolver]
