"""Stochastic gradient push (SGP): half of every model goes to one other shard, in every turn.

    z = x / w;   x <- optimiser(x, g(z))             w: the model's weight, 1 at first
    send x / 2 and w / 2 to one peer, keep the other half;  add what came to x and to w

In turn k shard i sends to shard i + 2^(k mod (floor(log2(S - 1)) + 1)), modulo S: the directed exponential
graph.  Assran, Loizou, Ballas, Rabbat 2019, "Stochastic Gradient Push for Distributed Deep Learning" (ICML),
algorithm 1.  With overlap = true the halves travel while the gradient is computed (their OSGP, with a delay
of one turn that is waited for): x <- x_i / 2 - eta g(x_i) + x_j / 2.  The readout is the sum of all x divided
by the sum of all w.  With one shard it is plain SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.solvers.gossip import GossipCentre, GossipModel, GossipSettings
from sparksgd.solvers.protocol import Gradient, HalfState, Message, Settings, Vector
from sparksgd.solvers.rules import Experiment

__all__ = ["GradientPush", "GradientPushSettings", "PushSum"]


@dataclass(frozen=True, kw_only=True)
class GradientPushSettings(GossipSettings):
    """The keys of solver.name = "gradient_push"."""

    overlap: bool = False
    """Whether a message travels while the gradient of its turn is computed.  It lacks that gradient then."""


class PushSum(GossipModel):
    """The worker half: a model, and its weight.

    Args:
        flat: a module of the run's shapes.
        shard: the shard that it belongs to.
        is_alone: whether there is no other shard.
        overlap: whether it sends before its gradient.
        inside: see `GossipModel`.
    """

    def __init__(self, flat: FlatModule, shard: int, *, is_alone: bool, overlap: bool, **inside: Any) -> None:
        super().__init__(flat, shard, **inside)
        self.lag, self._is_alone = int(overlap), is_alone
        self._weight = 1.0

    @property
    def share(self) -> tuple[Vector, float]:
        """Return x and w."""
        return self.model.numpy(), self._weight

    def point(self) -> Vector:
        """Return z = x / w."""
        model = self.model.numpy()
        debiased: Vector = model / np.asarray(self._weight, model.dtype)
        return debiased

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Step along the gradient at z."""
        super().turn(gradient, settings)
        self._step()

    def send(self) -> Message | None:
        """Return half of the model, and keep the other half."""
        if self._is_alone:
            return None
        self.model.div_(2)
        self._weight /= 2
        return self._message({"model": self.model.numpy().copy()}, weight=self._weight)

    def take(self, taken: Mapping[int, Message]) -> None:
        """Add what the peers have sent, in their order."""
        for _, message in sorted(taken.items()):
            self.model.add_(torch.from_numpy(message.vectors["model"]))
            self._weight += message.scalars["weight"]

    def state(self) -> HalfState:
        """Return its model and weight, and what its optimiser keeps."""
        return {**super().state(), "weight": np.asarray(self._weight)}

    def load_state(self, state: HalfState) -> None:
        """Continue from the state of another half of the same shard, after a turn."""
        kept = dict(state)
        self._weight = float(kept.pop("weight"))
        super().load_state(kept)


class GradientPush(GossipCentre):
    """The directed exponential graph, and the mean of all models by their weights.

    Args:
        flat: the module, which has the readout.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
        took_part: of a run that is replayed.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: GradientPushSettings,
        experiment: Experiment,
        took_part: Sequence[frozenset[int]] | None = None,
    ) -> None:
        make = partial(
            PushSum,
            is_alone=experiment.num_shards == 1,
            overlap=settings.overlap,
            clip_norm=settings.clip_norm,
            optimizer=experiment.optimizer,
            seed=experiment.seed,
        )
        super().__init__(flat, settings, experiment, make, took_part)

    def peers(self, turn: int, shard: int) -> Sequence[int]:
        """Return the one shard that a shard sends to in a turn."""
        distances = (self.num_shards - 1).bit_length()
        return [(shard + (1 << turn % distances)) % self.num_shards] if distances else []
