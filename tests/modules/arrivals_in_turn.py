"""Rules of arrivals driven by hand: which shard's message comes next is the test's to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config
from sparksgd.solvers.arrivals import ArrivalStep, Verdict
from sparksgd.solvers.protocol import Answer, Gradient
from sparksgd.solvers.rules import Experiment, completed, make_solver

__all__ = ["SHARDS", "Driven", "configured", "driven", "quadratic"]

SHARDS = 3
NONE = np.empty(0, np.float32)
TARGETS = np.array([[1, 4], [2, 3], [6, -1]], np.float32)
"""Shard s wants the parameters to be TARGETS[s]: its gradient at x is x - TARGETS[s], of one row."""


class Two(nn.Module):
    """Two parameters, both 0."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))


def quadratic(shard: int, turn: int, point: np.ndarray) -> Gradient:
    """Return the gradient of half the squared distance to the shard's target."""
    vector = point - TARGETS[shard]
    return Gradient(
        vector=vector,
        statistics=NONE,
        counters=np.empty(0, np.int64),
        loss=float((vector**2).sum() / 2),
        rows=1,
        shard=shard,
        turn=turn,
    )


def configured(rule: str, keys: dict[str, Any], optimizer: dict[str, Any], **sections: Any) -> Config:
    tables = {"solver": {"name": rule} | keys, "optimizer": optimizer, "train": {"num_shards": SHARDS}}
    return completed(Config.from_dict(tables | sections))


@dataclass
class Driven:
    """A solver with the halves of its shards; each shard computes as soon as it may, and sends when told."""

    solver: Any
    gradient: Callable[[int, int, np.ndarray], Gradient] = quadratic
    halves: dict[int, Any] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    steps: list[ArrivalStep] = field(default_factory=list)
    ignored: int = 0

    def begin(self, *shards: int) -> None:
        """Let shards begin, as new ones."""
        for shard in shards:
            self.halves[shard] = self.solver.halves.make(self.solver.flat, shard)
            self.turns.setdefault(shard, 0)
            self._give(Verdict(answers={shard: self.solver.begin(shard)}))

    @property
    def free(self) -> list[int]:
        """Return the shards that have an answer, and may compute."""
        return sorted(self.answers)

    def send(self, *shards: int) -> None:
        """Let each of these shards, one after the other, make turns until it sends a message."""
        for shard in shards:
            answer, message = self.answers.pop(shard), None
            while message is None:
                half = self.halves[shard]
                gradient = self.gradient(shard, self.turns[shard], half.point())
                half.turn(gradient, answer.settings[0])
                self.turns[shard] += 1
                message = half.send()
            self._give(self.solver.arrived(shard, message, answer.weights.version))

    def lose(self, shard: int) -> None:
        self.answers.pop(shard, None)
        self._give(self.solver.lost(shard))

    def _give(self, verdict: Verdict) -> None:
        self.steps += verdict.steps
        self.ignored += verdict.is_ignored
        for shard, answer in verdict.answers.items():
            self.halves[shard].take(answer)
            self.answers[shard] = answer

    @property
    def theta(self) -> list[float]:
        return self.solver.readout().parameters.tolist()


def driven(
    rule: str,
    keys: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    *,
    module: nn.Module | None = None,
    gradient: Callable[[int, int, np.ndarray], Gradient] = quadratic,
    shards: Sequence[int] = range(SHARDS),
    schedule: dict[str, Any] | None = None,
) -> Driven:
    """Return a rule whose shards have begun: over two parameters, with rows that have no features."""
    config = configured(rule, keys or {}, optimizer or {"name": "SGD", "lr": 0.25}, schedule=schedule or {})
    experiment = Experiment(
        optimizer=config.optimizer,
        schedule=config.schedule,
        num_shards=SHARDS,
        turns_per_epoch=4,
        total_turns=12,
        rows=4 * SHARDS,
    )
    made = Driven(make_solver(config, FlatModule(module or Two()), experiment), gradient)
    made.begin(*shards)
    return made
