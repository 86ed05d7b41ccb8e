"""Gap-aware SGD: a gradient counts the less, for each parameter, the further the weights have moved since.

    C = eta_max (sqrt(v / (1 - 0.999^k)) + 1e-8);   v <- 0.999 v + 0.001 m m        k: steps so far
    g <- g_mean / (1 + |theta - theta_read| / C)            elementwise
    theta <- SGD(theta, g)

    m            the optimiser's momentum buffer; without momentum the mean gradient
    theta_read   the weights that the shard computed from; each shard has its own
    eta_max      the largest learning rate so far

Barkai, Hakimi, Schuster 2020, "Gap-Aware Mitigation of Gradient Staleness" (ICLR).  Where the weights have
not moved since they were read, it is asynchronous SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.solvers.arrival_centre import CorrectedCentre, GradientSettings
from sparksgd.solvers.arrivals import Verdict
from sparksgd.solvers.protocol import Message, SolverState, Vector
from sparksgd.solvers.rules import Experiment

__all__ = ["GapAware", "GapAwareSettings"]

_DECAY, _LEAST = 0.999, 1e-8


@dataclass(frozen=True, kw_only=True)
class GapAwareSettings(GradientSettings):
    """The keys of solver.name = "gap_aware"."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        super().check(config)
        if config.optimizer.name != "SGD":
            raise ConfigError(
                f'solver.name is "gap_aware", which measures steps of SGD, but optimizer.name is '
                f'"{config.optimizer.name}": use "SGD", with momentum or without'
            )
        decay = config.optimizer.arguments.get("weight_decay", 0)
        if decay:
            raise ConfigError(
                f'optimizer.weight_decay is {decay}, but solver.name is "gap_aware", which would have to '
                f"divide the decay by the gap, too: leave it out, and add the penalty to the loss"
            )


class GapAware(CorrectedCentre):
    """The central half: it divides each gradient by its gap, and steps.

    Args:
        flat: the module; the solver owns its parameters from now on.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: GapAwareSettings,
        experiment: Experiment,
    ) -> None:
        super().__init__(flat, settings, experiment)
        self._squares = np.zeros_like(self.readout().parameters)
        self._rate, self._mean = self.lr, self._squares

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Step along the gradient, divided by its gap; note how large the step was."""
        verdict = super().arrived(shard, message, version_read)
        if verdict.steps:
            self._note_step(self._mean)
        return verdict

    def _corrected(self, mean: Vector, moved: Vector) -> Vector:
        self._mean, self._rate = mean, max(self._rate, self.lr)
        corrected: Vector = mean / (1 + self._gap(np.abs(moved)))
        return corrected

    def _gap(self, moved: Vector) -> Vector:
        """Return how many usual steps the weights have moved; 0 before the first step."""
        if not self.version:
            return np.zeros_like(moved)
        kind = moved.dtype.type
        usual = np.sqrt(self._squares / kind(1 - _DECAY**self.version))
        gap: Vector = moved / (kind(self._rate) * (usual + kind(_LEAST)))
        return gap

    def _note_step(self, mean: Vector) -> None:
        """Note how large a step was, by its momentum or its gradient."""
        step = super()._kept()[0].get("momentum_buffer", mean)
        kind = mean.dtype.type
        self._squares = kind(_DECAY) * self._squares + kind(1 - _DECAY) * step * step

    def _kept(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        vectors, rest = super()._kept()
        return {**vectors, "squares": self._squares}, {**rest, "rate": self._rate}

    def _load_kept(self, state: SolverState) -> None:
        vectors = dict(state.vectors)
        self._squares, self._rate = vectors.pop("squares").copy(), state.rest["rate"]
        self._load_optimizer(vectors, state)
