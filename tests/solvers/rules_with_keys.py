"""Every rule by its name, with some keys, and what it works with; a new rule joins by adding rows to ROWS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from sparksgd.config import Config

SHARDS, EPOCH, TURNS = 3, 5, 13
"""Three shards, two epochs of five turns, and three turns of a third."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule with some keys, and what it works with."""

    rule: str
    keys: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "SGD", "lr": 0.1})
    schedule: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.rule, *(f"{key}={value}" for key, value in self.keys.items())])


MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.01}
COSINE = {"name": "CosineAnnealingLR", "T_max": TURNS}

ROWS = [
    Row(rule="synchronous", optimizer=MOMENTUM, schedule=COSINE),
    Row(rule="synchronous", keys={"clip_norm": 0.5}, optimizer=ADAM),
    Row(rule="synchronous", keys={"backup_workers": 1}, schedule={"name": "StepLR", "step_size": 4}),
    Row(rule="local_sgd", optimizer=MOMENTUM),
    Row(rule="local_sgd", keys={"turns_per_round": 1}),
    Row(
        rule="local_sgd",
        keys={"turns_per_round": 3, "outer_lr": 0.7, "outer_momentum": 0.9},
        optimizer={"name": "AdamW", "lr": 0.01},
        schedule=COSINE,
    ),
    Row(
        rule="local_sgd",
        keys={"turns_per_round": 2, "synchronous_steps": 3, "inner_state": "average"},
        optimizer=ADAM,
        schedule=COSINE,
    ),
    Row(
        rule="local_sgd",
        keys={"turns_per_round": 2, "inner_state": "keep", "clip_norm": 1.0},
        optimizer=MOMENTUM,
    ),
    Row(rule="local_sgd", keys={"synchronous_steps": 99}, optimizer=MOMENTUM),
    Row(rule="elastic_averaging", keys={"order": "together", "turns_per_exchange": 3}, optimizer=MOMENTUM),
    Row(rule="elastic_averaging", keys={"order": "together", "rho": 2.0}, schedule=COSINE),
]

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def configured(row: Row) -> Config:
    return Config.from_dict(
        {
            "solver": {"name": row.rule} | row.keys,
            "optimizer": row.optimizer,
            "schedule": row.schedule,
            "train": {"num_shards": SHARDS},
        }
    )
