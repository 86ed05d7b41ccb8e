"""What the rules of arrivals share: keys, the weights, a count of rows, and steps of an optimiser.

Each shard computes at its own pace.  So a turn of the run is over, and a schedule moves, when steps have used
as many rows as one turn of all shards has, whichever shards they came from.

Legend: S shards, P parameters, K turns per epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparksgd.arithmetic.changes import Changes
from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import Config
from sparksgd.errors import ModelError
from sparksgd.solvers.arrivals import ArrivalStep, Verdict
from sparksgd.solvers.centre import OnCentre, refuse_statistics, step_along
from sparksgd.solvers.flat_optimizer import FlatOptimizer
from sparksgd.solvers.protocol import (
    Answer,
    Halves,
    Message,
    Need,
    SolverState,
    StepOutcome,
    Vector,
    WorkerHalf,
    total_weight,
)
from sparksgd.solvers.protocol import Settings as RateSettings
from sparksgd.solvers.rules import Experiment, require_at_least
from sparksgd.solvers.schedules import Rates, make_schedule, own_schedule, remarks_on
from sparksgd.solvers.synchronous import SendGradients
from sparksgd.solvers.torch_optimizers import make_optimizer

__all__ = [
    "ArrivalCentre",
    "ArrivalSettings",
    "CorrectedCentre",
    "GradientCentre",
    "GradientSettings",
    "ModelCentre",
    "refuse_changes",
]


@dataclass(frozen=True, kw_only=True)
class ArrivalSettings:
    """The keys of every rule of arrivals."""

    max_staleness: int | None = None
    """A message is ignored, and counted, if more steps than this were made since its weights were read.  If
    not set, every message is used."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        require_at_least("solver.max_staleness", self.max_staleness, 0)

    def needs(self) -> frozenset[Need]:
        """Return what the engine must carry."""
        return frozenset({Need.ARRIVALS})


