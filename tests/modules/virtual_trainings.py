"""Trainings of a small net in virtual time, on rows that are made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

import sparksgd
from sparksgd.training.replay import Replay
from sparksgd.training.state import Observer, Training

__all__ = ["ARRIVALS", "CONSTANT", "OVERLAPPED", "Steps", "net", "trained", "written"]

CONSTANT = {"turn_times": "constant", "turn_s": 1.0, "latency_s": 0.0, "link_bytes_per_s": 1e18, "job_s": 0.0}
"""A cluster where nothing but computing takes time."""

ARRIVALS: dict[str, dict[str, Any]] = {
    "async_sgd": {},
    "softsync": {"gradients_per_step": 2},
    "stale_synchronous": {"bound": 2},
    "delay_compensated": {},
    "gap_aware": {},
    "delayed_nesterov": {"turns_per_push": 3, "delay": 2},
    "elastic_averaging": {"turns_per_exchange": 3},
}

OVERLAPPED = {"name": "elastic_averaging", "turns_per_exchange": 1, "overlap": True}


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1))


def written(folder: Path, rows: int = 64) -> str:
    """Write rows of three numbers and one to learn; return the path."""
    drawn = np.random.default_rng(1)
    x = drawn.standard_normal((rows, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5], np.float32)).tolist()
    path = folder / "rows.parquet"
    pq.write_table(pa.table({"x": x.tolist(), "y": y}), path)
    return str(path)


class Steps(Observer):
    """Keeps the reports of all steps."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    def stepped(self, training: Training, report: Any) -> None:
        self.reports.append(report)


def trained(
    rows: str,
    solver: dict[str, Any],
    cluster: dict[str, Any] | None = None,
    *,
    engine: dict[str, Any] | None = None,
    out: Path | None = None,
    replay: Replay | None = None,
    test: str | None = None,
    optimizer: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    **train_keys: Any,
) -> tuple[Training, list[Any]]:
    """Train; return the run and the reports of its steps."""
    config = {
        "data": {"features": "x", "label": "y"},
        "loss": {"name": "squared_error"},
        "optimizer": optimizer or {"name": "SGD", "lr": 0.02},
        "schedule": schedule or {},
        "solver": solver,
        "engine": engine or {"name": "simulated"},
        "train": {"rows_per_step": 16, "num_shards": 4, "epochs": 2, "seed": 3} | train_keys,
        "cluster": cluster or {},
    }
    steps = Steps()
    training = sparksgd.train(config, rows, test, module=net(), observers=[steps], out=out, replay=replay)
    return training, steps.reports
