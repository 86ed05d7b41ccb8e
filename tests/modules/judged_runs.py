"""Runs on a few rows whose evaluations soon get no better."""

from __future__ import annotations

from typing import Any

from resumed_jobs import Jobs

from sparksgd.training.state import Observer, Training

OVERFITS = {
    "data": {"validation_fraction": 0.3},
    "optimizer": {"name": "Adam", "lr": 0.2},
    "train": {"epochs": 60, "rows_per_step": 20},
    "early_stopping": {"patience": 2},
}
KEPT_EACH = {"checkpoint": {"every_steps": 1, "keep": 1000}}


def config_of(jobs: Jobs, *tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config = jobs.config(OVERFITS, *tables)
    del config["data"]["train"], config["data"]["test"]
    config["model"] = {"name": "torch.nn:Linear", "in_features": 4, "out_features": 2}
    return config


def rows_of(jobs: Jobs) -> str:
    return str(jobs.folder / "rows.parquet")


class Asks(Observer):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, training: Training, report: Any) -> None:
        """Ask for the end at the step."""
        if report.step == self._step:
            training.stop("good enough")
