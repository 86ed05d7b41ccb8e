"""Delayed Nesterov: asynchronous DiLoCo, whose centre applies its momentum only at every N-th arrival.

    shard:   H turns of its own from theta_read, with any optimiser inside;  d = theta_read - x
    centre:  theta <- theta - epsilon d / N                                     at every arrival
             m <- beta m + (mean of the last N d);  theta <- theta - epsilon beta m      at every N-th one

Liu et al. 2024, "Asynchronous Local-SGD Training for Language Modeling" (arXiv:2401.09135), algorithm 3, with
c = 0.  An optimiser inside begins anew in each of these periods, whose turns all have one rate: that of the
answer they begin with.  With a constant rate, N = 1, beta = 0 and one shard it is local SGD of one shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.solvers.arrival_centre import ArrivalSettings, ModelCentre
from sparksgd.solvers.arrivals import Verdict
from sparksgd.solvers.local_turns import LocalSGDSettings, LocalTurns
from sparksgd.solvers.protocol import (
    Gradient,
    Message,
    Settings,
    SolverState,
    StepOutcome,
    Vector,
    total_weight,
)
from sparksgd.solvers.rules import Experiment, require_at_least

__all__ = ["AsyncLocalTurns", "DelayedNesterov", "DelayedNesterovSettings"]


@dataclass(frozen=True, kw_only=True)
class DelayedNesterovSettings(ArrivalSettings):
    """The keys of solver.name = "delayed_nesterov"."""

    turns_per_push: int = 16
    """H: how many turns a shard makes by itself between two messages."""

    outer_lr: float = 0.7
    """epsilon: the step of the centre along the differences."""

    outer_momentum: float = 0.9
    """beta: the centre's Nesterov momentum."""

    delay: int | None = None
    """N: how many arrivals make one step of the momentum.  If not set: train.num_shards."""

    clip_norm: float | None = None
    """The largest Euclidean norm of a gradient that an optimiser takes.  If not set, gradients are not
    clipped."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        require_at_least("solver.turns_per_push", self.turns_per_push, 1)
        require_at_least("solver.outer_lr", self.outer_lr, 0, above=True)
        require_at_least("solver.outer_momentum", self.outer_momentum, 0)
        if self.outer_momentum >= 1:
            raise ConfigError(f"solver.outer_momentum is {self.outer_momentum}, but must be below 1")
        require_at_least("solver.delay", self.delay, 1)
        require_at_least("solver.clip_norm", self.clip_norm, 0, above=True)


class AsyncLocalTurns(LocalTurns):
    """The worker half: local turns, whose difference is sent after every H of them.

    Args:
        flat: a module of the run's shapes.
        shard: the shard that it belongs to.
        turns: H.
        inside: see `LocalTurns`.
    """

    def __init__(self, flat: FlatModule, shard: int, *, turns: int, **inside: Any) -> None:
        super().__init__(flat, shard, **inside)
        self._period, self._made_turns = turns, 0

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Let the optimiser make a step with the piece's mean gradient."""
        super().turn(gradient, settings)
        self._made_turns += 1

    def send(self) -> Message | None:
        """Return the difference to the weights that were read, times the weight of the rows, if it is due."""
        return None if self._made_turns % self._period else super().send()


class DelayedNesterov(ModelCentre):
    """The central half: it steps along every difference, and along its momentum at every N-th one.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: DelayedNesterovSettings,
        experiment: Experiment,
    ) -> None:
        make = partial(
            AsyncLocalTurns,
            turns=settings.turns_per_push,
            settings=LocalSGDSettings(clip_norm=settings.clip_norm),
            optimizer=experiment.optimizer,
            state_names=((), ()),
            seed=experiment.seed,
        )
        super().__init__(flat, settings, experiment, make, ("difference",))
        self._rule, self._delay = settings, settings.delay or experiment.num_shards
        zeros = np.zeros_like(self.readout().parameters)
        self._momentum, self._sum = zeros, zeros

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Step along a difference."""
        if self.is_too_old(version_read):
            return self.ignored(shard)
        lr, staleness = self._rates.lr, self.staleness_of(version_read)
        difference = message.vectors["difference"]
        mean = difference / np.asarray(total_weight(message), difference.dtype)
        momentum, gathered = self._momentum, self._sum + mean
        kind, epsilon = mean.dtype.type, self._rule.outer_lr
        step = kind(epsilon) * (mean / kind(self._delay))
        if (self.version + 1) % self._delay == 0:
            beta = kind(self._rule.outer_momentum)
            momentum, gathered = beta * momentum + gathered / kind(self._delay), np.zeros_like(gathered)
            step = step + kind(epsilon) * (beta * momentum)
        with self._exchange(message, "solver.outer_lr", epsilon):
            self.flat.parameters.sub_(torch.from_numpy(step))
        self._momentum, self._sum = momentum, gathered
        made = self._made(message, [shard], [staleness], StepOutcome(lr=lr, gradient_norm=None))
        return Verdict(answers={shard: self.answer()}, steps=(made,))

    def _kept(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        vectors, rest = super()._kept()
        return {**vectors, "outer.momentum": self._momentum, "outer.sum": self._sum}, rest

    def _load_kept(self, state: SolverState) -> None:
        super()._load_kept(state)
        self._momentum = state.vectors["outer.momentum"].copy()
        self._sum = state.vectors["outer.sum"].copy()
