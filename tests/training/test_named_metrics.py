"""Metrics of a run: told, judged by, kept in checkpoints, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from judged_runs import KEPT_EACH, config_of, rows_of
from resumed_jobs import Jobs, Stops, made_jobs, without_turns_of_shards

import sparksgd
from sparksgd.errors import ConfigError, DataError
from sparksgd.training import checkpoint
from sparksgd.training.history import History, check_history

ASKED = {"train": {"metrics": ["f1", "top_1", "log_loss"]}}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("metrics"))


def test_a_run_tells_what_it_is_asked_for(jobs: Jobs, tmp_path: Path) -> None:
    config, history = config_of(jobs, ASKED), History()
    config["early_stopping"] = {}
    config["train"]["epochs"] = 3
    training = sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[history])
    last = training.evaluations[-1]
    assert list(last.metrics) == ["f1", "top_1", "log_loss"]
    assert last.metrics["top_1"] == last.accuracy
    assert last.metrics["log_loss"] == pytest.approx(last.loss, rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "evaluation"][-1]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for place in (told, summary, history.rows[-1]):
        assert place["test_f1"] == last.metrics["f1"]
    plain = sparksgd.train(
        {**config, "train": {**config["train"], "metrics": []}}, rows_of(jobs)
    )  # metrics shape nothing
    assert plain.flat.parameters_sha256() == training.flat.parameters_sha256()
    assert plain.evaluations[-1].metrics == {}


@pytest.mark.parametrize("metric", ["f1_macro", "log_loss"])
def test_a_metric_ends_a_run_at_its_best_value(jobs: Jobs, metric: str) -> None:
    config = config_of(jobs, {"early_stopping": {"patience": 2, "metric": metric}})
    training = sparksgd.train(config, rows_of(jobs))
    values = [report.metrics[metric] for report in training.evaluations]
    best = (min if metric == "log_loss" else max)(values)
    assert training.stopped_by == "early_stopping"
    assert training.restored is not None
    assert training.restored.metrics[metric] == best
    assert values.index(best) == len(values) - 3


@pytest.mark.usefixtures("every_checkpoint")
def test_a_run_goes_on_with_its_metrics(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, KEPT_EACH, {"early_stopping": {"patience": 3, "metric": "f1_macro"}})
    steady = sparksgd.train(config, rows_of(jobs))
    stop = steady.evaluations[len(steady.evaluations) // 2].step + 1
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[Stops(stop)])
    again = sparksgd.train(config, rows_of(jobs), out=tmp_path, resume_from=tmp_path)
    assert again.resumed
    assert [report.metrics for report in again.evaluations] == [r.metrics for r in steady.evaluations]
    assert again.flat.parameters_sha256() == steady.flat.parameters_sha256()


def test_a_checkpoint_without_metrics_is_still_read(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_checkpoint: None
) -> None:
    config = config_of(jobs, KEPT_EACH)

    def of_before(training: Any) -> dict[str, Any]:
        values = of_now(training)
        for report in values["evaluations"]:
            del report["metrics"]
        return without_turns_of_shards(values)

    of_now = checkpoint._of_run
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_of_run", of_before)
        patch.setitem(checkpoint._VERSIONS, "run", 3)
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[Stops(9)])
    again = sparksgd.train(config, rows_of(jobs), out=tmp_path, resume_from=tmp_path)
    assert again.resumed
    assert again.flat.parameters_sha256() == sparksgd.train(config, rows_of(jobs)).flat.parameters_sha256()


def test_what_a_run_cannot_tell_is_refused_before_rows_are_read(jobs: Jobs) -> None:
    for tables, says in (
        ({"train": {"metrics": ["rmse"]}}, "names 'rmse', but the loss is one whose kind is 'classes'"),
        ({"early_stopping": {"metric": "f2"}}, "names 'f2', which is no metric"),
        (
            {"data": {"validation_fraction": None}, "train": {"metrics": ["f1"]}},
            "but there are no rows to ev",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            sparksgd.train(config_of(jobs, tables), rows_of(jobs), module=torch.nn.Linear(4, 2))  # type: ignore[arg-type]  # of tables


def test_a_history_may_have_a_metric_that_is_no_number() -> None:
    row = {"epoch": 1, "step": 5, "loss": 0.5, "lr": 0.1, "test_loss": None, "test_accuracy": None}
    check_history([row, {**row, "test_rmse": None}, {**row, "test_rmse": 0.5}], "history")
    for wrong in ({**row, "test_rmse": "0.5"}, {**row, "rmse": 0.5}, {"epoch": 1}):
        with pytest.raises(DataError):
            check_history([wrong], "history")
