"""Trainings on a few rows that are watched at every step, and their steps in a plain loop of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from engine_makers import Inline
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.shard import read_records
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def configured(solver: dict[str, Any], optimizer: dict[str, Any] | None = None, **train_keys: Any) -> Config:
    """Return the configuration of two epochs: on 61 rows, 8 turns each, whose pieces are not of one size."""
    return Config.from_dict(
        {
            "data": {"features": "x", "label": "y"},
            "loss": {"name": "squared_error"},
            "optimizer": optimizer or {"name": "SGD", "lr": 0.03},
            "solver": solver,
            "train": {"rows_per_step": 8, "num_shards": 4, "epochs": 2, "seed": 3} | train_keys,
        }
    )


class Watch(Observer):
    """Keeps the reports and parameters of every step, and when evaluations were made."""

    def __init__(self) -> None:
        self.turns: list[int] = []
        self.parameters: list[np.ndarray] = []
        self.evaluated_at: list[int] = []
        self.lr: list[float] = []

    def stepped(self, training: Training, report: Any) -> None:
        self.turns.append(report.turn)
        self.parameters.append(training.flat.parameters.numpy().copy())
        self.lr.append(report.lr)

    def evaluated(self, training: Training, report: Any) -> None:
        self.evaluated_at.append(report.turn)


def trained(
    config: Config, rows: ParquetRows, make: Callable[[], nn.Module] = net, test: ParquetRows | None = None
) -> tuple[Training, Watch, tuple[Plan, Shards]]:
    given: list[tuple[Plan, Shards]] = []

    def engine(plan: Plan, shards: Shards, test: Shards | None) -> InlineEngine:
        records = [read_records(shard, range(shard.rows), plan.schema.record) for shard in shards.table]
        given.append((plan, records))
        return InlineEngine(plan, shards, test)

    watch = Watch()
    training = train(
        config, rows=rows, test=test, make_engine=Inline(engine), module=make(), observers=[watch]
    )
    return training, watch, given[0]


def steps_of_torch(
    given: tuple[Plan, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    shards: range,
    turns: range,
    clip_norm: float | None = None,
) -> tuple[list[np.ndarray], set[tuple[bool, ...]], int]:
    """Train in a plain loop on the union of the pieces.

    Returns:
        The parameters after each turn, who was touched in any, and how many rows took part.
    """
    plan, records = given
    found, touched, count = [], set(), 0
    for turn in turns:
        union = []
        for shard in shards:
            order = plan.sampling.shuffled(shard, plan.sampling.epoch_of(turn))
            union.append(records[shard][np.sort(order[slice(*plan.sampling.piece_bounds(shard, turn))])])
        piece = np.concatenate(union)
        optimizer.zero_grad()
        output = module(torch.from_numpy(piece["x"].copy()))[:, 0]
        (output - torch.from_numpy(piece["(label)"].copy())).square().mean().backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        touched.add(tuple(parameter.grad is not None for parameter in module.parameters()))
        optimizer.step()
        count += len(piece)
        found.append(nn.utils.parameters_to_vector(module.parameters()).detach().numpy())
    return found, touched, count
