"""Delay-compensated SGD: a stale gradient is moved, to first order, to the weights that it is applied to.

    g_mean = (sum of the piece's gradients) / rows
    g <- g_mean + lambda g_mean g_mean (theta - theta_read)        elementwise
    theta <- optimiser(theta, g)

    theta_read   the weights that the shard computed from; each shard has its own
    adaptive:    v <- 0.95 v + 0.05 g_mean g_mean;  lambda = lambda_0 / sqrt(v + 1e-7)

Zheng et al. 2017, "Asynchronous Stochastic Gradient Descent with Delay Compensation" (ICML), where g g stands
for the Hessian's diagonal.  lambda = 0 is asynchronous SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.config import Config
from sparksgd.solvers.arrival_centre import CorrectedCentre, GradientSettings
from sparksgd.solvers.protocol import SolverState, Vector
from sparksgd.solvers.rules import Experiment, require_at_least

__all__ = ["DelayCompensated", "DelayCompensatedSettings"]

_DECAY, _LEAST = 0.95, 1e-7


@dataclass(frozen=True, kw_only=True)
class DelayCompensatedSettings(GradientSettings):
    """The keys of solver.name = "delay_compensated"."""

    compensation: float = 0.04
    """lambda: how much of the delay is compensated.  2 is usual if adaptive is true."""

    adaptive: bool = False
    """Whether lambda is divided by the root mean square of the gradients, for each parameter."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        require_at_least("solver.compensation", self.compensation, 0)


class DelayCompensated(CorrectedCentre):
    """The central half: it compensates each gradient, and steps.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: DelayCompensatedSettings,
        experiment: Experiment,
    ) -> None:
        super().__init__(flat, settings, experiment)
        self._compensation = settings.compensation
        self._squares: Vector | None = np.zeros_like(self.readout().parameters) if settings.adaptive else None

    def _corrected(self, mean: Vector, moved: Vector) -> Vector:
        compensated: Vector = mean + self._rate(mean) * mean * mean * moved
        return compensated

    def _rate(self, mean: Vector) -> Any:
        """Return lambda, for each parameter if it is adaptive."""
        kind = mean.dtype.type
        if self._squares is None:
            return kind(self._compensation)
        self._squares = kind(_DECAY) * self._squares + kind(1 - _DECAY) * mean * mean
        return kind(self._compensation) / np.sqrt(self._squares + kind(_LEAST))

    def _kept(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        vectors, rest = super()._kept()
        squares = {} if self._squares is None else {"squares": self._squares}
        return {**vectors, **squares}, rest

    def _load_kept(self, state: SolverState) -> None:
        vectors = dict(state.vectors)
        if self._squares is not None:
            self._squares = vectors.pop("squares").copy()
        self._load_optimizer(vectors, state)
