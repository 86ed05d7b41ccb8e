"""Synchronous SGD: every step uses gradients at the newest weights, of all shards, or of all but b.

    g_t = (sum over the rows that took part of weight * gradient of their loss) / (sum of these weights)
    theta_(t+1) = optimiser(theta_t, g_t)

Without data.weight each row weighs 1.
Without backup workers, this equals one process that uses all rows of the step as one mini-batch.  With b of
them, a step uses the first N = S - b shards that arrive, and drops later ones.  The optimiser and the
schedule are torch's own.  Chen et al. 2016, "Revisiting Distributed Synchronous SGD" (arXiv:1604.00981),
algorithms 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.solvers.centre import OnCentre, step_along
from sparksgd.solvers.flat_optimizer import FlatOptimizer
from sparksgd.solvers.protocol import (
    Answer,
    Gradient,
    HalfState,
    Halves,
    MakeReplica,
    Message,
    MessageShape,
    Need,
    Quorum,
    Settings,
    SolverState,
    StepOutcome,
    Vector,
    total_weight,
)
from sparksgd.solvers.rules import Experiment, needs_of, require_at_least
from sparksgd.solvers.schedules import make_schedule, own_schedule, remarks_on
from sparksgd.solvers.torch_optimizers import another_optimizer, make_optimizer

__all__ = [
    "GRADIENT",
    "SendGradients",
    "SynchronousSettings",
    "SynchronousSolver",
]


@dataclass(frozen=True, kw_only=True)
class SynchronousSettings:
    """The keys of solver.name = "synchronous"."""

    clip_norm: float | None = None
    """The largest Euclidean norm of a step's gradient.  If not set, gradients are not clipped."""

    backup_workers: int = 0
    """b: a step ends when all shards but b have arrived; gradients that come later are dropped.  It needs
    the tree engine, and one shard for each worker.  The run's trace says who took part, for a replay."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        require_at_least("solver.backup_workers", self.backup_workers, 0)
        require_at_least("solver.clip_norm", self.clip_norm, 0, above=True)
        backups, shards = self.backup_workers, config.train.num_shards
        if not backups:
            return
        if backups >= shards:
            raise ConfigError(
                f"solver.backup_workers is {backups}, but train.num_shards is {shards}, and a step needs "
                f"one at least: set backup_workers to {shards - 1} or less (about 4 of 100 were best)"
            )
        if config.engine.num_workers not in (None, shards):
            raise ConfigError(
                f"solver.backup_workers is {backups}, which takes one shard per worker, but "
                f"engine.num_workers is {config.engine.num_workers} and train.num_shards {shards}: set both "
                f"to one number"
            )
        if config.data.placement == "in_place":
            raise ConfigError(
                f'solver.backup_workers is {backups}, but data.placement is "in_place": starved rows could '
                f'not be dealt anew; use "hashed"'
            )

    def needs(self) -> frozenset[Need]:
        """Return what the engine must carry."""
        return frozenset({Need.ROUNDS, Need.QUORUM} if self.backup_workers else {Need.ROUNDS})


GRADIENT = MessageShape(vectors=("gradient",))


class SendGradients:
    """The worker half of synchronous SGD: it sends every gradient unchanged."""

    lag = 0

    def __init__(self, flat: FlatModule, shard: int) -> None:
        self._at: Vector | None = None
        self._gradient: Gradient | None = None

    def take(self, answer: Answer) -> None:
        """Continue from the newest weights."""
        self._at = answer.weights.parameters

    def point(self) -> Vector:
        """Return the newest weights."""
        assert self._at is not None
        return self._at

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Keep the gradient."""
        self._gradient = gradient

    def send(self) -> Message | None:
        """Return the gradient."""
        gradient, self._gradient = self._gradient, None
        return None if gradient is None else Message.of([gradient], {"gradient": gradient.vector})

    def state(self) -> HalfState:
        """Keep nothing."""
        return {}

    def load_state(self, state: HalfState) -> None:
        """Keep nothing."""


