"""A job's callbacks, and the status of a run that its time has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jobs_in_process import Done, run_job
from resumed_jobs import Jobs, made_jobs

from sparksgd.training.state import EvaluationReport, Observer, Training


class Ends(Observer):
    """Ends a run at its second evaluation."""

    seen = 0

    def memory(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def recall(self, memory: dict[str, Any]) -> None:
        self.seen = memory["seen"]

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        self.seen += 1
        if self.seen == 2:
            training.stop("two evaluations")


class Counts(Ends):
    """Remembers under the same keys as Ends."""

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        self.seen += 100


class Fails(Observer):
    def started(self, training: Training) -> None:
        raise ValueError("no such server")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("callbacks"))


def ran(jobs: Jobs, out: Path, *words: str) -> Done:
    settings = [
        f"data.train={jobs.folder / 'rows.parquet'}", "model.name=torch.nn:Linear", "model.in_features=4",
        "model.out_features=2", "engine.name=inline", "train.epochs=5", "train.rows_per_step=20",
        "train.num_shards=2", "data.validation_fraction=0.3",
    ]  # fmt: skip
    chosen = [word for setting in settings for word in ("--set", setting)]
    return run_job("train.py", *chosen, "--out", str(out), *words)


def status(jobs: Jobs, out: Path, *words: str) -> int:
    return ran(jobs, out, *words).returncode


def summary_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_a_callback_ends_a_job_which_is_finished_then(jobs: Jobs, tmp_path: Path) -> None:
    assert status(jobs, tmp_path, "--callback", f"{__name__}:Ends") == 0
    found = summary_of(tmp_path)
    assert (found["status"], found["stopped_by"], found["epochs"]) == ("finished", "two evaluations", 2)
    assert status(jobs, tmp_path, "--callback", f"{__name__}:Ends") == 0  # nothing to do
    assert summary_of(tmp_path) == found


def test_what_a_callback_raises_is_told_as_its_error(jobs: Jobs, tmp_path: Path) -> None:
    done = ran(jobs, tmp_path, "--callback", f"{__name__}:Fails")
    assert done.returncode == 3
    assert f"error: the callback {__name__}:Fails raised ValueError: no such server" in done.stdout


def test_each_callback_gets_back_what_it_remembers_itself(jobs: Jobs, tmp_path: Path) -> None:
    over = ("--set", "train.max_wall_s=0", "--set", "train.eval_every=1")
    one, other = (("--callback", f"{__name__}:{name}") for name in ("Ends", "Counts"))
    assert status(jobs, tmp_path, *over, *one, *other) == 0
    assert summary_of(tmp_path)["status"] == "stopped"
    assert status(jobs, tmp_path, *over, *other, *one) == 0  # in another order
    found = summary_of(tmp_path)
    assert (found["steps"], found["stopped_by"]) == (2, "two evaluations")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere:Class", "--callback is 'nowhere:Class', but Python finds no module 'nowhere'"),
        (f"{__name__}:summary_of", "but must name a subclass of sparksgd.Observer, whose methods"),
        ("Ends", "name your own as package.module:attribute"),
    ],
)
def test_what_is_no_callback_is_refused(jobs: Jobs, tmp_path: Path, name: str, told: str) -> None:
    done = ran(jobs, tmp_path, "--callback", name)
    assert done.returncode == 2
    assert told in done.stdout
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_job_whose_time_is_over_has_the_status_that_is_asked_for(jobs: Jobs, tmp_path: Path) -> None:
    over = ("--set", "train.max_wall_s=0")
    assert status(jobs, tmp_path, *over) == 0
    assert summary_of(tmp_path)["stopped_by"] == "train.max_wall_s"
    assert status(jobs, tmp_path, *over, "--status-when-stopped", "75") == 75
    assert summary_of(tmp_path)["steps"] == 2  # it went on
    assert (tmp_path / "model" / "model.json").exists()
    assert status(jobs, tmp_path, "--status-when-stopped", "75") == 0
    whole = tmp_path / "whole"
    assert status(jobs, whole) == 0
    for word in ("3", "200", "-1", "x"):
        with pytest.raises(SystemExit) as refused:
            status(jobs, tmp_path, "--status-when-stopped", word)
        assert refused.value.code == 2
    assert summary_of(whole)["parameters_sha256"] == summary_of(tmp_path)["parameters_sha256"]
    assert "stopped_by" not in summary_of(tmp_path)
