"""What a solver is: a central half that owns the parameters, and a worker half.

The central half takes what workers send and gives new weights; the worker half says what a worker
sends of a fresh gradient.  Both are pure: same inputs, same bits; no clock, I/O, thread, Spark or
global random number.  A solver decides; an engine carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from sparksgd.flat import FlatModule, FlatStrip, Weights

__all__ = ["GradientSum", "MakeReplica", "Quorum", "Solver", "SolverState", "StepOutcome", "WorkerHalf"]


@dataclass(kw_only=True)
class GradientSum:
    """Sums over the rows of a piece, or of all pieces below a node of the addition tree.

    Legend: P parameters, Q running statistics, C counters.
    """

    gradient: npt.NDArray[np.floating]
    """Sum of the gradients of the loss over the rows, float32[P]."""

    statistics: npt.NDArray[np.floating]
    """Sum over the rows of the running statistics that their piece left behind, float32[Q]."""

    counters: npt.NDArray[np.int64]
    """Batch-norm's counters, the largest of any piece, int64[C]."""

    loss: float
    """Sum of the loss over the rows."""

    rows: int
    """How many rows."""

    shards: int = 1
    """How many shards took part."""

    def __iadd__(self, other: Self) -> Self:
        self.gradient += other.gradient
        self.statistics += other.statistics
        np.maximum(self.counters, other.counters, out=self.counters)
        self.loss += other.loss
        self.rows += other.rows
        self.shards += other.shards
        return self


@dataclass(frozen=True, kw_only=True)
class Quorum:
    """Whose gradients a step is made of."""

    shards: frozenset[int]
    """Who is asked."""

    enough: int
    """How many of them end the step; those that arrive later are dropped."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one update did."""

    lr: float
    """The learning rate that it used (of the first parameter group)."""

    gradient_norm: float | None
    """Euclidean norm of the mean gradient before clipping; None where no norm was asked for."""


@dataclass(frozen=True, kw_only=True)
class SolverState:
    """All that a solver's next step depends on, beside what the step brings."""

    weights: Weights
    """Parameters, statistics, and the version they are."""

    optimizer: dict[str, Any]
    """The optimiser's state_dict; its tensors as arrays."""

    schedule: dict[str, Any] | None
    """The schedule's state_dict; None without one."""

    def strip(self, strip: range) -> SolverState:
        """Return a strip's part; only for a solver that is updated by strips."""
        whole = self.weights.parameters.shape
        part = slice(strip.start, strip.stop)
        return self._with(
            self.weights.parameters[part],
            {name: v[part] if np.shape(v) == whole else v for name, v in self._vectors().items()},
        )

    @classmethod
    def joined(cls, strips: Sequence[SolverState]) -> SolverState:
        """Return the whole state of the states of all strips, in their order."""
        first, vectors = strips[0], [state._vectors() for state in strips]
        shape = first.weights.parameters.shape
        return first._with(
            np.concatenate([state.weights.parameters for state in strips]),
            {
                name: np.concatenate([of_strip[name] for of_strip in vectors])
                if np.shape(value) == shape
                else value
                for name, value in vectors[0].items()
            },
        )

    def _vectors(self) -> dict[str, Any]:
        """Return what the optimiser keeps of the one vector that it updates."""
        vectors: dict[str, Any] = self.optimizer["state"].get(0, {})
        return vectors

    def _with(self, parameters: npt.NDArray[np.floating], vectors: dict[str, Any]) -> SolverState:
        return replace(
            self,
            weights=replace(self.weights, parameters=parameters),
            optimizer=self.optimizer | {"state": {0: vectors} if vectors else {}},
        )


class WorkerHalf(Protocol):
    """The part of a solver that runs beside the gradients; it must pickle."""

    sends_as_it_is: bool
    """Whether what goes out is the fresh gradient: then its parts may go before all of them are there."""

    def outgoing(self, fresh: GradientSum) -> GradientSum | None:
        """Return what to send of a shard's fresh gradient; None sends nothing this time."""
        ...


class Solver(Protocol):
    """The central half: owner of parameters, optimiser and step count."""

    step: int
    """Updates so far: the version of the weights."""

    by_strips: bool
    """Whether updating strips of the vector apart gives the bits of updating it whole."""

    def worker_half(self) -> WorkerHalf:
        """Return the worker half, to be shipped once."""
        ...

    def weights(self) -> Weights:
        """Return the weights to compute the next gradients from."""
        ...

    def quorum(self) -> Quorum:
        """Return whose gradients the next step is to be made of."""
        ...

    def receive(self, arrived: GradientSum) -> StepOutcome:
        """Take the sum that arrived and make one step, or raise and stay as before."""
        ...

    def state(self) -> SolverState:
        """Return what its next step depends on; a view, to be copied or sent before that."""
        ...

    def load_state(self, state: SolverState) -> None:
        """Go on from where another solver of the same kind was."""
        ...

    def make_replica(self) -> MakeReplica:
        """Return what makes another solver of the same kind; it pickles."""
        ...


MakeReplica = Callable[[FlatModule | FlatStrip], Solver]
