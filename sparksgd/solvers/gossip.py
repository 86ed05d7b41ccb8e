"""Gossip: every shard has a model of its own, and sends messages to a few others in every turn.

    lag 0    gradient; the half moves; it sends; it takes what its peers have sent in this turn
    lag 1    it sends; gradient; the half moves; it takes what its peers have sent in this turn:
             the exchange runs beside the computing

Slow shards are waited for, so nothing here is chance: the bits do not depend on times, workers or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sparksgd.arithmetic.flat import FlatModule, FlatStrip, Weights
from sparksgd.config import Config, OptimizerConfig
from sparksgd.solvers.arrival_centre import refuse_changes
from sparksgd.solvers.centre import OfModels
from sparksgd.solvers.local_model import LocalModel
from sparksgd.solvers.protocol import (
    Answer,
    CentralSolver,
    Gradient,
    HalfState,
    Message,
    Need,
    Settings,
    StepOutcome,
    Vector,
    WorkerHalf,
)
from sparksgd.solvers.rules import Experiment, require_at_least

__all__ = ["GossipCentre", "GossipHalf", "GossipModel", "GossipSettings", "GossipSolver"]


class GossipHalf(WorkerHalf[Mapping[int, Message]], Protocol):
    """The worker half of a gossip solver."""

    def begin(self, weights: Weights) -> None:
        """Begin at the weights that all shards begin from."""
        ...

    @property
    def share(self) -> tuple[Vector, float]:
        """Return its model, float32[P], a view, and the weight of it: its share of the readout."""
        ...


class GossipSolver(CentralSolver, Protocol):
    """What all shards share if messages go from shard to shard: the graph, and the readout."""

    def peers(self, turn: int, shard: int) -> Sequence[int]:
        """Return the shards that a shard's message of a turn is sent to."""
        ...

    def answer(self) -> Answer:
        """Return the weights that a run begins from, and the settings of the next turn."""
        ...

    def turned(self, shares: Iterable[tuple[Vector, float]], total: Message) -> StepOutcome:
        """Take the shares of all shards after a turn, in their order, and the sum of its rows and losses."""
        ...


@dataclass(frozen=True, kw_only=True)
class GossipSettings:
    """The keys of every rule of gossip."""

    clip_norm: float | None = None
    """The largest Euclidean norm of a gradient that an optimiser takes.  If not set, gradients are not
    clipped."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration."""
        require_at_least("solver.clip_norm", self.clip_norm, 0, above=True)

    def needs(self) -> frozenset[Need]:
        """Return what the engine must carry."""
        return frozenset({Need.GOSSIP, Need.SHARD_STATE})


class GossipModel:
    """A worker half's model, and the optimiser that moves it.  A rule is a subclass.

    Args:
        flat: a module of the run's shapes.
        shard: the shard that it belongs to.
        clip_norm: the largest norm of a gradient; None: none is clipped.
        optimizer: which class of torch.optim, and its arguments.
        seed: of the run.
    """

    lag = 0

    def __init__(
        self,
        flat: FlatModule,
        shard: int,
        *,
        clip_norm: float | None,
        optimizer: OptimizerConfig,
        seed: int,
    ) -> None:
        self._shard = shard
        self._local = LocalModel(flat, optimizer, seed, clip_norm)
        self._gradient: tuple[Gradient, Settings] | None = None

    @property
    def model(self) -> torch.Tensor:
        """The model's parameters, float32[P]."""
        return self._local.parameters

    def begin(self, weights: Weights) -> None:
        """Begin at the weights that all shards begin from."""
        self.model.copy_(torch.from_numpy(weights.parameters))

    @property
    def share(self) -> tuple[Vector, float]:
        """Return the model, and weight 1."""
        return self.model.numpy(), 1.0

    def point(self) -> Vector:
        """Return the model."""
        return self.model.numpy()

    def turn(self, gradient: Gradient, settings: Settings) -> None:
        """Keep the gradient; a rule says when the optimiser steps along it."""
        refuse_changes(gradient.changes)
        self._gradient = gradient, settings

    def _step(self) -> None:
        """Let the optimiser step along the gradient of the turn, if its piece had rows.

        Raises:
            UpdateNotFinite: a parameter became NaN or infinite.
        """
        given, self._gradient = self._gradient, None
        if given is not None:
            self._local.step(*given)

    def _message(self, vectors: dict[str, Vector], **scalars: float) -> Message:
        return Message(
            vectors=vectors,
            scalars=scalars,
            statistics=np.empty(0, np.float32),
            counters=np.empty(0, np.int64),
            loss=0.0,
            rows=0,
        )

    def state(self) -> HalfState:
        """Return its model, and what its optimiser keeps."""
        return {"model": self.model.numpy(), **self._local.kept()}

    def load_state(self, state: HalfState) -> None:
        """Continue from the state of another half of the same shard, after a turn."""
        kept = dict(state)
        self.model.copy_(torch.from_numpy(kept.pop("model")))
        self._local.load_kept(kept)


class GossipCentre(OfModels):
    """The readout of all shards' models, after every turn.  A rule is a subclass that defines `peers`.

    Args:
        flat: the module, which has the readout.
        settings: the rule's keys.
        experiment: has the optimiser, the schedule, and how long they are used.
        make: makes the worker half of a shard.
        took_part: of a run that is replayed; every turn is made by all shards.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        settings: GossipSettings,
        experiment: Experiment,
        make: Callable[[FlatModule, int], WorkerHalf[Any]],
        took_part: Sequence[frozenset[int]] | None,
    ) -> None:
        super().__init__(flat, experiment, settings.needs(), make, took_part)
        self.num_shards = experiment.num_shards

    def turns_at(self, turn: int) -> int:
        """Return 1: every turn is a step."""
        return 1

    def answer(self) -> Answer:
        """Return the mean model, and the settings of the next turn."""
        return Answer(weights=self.readout(), turn=self.turns, settings=(self._rates.now,))

    def turned(self, shares: Iterable[tuple[Vector, float]], total: Message) -> StepOutcome:
        """Read the mean model out.

        Raises:
            UpdateNotFinite: a parameter of it is NaN or infinite.
        """
        lr, mean = self._rates.lr, _mean(shares)
        with self._centre.changing(), self._centre.step(total, 1, "optimizer.lr", lr):
            self.flat.parameters.copy_(torch.from_numpy(mean))
        self._rates.move(1)
        return StepOutcome(lr=lr, gradient_norm=None)


def _mean(shares: Iterable[tuple[Vector, float]]) -> Vector:
    """Return the mean of the models by their weights, added in the order of the shards."""
    total, weight = None, 0.0
    for model, own in shares:
        total = model.copy() if total is None else total + model
        weight += own
    assert total is not None
    mean: Vector = total / np.asarray(weight, total.dtype)
    return mean