class SynchronousSolver(OnCentre):
    """Synchronous SGD with any torch optimiser and learning-rate schedule.

    Args:
        flat: the module, or a strip of it; the solver owns its parameters from now on.
        settings: clipping, and backup workers.
        experiment: has the optimiser, the schedule, and how long they are used.
        took_part: in a replay, the shards of each step; None: the first to arrive.
        is_replica: whether it repeats the steps of another solver: its optimiser was tried before, and a
            step that fails is not undone, because it is then forgotten.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: SynchronousSettings,
        experiment: Experiment,
        took_part: Sequence[frozenset[int]] | None = None,
        *,
        is_replica: bool = False,
    ) -> None:
        super().__init__(flat, is_replica=is_replica)
        self.halves = Halves(make=SendGradients, send_gradients=True)
        self._make_replica = partial(
            SynchronousSolver, settings=settings, experiment=experiment, is_replica=True
        )
        num_shards = experiment.num_shards
        everyone = frozenset(range(num_shards))
        self._first = Quorum(shards=everyone, enough=num_shards - settings.backup_workers)
        self._took_part = took_part
        self.needs = needs_of(settings, num_shards, took_part)
        self._clip_norm = settings.clip_norm
        self._seed = experiment.seed
        make = another_optimizer if is_replica else make_optimizer
        shaped = own_schedule(experiment.schedule)
        self._optimizer = make(flat, experiment.optimizer, self._seed, shaped=shaped)
        self.by_strips = self._optimizer.is_elementwise and self._clip_norm is None
        self._turns_per_move = experiment.turns_per_move
        self._schedule = make_schedule(
            self._optimizer, experiment.schedule, experiment.moves, self._seed, is_tried=is_replica
        )
        self.remarks = remarks_on(self._schedule, experiment.moves)

    @property
    def optimizers(self) -> Sequence[FlatOptimizer]:
        """Return the optimisers that make its steps."""
        return [self._optimizer]

    def turns_at(self, turn: int) -> int:
        """Return 1: every turn is a round."""
        return 1

    def shape_at(self, turn: int) -> MessageShape:
        """Return the names in every message: the gradient."""
        return GRADIENT

    def answer(self) -> Answer:
        """Return the newest weights; the same answer until the next step."""
        if self._answer is None or self._answer.weights is not self.readout():
            self._answer = Answer(weights=self.readout(), turn=self.version)
        return self._answer

    def make_replica(self) -> MakeReplica:
        """Return a function that makes another solver of this kind, at version 0; it can be pickled."""
        return self._make_replica

    def state(self) -> SolverState:
        """Return all that its next step depends on; the optimiser's arrays are views."""
        vectors, rest = self._optimizer.state()
        schedule = None if self._schedule is None else self._schedule.state()
        return SolverState(
            weights=self.readout(),
            turns=self.turns,
            vectors=vectors,
            rest={"optimizer": rest, "schedule": schedule},
        )

    def load_state(self, state: SolverState) -> None:
        """Continue from the state of another solver, at any step."""
        with self._centre.changing():
            self._optimizer.load_state(state.vectors, state.rest["optimizer"])
            if self._schedule is not None:
                self._schedule.load_state(state.rest["schedule"])
            self._centre.load(state)

    def quorum(self) -> Quorum:
        """Return the shards that the next step needs: all but the backups, or those of the trace."""
        if self._took_part is None:
            return self._first
        shards = self._took_part[self.version]
        return Quorum(shards=shards, enough=len(shards))

    def receive(self, total: Message) -> StepOutcome:
        """Make one step with the mean gradient.

        Raises:
            UpdateNotFinite: the step would make a parameter NaN or infinite; the weights stay as before.
            UserCodeError: the optimiser or the schedule raised.
        """
        lr, seed = self._optimizer.lr, seed32(self._seed, "optimizer", self.version)
        steps = self.version + 1
        then = None
        if self._schedule is not None and steps % self._turns_per_move == 0:
            then = partial(self._schedule.move, steps)
        with self._centre.changing(), self._centre.step(total, 1, "optimizer.lr", lr):
            norm = step_along(
                self._optimizer,
                total.vectors["gradient"],
                total_weight(total),
                total.touched,
                self._clip_norm,
                seed,
                then,
            )
        return StepOutcome(lr=lr, gradient_norm=norm)

    def evaluated(self, loss: float, accuracy: float | None) -> None:
        """Let a schedule that evaluations move change the rate."""
        if self._schedule is not None and self._schedule.evaluated(loss, accuracy):
            self.revision += 1
