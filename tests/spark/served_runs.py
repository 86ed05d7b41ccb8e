"""Trainings on the server engine, each held to its replay, and what strikes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spark_helpers import configured  # tests/spark

import sparksgd
from sparksgd.engines.protocol import StepReport
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.replay import read_replay
from sparksgd.spark.train import train
from sparksgd.training.in_process import train_in_process
from sparksgd.training.state import Observer, Training

__all__ = ["SERVER", "Flags", "events", "flagged", "rule", "served"]

SERVER = ("engine.name=server", "optimizer.lr=0.02", "engine.num_workers=4")


class Steps(Observer):
    """Keeps the reports of all steps."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def stepped(self, training: Training, report: StepReport) -> None:
        self.reports.append(report)


def rule(name: str, **keys: Any) -> tuple[str, ...]:
    return f"solver.name={name}", *(f"solver.{key}={json.dumps(value)}" for key, value in keys.items())


def served(
    spark: Any,
    path: str,
    out: Path,
    *settings: str,
    test: str | None = None,
    observers: tuple[Observer, ...] = (),
    **given: Any,
) -> tuple[Training, list[StepReport]]:
    """Train on the server; hold the run to its replay; return it, and the reports of its steps."""
    steps = Steps()
    config = configured(*SERVER, *settings)
    test = test or path
    rows, test_rows = (spark.read.parquet(one) for one in (path, test))
    if "resume_from" in given:
        run = sparksgd.train(config, rows, test_rows, observers=[steps, *observers], out=out, **given)
    else:
        run = train(spark, config, rows, test_rows, observers=[steps, RunFolder(out), *observers], **given)
    assert run.is_finished
    again, replayed = repeated(path, test, out, *settings)
    assert again.flat.parameters_sha256() == run.flat.parameters_sha256()
    assert [e.loss for e in again.evaluations] == [e.loss for e in run.evaluations]
    made = [(r.took_part, r.staleness, r.loss) for r in steps.reports]
    assert [(r.took_part, r.staleness, r.loss) for r in replayed][-len(made) :] == made
    return run, steps.reports


def repeated(path: str, test: str, out: Path, *settings: str) -> tuple[Training, list[StepReport]]:
    """Replay a run of the server in this process."""
    steps, replay = Steps(), read_replay(out, trust=["users_modules"])
    config = configured(*SERVER, *settings, "engine.name=inline", "engine.num_workers=1")
    run = train_in_process(config, path, test, observers=[steps], replay=replay)
    return run, steps.reports


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()[1:]]


class Flags(Observer):
    """Puts a flag for a FlagNet after some steps.

    Args:
        folder: of the flags.
        of: the flag after each of these steps.
    """

    def __init__(self, folder: Path, of: dict[int, str]) -> None:
        self.folder, self.of = folder, of

    def stepped(self, training: Training, report: StepReport) -> None:
        if flag := self.of.get(report.step):
            (self.folder / flag).touch()


def flagged(flags: Path) -> tuple[str, ...]:
    return "model.name=users_modules:FlagNet", f"model.folder={flags}"
