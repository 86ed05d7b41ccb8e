"""The weights of a half: reading them, changing them as a transaction, stepping, and undoing a step.

Legend: P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip, Weights
from sparksgd.arithmetic.reused import ReusedArrays
from sparksgd.errors import ConfigError, ModelError, UpdateNotFinite
from sparksgd.solvers.flat_optimizer import FlatOptimizer
from sparksgd.solvers.protocol import (
    Answer,
    Halves,
    Message,
    Need,
    SolverState,
    Touched,
    Vector,
    WorkerHalf,
)
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.schedules import Rates
from sparksgd.solvers.torch_optimizers import make_optimizer

__all__ = [
    "Centre",
    "OfModels",
    "OnCentre",
    "clip",
    "refuse_not_finite",
    "refuse_replay_of_fewer",
    "refuse_statistics",
    "step_along",
]


class Centre:
    """A module, or a strip of it, with its version and the turns that made it.

    Args:
        flat: the solver owns its parameters from now on.
        is_replica: whether it is forgotten after a step that failed: then no step can be undone, and none
            copies the parameters.
    """

    def __init__(self, flat: FlatModule | FlatStrip, *, is_replica: bool = False) -> None:
        self.flat, self._is_replica = flat, is_replica
        self.version = 0
        """Steps that made the weights."""

        self.turns = 0
        """Turns that every shard has made."""

        self.is_whole = True
        """Whether all that the solver keeps is of one version: not while it changes, nor if that was cut
        off."""

        self._copies = ReusedArrays()
        self._current: Weights | None = None
        self._before: tuple[Weights, int] | None = None

    def readout(self) -> Weights:
        """Return a copy of the weights, or a replica's view; the same object until the next step."""
        if self._current is None:
            if self._is_replica:
                self._current = self.flat.view(self.version)
            else:
                self._current = self.flat.weights(self.version, self._copies.copy_of)
        return self._current

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let the block change what the solver keeps; if it raises, that is not whole any more."""
        self.is_whole = False
        yield
        self.is_whole = True

    @contextmanager
    def step(self, total: Message, turns: int, key: str, rate: float) -> Iterator[None]:
        """Let the block change the parameters, and make that the next version.

        Args:
            total: the sum that the step uses; its running statistics become the module's.
            turns: how many turns each shard made for it.
            key: of the rate, for the error.
            rate: how far the step goes.

        What forward changed comes first, as it does where one process computes the whole step.

        Raises:
            UpdateNotFinite: a parameter became NaN or infinite; the weights are as before, but not a
                replica's.
            ModelError: pieces changed an element to different values; the same holds.
        """
        before = None if self._is_replica else (self.readout(), self.turns)
        try:
            self.flat.apply(total.changes)
            yield
            refuse_not_finite(self.flat.parameters, f"step {self.version + 1}", key, rate)
        except BaseException as error:
            if before is not None:
                self.flat.load(before[0])
            if isinstance(error, UpdateNotFinite):
                self._before = None
            raise
        self.flat.load_buffers(total.mean_statistics(), total.counters)
        self.version, self.turns = self.version + 1, self.turns + turns
        self._before, self._current = before, None

    def load(self, state: SolverState) -> None:
        """Continue from the weights of another solver, at any step."""
        is_next = not self._is_replica and state.weights.version == self.version + 1
        self._before = (self.readout(), self.turns) if is_next else None
        self.flat.load(state.weights)
        self.version, self.turns, self._current = state.weights.version, state.turns, None

    def step_back(self) -> None:
        """Return to the weights before the last step; only once."""
        self.is_whole = False  # the optimiser stays where it is
        if self._before is not None:
            weights, self.turns = self._before
            self.flat.load(weights)
            self.version = weights.version
        self._current = self._before = None


class OnCentre:
    """A central half that has a centre: what all of them tell of it.

    Args:
        flat: the module, or a strip of it; the solver owns its parameters from now on.
        is_replica: see `Centre`.
    """

    def __init__(self, flat: FlatModule | FlatStrip, *, is_replica: bool = False) -> None:
        self.flat, self._centre = flat, Centre(flat, is_replica=is_replica)
        self.remarks: list[str] = []
        self.revision = 0
        self._answer: Answer | None = None

    @property
    def version(self) -> int:
        """Steps so far."""
        return self._centre.version

    @property
    def turns(self) -> int:
        """Turns that every shard has made."""
        return self._centre.turns

    @property
    def is_whole(self) -> bool:
        """Whether its state is of one version."""
        return self._centre.is_whole

    def readout(self) -> Weights:
        """Return a copy of the weights, or a replica's view; the same object until the next step."""
        return self._centre.readout()

    def evaluated(self, loss: float, accuracy: float | None) -> None:
        """Change nothing; a rule whose schedule evaluations move has its own."""

    def step_back(self) -> None:
        """Return to the weights before the last step, which had a finite loss.

        The run must end here, because nothing else that the solver keeps changes.
        """
        self._centre.step_back()
        self._answer = None


