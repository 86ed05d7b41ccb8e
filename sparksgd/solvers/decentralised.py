"""Decentralised SGD (D-PSGD): every shard averages its model with those of its neighbours on a ring.

    x_i <- optimiser(sum over j of W_ij x_j, g(x_i))          W: 1/3 for a shard and its two neighbours

The gradient is taken at the model before the averaging, so both run at the same time.  Lian, Zhang, Zhang,
Hsieh, Zhang, Liu 2017, "Can Decentralized Algorithms Outperform Centralized Algorithms?" (NeurIPS), algorithm
1.  Two shards have weights of 1/2.  With one shard it is plain SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.solvers.gossip import GossipCentre, GossipModel, GossipSettings
from sparksgd.solvers.protocol import Message
from sparksgd.solvers.rules import Experiment

__all__ = ["Decentralised", "DecentralisedSettings", "RingModel"]


@dataclass(frozen=True, kw_only=True)
class DecentralisedSettings(GossipSettings):
    """The keys of solver.name = "decentralised"."""


class RingModel(GossipModel):
    """The worker half: it sends its model, and averages when those of its neighbours have come."""

    lag = 1

    def send(self) -> Message | None:
        """Return the model as it is before this turn's step."""
        return self._message({"model": self.model.numpy().copy()})

    def take(self, taken: Mapping[int, Message]) -> None:
        """Average with the neighbours, in the order of their numbers; then step."""
        models = {self._shard: self.model.clone()}
        models |= {shard: torch.from_numpy(message.vectors["model"]) for shard, message in taken.items()}
        first, *others = [model for _, model in sorted(models.items())]
        total = first.clone()
        for model in others:
            total += model
        torch.div(total, len(models), out=self.model)
        self._step()


class Decentralised(GossipCentre):
    """The ring, and the mean of all models.

    Args:
        flat: the module, which has the readout.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
        took_part: of a run that is replayed.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: DecentralisedSettings,
        experiment: Experiment,
        took_part: Sequence[frozenset[int]] | None = None,
    ) -> None:
        inside: dict[str, Any] = {
            "clip_norm": settings.clip_norm,
            "optimizer": experiment.optimizer,
            "seed": experiment.seed,
        }
        super().__init__(flat, settings, experiment, partial(RingModel, **inside), took_part)

    def peers(self, turn: int, shard: int) -> Sequence[int]:
        """Return a shard's neighbours on the ring."""
        count = self.num_shards
        return sorted({(shard - 1) % count, (shard + 1) % count} - {shard})
