"""A model of a shard's own: its parameters, and the optimiser that moves them."""

from __future__ import annotations

import numpy as np
import torch

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import OptimizerConfig
from sparksgd.solvers.centre import refuse_not_finite, step_along
from sparksgd.solvers.flat_optimizer import FlatOptimizer
from sparksgd.solvers.protocol import Gradient, HalfState, Settings, total_weight
from sparksgd.solvers.torch_optimizers import another_optimizer

__all__ = ["LocalModel"]


class LocalModel:
    """Parameters, all 0 at first, and an optimiser.

    Args:
        flat: a module of the run's shapes.
        optimizer: which class of torch.optim, and its arguments; it was tried before.
        seed: of the run; what an optimiser of the user's own draws follows from it.
        clip_norm: the largest norm of a gradient; None: none is clipped.
    """

    def __init__(
        self, flat: FlatModule, optimizer: OptimizerConfig, seed: int, clip_norm: float | None
    ) -> None:
        self.flat = flat.parameters_like()
        self._config, self._seed, self._clip_norm = optimizer, seed, clip_norm
        self.optimizer: FlatOptimizer
        self.begin_anew()

    @property
    def parameters(self) -> torch.Tensor:
        """Return the parameters, float32[P]; they may be changed in place."""
        return self.flat.parameters

    def begin_anew(self) -> None:
        """Let the optimiser forget what it keeps."""
        self.optimizer = another_optimizer(self.flat, self._config, self._seed)

    def step(self, gradient: Gradient, settings: Settings) -> None:
        """Let the optimiser make a step with a piece's mean gradient.

        Raises:
            UpdateNotFinite: a parameter became NaN or infinite.
            UserCodeError: the optimiser raised.
        """
        self.optimizer.set(settings)
        seed = seed32(self._seed, "optimizer", gradient.shard, gradient.turn)
        weight = total_weight(gradient)
        step_along(self.optimizer, gradient.vector, weight, gradient.touched, self._clip_norm, seed)
        refuse_not_finite(self.parameters, "the shard's own step", "optimizer.lr", self.optimizer.lr)

    def kept(self) -> HalfState:
        """Return what the optimiser keeps: arrays by name, numbers without a dimension; or all as bytes.

        Raises:
            ConfigError: an attribute of an own optimiser cannot be copied.
        """
        if not self.optimizer.is_elementwise:
            return self.optimizer.state()[1]
        vectors, numbers = self.optimizer.averageable()
        return {**vectors, **{name: np.asarray(value) for name, value in numbers.items()}}

    def load_kept(self, kept: HalfState) -> None:
        """Let the optimiser continue from what another one kept."""
        self.begin_anew()
        if not self.optimizer.is_elementwise:
            self.optimizer.load_state({}, kept)
            return
        vectors = {name: value for name, value in kept.items() if value.ndim}
        numbers = {name: float(value) for name, value in kept.items() if not value.ndim}
        self.optimizer.load_averaged(vectors, numbers)