class OfModels(OnCentre):
    """A central half whose shards have models of their own, and all take part in every step.

    Each shard has an optimiser; the centre only sets its rate.

    Args:
        flat: the module; the solver owns its parameters from now on.
        experiment: has the optimiser, the schedule, and how long they are used.
        needs: what the engine must carry.
        make: makes the worker half of a shard.
        took_part: of a run that is replayed.

    Raises:
        ConfigError: the run to be replayed made a step of some shards only.
        ModelError: the module has running statistics.
    """

    by_strips = False

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        experiment: Experiment,
        needs: frozenset[Need],
        make: Callable[[FlatModule, int], WorkerHalf[Any]],
        took_part: Sequence[frozenset[int]] | None,
    ) -> None:
        refuse_replay_of_fewer(experiment.num_shards, took_part)
        super().__init__(flat)
        refuse_statistics(self.readout())
        make_optimizer(flat, experiment.optimizer, experiment.seed)  # tries it: halves make others alike
        self.needs = needs
        self.halves = Halves(make=make, have_local_models=True, keep_state=True)
        self._rates = Rates.of(experiment, flat)
        self.remarks = self._rates.remarks

    def state(self) -> SolverState:
        """Return all that its next step depends on, except what shards keep."""
        return SolverState(weights=self.readout(), turns=self.turns, rest={"rates": self._rates.state()})

    def load_state(self, state: SolverState) -> None:
        """Continue from the state of another solver, at any step."""
        with self._centre.changing():
            self._rates.load_state(state.rest["rates"])
            self._centre.load(state)
            self._answer = None


def refuse_replay_of_fewer(num_shards: int, took_part: Sequence[frozenset[int]] | None) -> None:
    """Refuse to replay steps of some shards only, where all shards take part in every step.

    Args:
        num_shards: S.
        took_part: of the run that is replayed; None: none is.

    Raises:
        ConfigError: the run made a step of fewer shards.
    """
    if took_part is not None and any(shards != frozenset(range(num_shards)) for shards in took_part):
        raise ConfigError(
            "the run to be replayed made steps of some shards only, but with this solver.name all shards "
            "take part in every step: it was made by another rule"
        )


def refuse_statistics(weights: Weights) -> None:
    """Refuse running statistics, where shards have models of their own.

    Raises:
        ModelError: there are some.
    """
    if weights.statistics.size:
        raise ModelError(
            "the module has batch-norm, but with this solver.name every shard has weights of its own, and "
            "the centre sees no row, so nothing could measure running statistics for its weights: use a norm "
            "without them, such as torch.nn.GroupNorm or LayerNorm"
        )


def step_along(
    optimizer: FlatOptimizer,
    total: Vector,
    weight: float,
    touched: Touched,
    clip_norm: float | None,
    seed: int,
    then: Callable[[], object] | None = None,
) -> float | None:
    """Let an optimiser step with a mean gradient; return its norm before clipping.

    Args:
        optimizer: over the parameters that it changes.
        total: the sum of the gradients over the rows, float[P].
        weight: of the rows; how many, if they have none.
        touched: the parameters that have a gradient.
        clip_norm: the largest norm of the mean gradient; None: nothing is clipped, and no norm is computed.
        seed: of what an optimiser of the user's own draws.
        then: called after the step; see `FlatOptimizer.step`.

    Raises:
        UserCodeError: the optimiser or the schedule raised.
    """
    gradient = optimizer.new_gradient()
    torch.div(torch.from_numpy(total), weight, out=gradient)
    norm = clip(gradient, clip_norm)
    optimizer.step(gradient, touched, seed, then)
    return norm


def clip(gradient: torch.Tensor, clip_norm: float | None) -> float | None:
    """Scale a gradient, float[P], down to a Euclidean norm, in place; return its norm before that.

    With None nothing is clipped, and no norm is computed.
    """
    if clip_norm is None:
        return None
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    if norm > clip_norm:
        gradient.mul_(clip_norm / norm)
    return norm


def refuse_not_finite(parameters: torch.Tensor, doing: str, key: str, rate: float) -> None:
    """Refuse parameters that an update made NaN or infinite.

    Raises:
        UpdateNotFinite: with the rate, and the key to lower.
    """
    if not math.isfinite(parameters.sum()) and not torch.isfinite(parameters).all():
        raise UpdateNotFinite(
            f"{doing} made a parameter infinite or NaN; lower {key} (it was {rate:g}) or set solver.clip_norm"
        )