@dataclass(frozen=True, kw_only=True)
class GradientSettings(ArrivalSettings):
    """The keys of every rule whose messages are gradients."""

    clip_norm: float | None = None
    """The largest Euclidean norm of a step's gradient.  If not set, gradients are not clipped."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        require_at_least("solver.clip_norm", self.clip_norm, 0, above=True)


class ArrivalCentre(OnCentre):
    """The weights, and how many rows have made them.  A rule is a subclass that defines `arrived`.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: what a rule must know about the run.
        halves: the worker halves.
    """

    by_strips = False

    def __init__(
        self, flat: FlatModule | FlatStrip, settings: ArrivalSettings, experiment: Experiment, halves: Halves
    ) -> None:
        super().__init__(flat)
        self.needs, self.halves = settings.needs(), halves
        self._experiment, self._max_staleness = experiment, settings.max_staleness
        self._rows = self._rows_before = 0
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        """Forget what it holds of shards, beside what `state` returns: all of them begin anew."""

    @property
    def turns(self) -> int:
        """The rows that steps have used, in K-ths of an epoch."""
        return self._turns_of(self._rows)

    def _turns_of(self, rows: int) -> int:
        return rows * self._experiment.turns_per_epoch // self._experiment.rows

    def answer(self) -> Answer:
        """Return the newest weights, and the settings of turns; the same object until the next step."""
        if self._answer is None:
            self._answer = Answer(weights=self.readout(), turn=self.turns, settings=(self._settings(),))
        return self._answer

    def _settings(self) -> RateSettings:
        """Return the settings of the next turns."""
        return {}

    def begin(self, shard: int) -> Answer:
        """Return the newest weights."""
        return self.answer()

    def lost(self, shard: int) -> Verdict:
        """Release nobody: no shard waits for another."""
        return Verdict()

    def _made(
        self, total: Message, shards: Sequence[int], staleness: Sequence[int], outcome: StepOutcome
    ) -> ArrivalStep:
        """Return the report of a step."""
        weight = total_weight(total)
        return ArrivalStep(
            outcome=outcome,
            rows=total.rows,
            weight=weight,
            loss=total.loss / weight,
            shards=tuple(shards),
            staleness=tuple(staleness),
        )

    def is_too_old(self, version_read: int) -> bool:
        """Return whether a message that was computed from this version must be ignored."""
        return self._max_staleness is not None and self.staleness_of(version_read) > self._max_staleness

    def staleness_of(self, version_read: int) -> int:
        """Return how many steps were made since this version."""
        return self.version - version_read

    def ignored(self, shard: int) -> Verdict:
        """Let a shard go on whose message was too old to be used."""
        return Verdict(answers={shard: self.answer()}, is_ignored=True)

    @contextmanager
    def _step(self, total: Message, key: str, rate: float) -> Iterator[int]:
        """Let the block change the parameters, and make that the next version.

        Args:
            total: of all rows that the step uses.
            key: of the rate, for errors.
            rate: how far the step goes.

        Yields:
            The turns after the step.

        Raises:
            UpdateNotFinite: a parameter became NaN or infinite; the weights are as before.
            ModelError: forward changed parameters or constants.
        """
        refuse_changes(total.changes)
        turns, self._rows_before = self._turns_of(self._rows + total.rows), self._rows
        with self._centre.changing(), self._centre.step(total, turns - self.turns, key, rate):
            yield turns
        self._rows += total.rows
        self._answer = None

    def _kept(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        """Return what the rule keeps beside the weights: vectors, float32[P] each, and the rest."""
        return {}, {}

    def _load_kept(self, state: SolverState) -> None:
        """Continue from what another one kept."""

    def state(self) -> SolverState:
        """Return all that its next step depends on, except what shards hold and what it holds of them."""
        vectors, rest = self._kept()
        return SolverState(
            weights=self.readout(), turns=self.turns, vectors=vectors, rest={**rest, "rows": self._rows}
        )

    def load_state(self, state: SolverState) -> None:
        """Continue from the state of another solver, at any step; all shards begin anew."""
        with self._centre.changing():
            self._load_kept(state)
            self._hold_nothing()
            self._rows = state.rest["rows"]
            self._centre.load(state)
            self._answer = None

    def step_back(self) -> None:
        """Return to the weights before the last step, which had a finite loss."""
        super().step_back()
        self._rows = self._rows_before


class GradientCentre(ArrivalCentre):
    """A centre whose optimiser steps along the gradients that arrive.

    A rule of one's own, which solver.name names by its import path, may be derived from it.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
        halves: the worker halves; None: each sends every gradient unchanged.
    """

    Settings: ClassVar[type[GradientSettings]] = GradientSettings
    """The keys; a rule of one's own may have more."""

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: GradientSettings,
        experiment: Experiment,
        halves: Halves | None = None,
    ) -> None:
        plain = Halves(make=SendGradients, names=("gradient",))
        super().__init__(flat, settings, experiment, halves or plain)
        self._clip_norm, self._seed = settings.clip_norm, experiment.seed
        shaped = own_schedule(experiment.schedule)
        self._optimizer = make_optimizer(flat, experiment.optimizer, self._seed, shaped=shaped)
        self._schedule = make_schedule(self._optimizer, experiment.schedule, experiment.moves, self._seed)
        self.remarks = remarks_on(self._schedule, experiment.moves)

    @property
    def optimizers(self) -> Sequence[FlatOptimizer]:
        """Return the optimisers that make its steps."""
        return [self._optimizer]

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._optimizer.lr

    def _settings(self) -> RateSettings:
        return {"lr": self.lr}

    def step_on(
        self, total: Message, gradient: Vector, weight: float, shards: Sequence[int], staleness: Sequence[int]
    ) -> ArrivalStep:
        """Make a step along a gradient.

        Args:
            total: of all messages that it uses.
            gradient: float32[P].
            weight: by which it is divided first.
            shards: the sender of each message.
            staleness: of each message.
        """
        lr, seed = self.lr, seed32(self._seed, "optimizer", self.version)
        with self._step(total, "optimizer.lr", lr) as turns:
            norm = step_along(
                self._optimizer, gradient, weight, total.touched, self._clip_norm, seed, self._moves(turns)
            )
        return self._made(total, shards, staleness, StepOutcome(lr=lr, gradient_norm=norm))

    def _moves(self, turns: int) -> Callable[[], object] | None:
        """Return what moves the schedule to where it is after these turns; None: it stays."""
        schedule, each = self._schedule, self._experiment.turns_per_move
        last = min(turns // each, self._experiment.moves)  # the last step may go beyond the end
        due = range(self.turns // each + 1, last + 1)
        if schedule is None or not due:
            return None

        def move() -> None:
            for number in due:
                schedule.move(number * each)

        return move

    def _kept(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        vectors, rest = self._optimizer.state()
        schedule = None if self._schedule is None else self._schedule.state()
        return vectors, {"optimizer": rest, "schedule": schedule}

    def _load_kept(self, state: SolverState) -> None:
        self._load_optimizer(state.vectors, state)

    def _load_optimizer(self, vectors: Mapping[str, Vector], state: SolverState) -> None:
        """Let the optimiser and the schedule continue, with these vectors of the optimiser."""
        self._optimizer.load_state(vectors, state.rest["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state(state.rest["schedule"])

    def evaluated(self, loss: float, accuracy: float | None) -> None:
        """Let a schedule that evaluations move change the rate."""
        if self._schedule is not None and self._schedule.evaluated(loss, accuracy):
            self.revision += 1
            self._answer = None


class CorrectedCentre(GradientCentre):
    """A centre that corrects each gradient by how far its weights have moved since the sender read them.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def _hold_nothing(self) -> None:
        self._read: dict[int, Vector] = {}

    def _corrected(self, mean: Vector, moved: Vector) -> Vector:
        """Return what the optimiser steps along.

        Args:
            mean: the mean gradient of the message, float32[P].
            moved: the weights now, less those that it was computed from, float32[P].
        """
        raise NotImplementedError

    def begin(self, shard: int) -> Answer:
        """Return the newest weights, and remember that the shard has them."""
        self._read[shard] = self.readout().parameters
        return self.answer()

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Step along the corrected gradient."""
        if self.is_too_old(version_read):
            return Verdict(answers={shard: self.begin(shard)}, is_ignored=True)
        gradient, staleness = message.vectors["gradient"], self.staleness_of(version_read)
        mean = gradient / np.asarray(total_weight(message), gradient.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # a step to infinity is refused
            corrected = self._corrected(mean, self.readout().parameters - self._read[shard])
        step = self.step_on(message, corrected, 1.0, [shard], [staleness])
        return Verdict(answers={shard: self.begin(shard)}, steps=(step,))

    def lost(self, shard: int) -> Verdict:
        """Forget what the shard has read."""
        self._read.pop(shard, None)
        return Verdict()


class ModelCentre(ArrivalCentre):
    """A centre whose shards have models of their own, each with an optimiser; the centre only sets its rate.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
        make: makes the worker half of a shard.
        names: which vectors every message of a half has; None: its rule looks itself.

    Raises:
        ModelError: the module has running statistics.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: ArrivalSettings,
        experiment: Experiment,
        make: Callable[[FlatModule, int], WorkerHalf[Answer]],
        names: tuple[str, ...] | None = None,
    ) -> None:
        halves = Halves(make=make, have_local_models=True, keep_state=True, names=names)
        super().__init__(flat, settings, experiment, halves)
        refuse_statistics(self.readout())
        make_optimizer(flat, experiment.optimizer, experiment.seed)  # tries it: halves make others alike
        self._rates = Rates.of(experiment, flat)
        self.remarks = self._rates.remarks

    def _settings(self) -> RateSettings:
        return self._rates.now

    @contextmanager
    def _exchange(self, message: Message, key: str, rate: float) -> Iterator[None]:
        """Let the block change the parameters by a shard's message; see `_step`."""
        before = self.turns
        with self._step(message, key, rate) as turns:
            yield
        self._rates.move(turns - before)

    def _kept(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        return {}, {"rates": self._rates.state()}

    def _load_kept(self, state: SolverState) -> None:
        self._rates.load_state(state.rest["rates"])


def refuse_changes(changes: Changes | None) -> None:
    """Refuse what forward changed of parameters and buffers.

    Raises:
        ModelError: it changed something.
    """
    if changes is not None:
        raise ModelError(
            "forward changes a parameter or a buffer. With this solver.name shards compute from different "
            "weights at the same time, so what forward made of those of one shard would overwrite those of "
            'another: use solver.name = "synchronous" or "local_sgd"'
        )
