"""The keys of local SGD, and its worker half: the turns that a shard makes by itself (see local_sgd.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from sparksgd.arithmetic.changes import bits, constants_changed
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config, OptimizerConfig
from sparksgd.errors import ConfigError
from sparksgd.solvers.flat_optimizer import HAS
from sparksgd.solvers.local_model import LocalModel
from sparksgd.solvers.protocol import (
    Answer,
    Gradient,
    HalfState,
    Message,
    Need,
    Settings,
    Vector,
    added_weights,
    either,
    total_weight,
)
from sparksgd.solvers.rules import require_at_least
from sparksgd.solvers.synchronous import SendGradients

__all__ = ["LocalSGDSettings", "LocalTurns", "numbers_of"]


@dataclass(frozen=True, kw_only=True)
class LocalSGDSettings:
    """The keys of solver.name = "local_sgd"."""

    turns_per_round: int = 16
    """H: how many turns each shard makes by itself between two sums.  Workers send 1/H of the bytes of
    synchronous SGD."""

    outer_lr: float = 1.0
    """epsilon: the step of the centre along the mean difference.  1 averages the shards' models."""

    outer_momentum: float = 0.0
    """beta: the centre's Nesterov momentum.  DiLoCo uses 0.9, with outer_lr = 0.7."""

    synchronous_steps: int = 0
    """How many steps of synchronous SGD come first (post-local SGD).  After them each shard's optimiser
    begins with a copy of the centre's state."""

    inner_state: Literal["drop", "average", "keep"] = "drop"
    """What happens at a round's end to the state of the shards' optimisers, such as momentum.  drop: it is
    forgotten.  average: all continue from its mean.  keep: each shard keeps its own, which only some engines
    carry."""

    clip_norm: float | None = None
    """The largest Euclidean norm of a gradient that an optimiser takes.  If not set, gradients are not
    clipped."""

    def check(self, config: Config) -> None:
        """Refuse values out of range."""
        require_at_least("solver.turns_per_round", self.turns_per_round, 1)
        require_at_least("solver.outer_lr", self.outer_lr, 0, above=True)
        require_at_least("solver.outer_momentum", self.outer_momentum, 0)
        if self.outer_momentum >= 1:
            raise ConfigError(f"solver.outer_momentum is {self.outer_momentum}, but must be below 1")
        require_at_least("solver.synchronous_steps", self.synchronous_steps, 0)
        require_at_least("solver.clip_norm", self.clip_norm, 0, above=True)

    def needs(self) -> frozenset[Need]:
        """Return what the engine must carry."""
        return frozenset({Need.ROUNDS, Need.SHARD_STATE} if self.inner_state == "keep" else {Need.ROUNDS})


class LocalTurns:
    """The worker half: its own optimiser moves a local model, which starts from the round's weights.

    Args:
        flat: a module of the run's shapes.
        shard: the shard that it belongs to.
        settings: the rule's keys.
        optimizer: which class of torch.optim, and its arguments.
        state_names: names of the vectors and numbers in the optimiser's state, if it is averaged.
        seed: of the run.
    """

    lag = 0

    def __init__(
        self,
        flat: FlatModule,
        shard: int,
        *,
        settings: LocalSGDSettings,
        optimizer: OptimizerConfig,
        state_names: tuple[tuple[str, ...], tuple[str, ...]],
        seed: int,
    ) -> None:
        self._settings, self._state_names = settings, state_names
        self._synchronous = SendGradients(flat, shard)
        self._local = LocalModel(flat, optimizer, seed, settings.clip_norm)
        self._round: Answer | None = None
        self._has_begun = False
        self._made: Gradient | None = None  # rows and losses of the round's turns, and its last statistics

    def take(self, answer: Answer) -> None:
        """Begin a round at the centre's weights."""
        self._made = None
        if answer.turn < self._settings.synchronous_steps:
            self._round = None
            self._synchronous.take(answer)
            return
        self._round = answer
        self._local.parameters.copy_(torch.from_numpy(answer.weights.parameters))
        if not self._has_begun or self._settings.inner_state != "keep":
            self._local.begin_anew()
            if answer.scalars:
                self._local.optimizer.load_averaged(answer.vectors, answer.scalars)
        self._has_begun = True

    def point(self) -> Vector:
        """Return the local model."""
        return self._synchronous.point() if self._round is None else self._local.parameters.numpy()

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Let the optimiser make a step with the piece's mean gradient.

        Raises:
            UpdateNotFinite: a parameter became NaN or infinite.
        """
        if self._round is None:
            self._synchronous.turn(gradient, settings)
            return
        before, changed = self._made, gradient.changes
        if changed is not None and changed.parameters is not None:
            changed.parameters.write(bits(self._local.parameters))
        self._local.step(gradient, settings)
        self._made = replace(
            gradient,
            vector=gradient.vector[:0],
            rows=gradient.rows + (before.rows if before else 0),
            weight=added_weights(before.weight, gradient.weight) if before else gradient.weight,
            loss=(before.loss if before else 0.0) + gradient.loss,
            touched=either(before.touched, gradient.touched) if before else gradient.touched,
            changes=constants_changed(before.changes if before else None, changed),
        )

    def send(self) -> Message | None:
        """Return the difference to the round's weights, by the weight of the rows; None where there was none.

        Raises:
            ConfigError: the optimisers' states cannot be averaged.
        """
        if self._round is None:
            return self._synchronous.send()
        if self._made is None:
            return None
        local, of_rows = self._local.parameters.numpy(), total_weight(self._made)
        weight = np.asarray(of_rows, local.dtype)
        vectors = {"difference": (self._round.weights.parameters - local) * weight}
        scalars: dict[str, float] = {}
        if self._settings.inner_state == "average":
            of_elements, of_all = self._local.optimizer.averageable()
            of_elements, of_all = self._or_zeros(of_elements, of_all)
            found = tuple(sorted(of_elements)), numbers_of(of_all)
            if found != self._state_names:
                raise ConfigError(
                    f'solver.inner_state is "average", but what the optimiser keeps changes during the run, '
                    f"from {self._state_names} to {found}: a schedule "
                    f'switches its momentum. Use solver.inner_state = "drop", or schedule.cycle_momentum = '
                    f"false"
                )
            vectors |= {name: vector * weight for name, vector in of_elements.items()}
            scalars = {name: value * of_rows for name, value in of_all.items()}
        return Message.of([self._made], vectors, **scalars)

    def _or_zeros(
        self, vectors: dict[str, Vector], numbers: dict[str, float]
    ) -> tuple[dict[str, Vector], dict[str, float]]:
        """Return what the optimiser keeps; zeros if no turn gave any parameter a gradient."""
        if any(numbers.values()) or vectors:
            return vectors, numbers
        names, of_all = self._state_names
        zeros = {f"{name}.{k}": 0.0 for name in of_all for k in range(len(self._local.flat.parts))}
        return {name: np.zeros_like(self._local.parameters.numpy()) for name in names}, numbers | zeros

    def state(self) -> HalfState:
        """Return the optimiser's state, and whether it has one yet, if it is kept."""
        if self._settings.inner_state != "keep":
            return {}
        return {"begun": np.asarray(float(self._has_begun)), **self._local.kept()}

    def load_state(self, state: HalfState) -> None:
        """Continue from the state of another half."""
        if state:
            kept = dict(state)
            self._has_begun = bool(kept.pop("begun"))
            self._local.load_kept(kept)


def numbers_of(of_each: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names of the numbers that an optimiser keeps for a parameter."""
    return tuple(sorted({name.rpartition(".")[0] for name in of_each} - {HAS}))
