"""Runs that evaluations, observers or the time end, and the weights that they end with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resumed_jobs import EVERY_STEP, Jobs, Stops, made_jobs

import sparksgd
from sparksgd.config import EarlyStoppingConfig
from sparksgd.errors import ConfigError, DataError
from sparksgd.runs.replay import read_replay
from sparksgd.training import checkpoint
from sparksgd.training.early_stopping import best_of, why_over
from sparksgd.training.history import COLUMNS, History
from sparksgd.training.state import EvaluationReport, Observer, Training

NAN = float("nan")
OVERFITS = {
    "data": {"validation_fraction": 0.3},
    "optimizer": {"name": "Adam", "lr": 0.2},
    "train": {"epochs": 60, "rows_per_step": 20},
    "early_stopping": {"patience": 2},
}
KEPT_EACH = {"checkpoint": {"every_steps": 1, "keep": 1000}}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("early"))


def config_of(jobs: Jobs, *tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config = jobs.config(OVERFITS, *tables)
    del config["data"]["train"], config["data"]["test"]
    config["model"] = {"name": "torch.nn:Linear", "in_features": 4, "out_features": 2}
    return config


def rows_of(jobs: Jobs) -> str:
    return str(jobs.folder / "rows.parquet")


def evaluations(losses: Sequence[float]) -> list[EvaluationReport]:
    return [
        EvaluationReport(step=5 * n, turn=5 * n, epoch=n, loss=loss, accuracy=-loss, rows=9, time_s=0.0)
        for n, loss in enumerate(losses, 1)
    ]


# Judging


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "best", "is_over"),
    [
        ([], 1, 0.0, None, False),
        ([3.0], 1, 0.0, 1, False),
        ([3.0, 2.0, 2.0], 1, 0.0, 2, True),
        ([3.0, 2.0, 2.5], 2, 0.0, 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, 0.0, 2, True),
        ([3.0, 2.95, 2.92], 2, 0.1, 1, True),
        ([3.0, 2.95, 2.8], 2, 0.1, 3, False),
        ([NAN, 3.0], 1, 0.0, 2, False),
        ([3.0, NAN], 1, 0.0, 1, True),
        ([NAN, NAN], 2, 0.0, None, True),
        ([float("inf"), 5.0], 1, 0.0, 2, False),
        ([5.0, float("inf")], 1, 0.0, 1, True),
    ],
)
def test_the_best_evaluation_is_found_and_patience_ends(
    losses: list[float], patience: int, min_delta: float, best: int | None, is_over: bool
) -> None:
    found = evaluations(losses)
    for metric in ("loss", "accuracy"):  # the accuracy here is the loss with the other sign
        config = EarlyStoppingConfig(patience=patience, min_delta=min_delta, metric=metric)  # type: ignore[arg-type]  # both are
        assert best_of(config, found) is (None if best is None else found[best - 1])
        assert (why_over(config, found) is not None) == is_over


@given(st.lists(st.floats(allow_infinity=False), max_size=12), st.integers(1, 4))
def test_a_run_ends_the_first_time_that_patience_is_over(losses: list[float], patience: int) -> None:
    config, found = EarlyStoppingConfig(patience=patience), evaluations(losses)
    numbers = [loss for loss in losses if loss == loss]
    best = best_of(config, found)
    assert (None if best is None else best.loss) == min(numbers, default=None)
    later = len(losses) - (0 if best is None else best.epoch)
    assert (why_over(config, found) is not None) == (later >= patience)
    assert why_over(EarlyStoppingConfig(), found) is None


# Runs


def test_a_run_ends_early_with_the_weights_of_its_best_evaluation(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs)
    training = sparksgd.train(config, rows_of(jobs), out=tmp_path)
    losses = [report.loss for report in training.evaluations]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 1 + 2 < 60
    assert training.is_finished
    assert training.stopped_by == "early_stopping"
    assert training.best is training.evaluations[best] is training.last_evaluation
    # The same as a run that was asked for no more steps than the best one.
    shorter = config_of(jobs, {"train": {"steps": training.best.step}})
    until_best = sparksgd.train(shorter, rows_of(jobs))
    assert until_best.stopped_by is None
    assert training.flat.parameters_sha256() == until_best.flat.parameters_sha256()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["stopped_by"] == "early_stopping"
    assert summary["best_step"] == training.best.step < summary["steps"] == training.version
    assert summary["test_loss"] == losses[best]
    assert summary["parameters_sha256"] == until_best.flat.parameters_sha256()
    saved = sparksgd.load_model(tmp_path / "model", trust=["torch"])
    assert torch.equal(saved.module.weight, training.module.weight)
    assert saved.about["version"] == training.best.step


def test_the_weights_of_the_last_step_stay_where_that_is_asked_for(jobs: Jobs) -> None:
    kept = sparksgd.train(config_of(jobs), rows_of(jobs))
    last = sparksgd.train(config_of(jobs, {"early_stopping": {"keep_best": False}}), rows_of(jobs))
    assert last.version == kept.version
    assert last.best is None
    assert last.flat.parameters_sha256() != kept.flat.parameters_sha256()
    assert last.last_evaluation is last.evaluations[-1]


def test_a_run_that_is_not_ended_early_has_its_best_weights_too(jobs: Jobs) -> None:
    epochs = len(sparksgd.train(config_of(jobs), rows_of(jobs)).evaluations)
    config = config_of(jobs, {"train": {"epochs": epochs}, "early_stopping": {"patience": 1000}})
    training = sparksgd.train(config, rows_of(jobs))
    assert training.stopped_by is None
    assert training.is_finished
    assert training.turns == training.total_turns
    assert training.best is not None
    assert training.best.loss == min(report.loss for report in training.evaluations)
    assert training.best.step < training.version


def test_patience_counts_evaluations_of_eval_every(jobs: Jobs) -> None:
    training = sparksgd.train(config_of(jobs, {"train": {"eval_every": 3}}), rows_of(jobs))
    assert [report.turn % 3 for report in training.evaluations] == [0] * len(training.evaluations)
    assert training.stopped_by == "early_stopping"


@pytest.mark.usefixtures("every_checkpoint")
def test_a_run_that_is_stopped_and_goes_on_ends_at_the_same_step(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, KEPT_EACH)
    whole = sparksgd.train(config, rows_of(jobs))
    assert whole.best is not None
    for number, step in enumerate((2, whole.best.step + 1, whole.version)):
        out = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows_of(jobs), out=out, observers=[Stops(step)])
        again = sparksgd.train(config, rows_of(jobs), out=out, resume_from=out)
        assert again.resumed
        assert (again.version, again.stopped_by) == (whole.version, "early_stopping")
        assert again.best is not None
        assert again.best.step == whole.best.step
        assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
        third = sparksgd.train(config, rows_of(jobs), out=out, resume_from=out)
        assert third.version == whole.version  # no step is made
        assert len(third.step_times) == 0
        assert third.flat.parameters_sha256() == whole.flat.parameters_sha256()


@pytest.mark.usefixtures("every_checkpoint")
def test_other_rows_to_evaluate_on_are_refused_where_they_decide(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, EVERY_STEP)
    del config["data"]["validation_fraction"]
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows_of(jobs), rows_of(jobs), out=tmp_path, observers=[Stops(8)])
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(rows_of(jobs)).slice(0, 50), other)
    with pytest.raises(ConfigError, match=r"the files of data\.test are different ones"):
        sparksgd.train(config, rows_of(jobs), str(other), out=tmp_path, resume_from=tmp_path)
    config["train"]["eval_every"] = 3
    with pytest.raises(ConfigError, match=r"train\.eval_every is 3, but was"):
        sparksgd.train(config, rows_of(jobs), rows_of(jobs), out=tmp_path, resume_from=tmp_path)


@pytest.mark.usefixtures("every_checkpoint")
def test_a_checkpoint_without_the_best_weights_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, KEPT_EACH)
    whole = sparksgd.train(config, rows_of(jobs))
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[Stops(whole.version)])
    real = checkpoint.taken

    def without(*given: Any) -> Any:
        made = real(*given)
        parts = {name: part for name, part in made.parts.items() if name != "best"}
        return type(made)(step=made.step, turns=made.turns, parts=parts, test_loss=made.test_loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparksgd.training.checkpointing.taken", without)
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows_of(jobs), out=tmp_path / "b", observers=[Stops(whole.version)])
    with pytest.raises(DataError, match="has no part 'best'"):
        sparksgd.train(config, rows_of(jobs), out=tmp_path / "b", resume_from=tmp_path / "b")


def test_a_module_given_in_python_ends_with_its_best_weights(jobs: Jobs) -> None:
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    training = sparksgd.train(config_of(jobs), rows_of(jobs), module=module)
    assert training.best is not None
    assert training.stopped_by == "early_stopping"
    norm = module[1]
    assert isinstance(norm, torch.nn.BatchNorm1d)
    assert int(norm.num_batches_tracked) == training.best.step  # buffers are those of the best step, too


def test_a_replay_ends_early_at_the_same_parameters(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs)
    whole = sparksgd.train(config, rows_of(jobs), out=tmp_path)
    replay = read_replay(tmp_path, trust=["torch"])
    again = sparksgd.train(config, rows_of(jobs), replay=replay)
    assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()


# What is refused


def test_early_stopping_needs_rows_to_evaluate_on_and_a_metric_that_they_have(jobs: Jobs) -> None:
    config = config_of(jobs)
    del config["data"]["validation_fraction"]
    with pytest.raises(
        ConfigError, match=r"patience is set, but there are no rows to evaluate on: set data\.val"
    ):
        sparksgd.train(config, rows_of(jobs))
    config = config_of(jobs, {"early_stopping": {"metric": "accuracy"}})
    config["loss"] = {"name": "squared_error"}
    config["model"]["out_features"] = 1
    with pytest.raises(
        ConfigError, match=r"by the accuracy, but the loss has no classes: set early_stopping\.metric=loss"
    ):
        sparksgd.train(config, rows_of(jobs))


# Observers and time


class Asks(Observer):
    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, training: Training, report: Any) -> None:
        if report.step == self._step:
            training.stop("good enough")


def test_an_observer_ends_a_run_which_is_finished_then(jobs: Jobs, tmp_path: Path) -> None:
    training = sparksgd.train(
        config_of(jobs, {"early_stopping": {"patience": None}}), rows_of(jobs), out=tmp_path,
        observers=[Asks(7)],
    )  # fmt: skip
    assert training.version == 7
    assert training.is_finished
    assert json.loads((tmp_path / "summary.json").read_text())["stopped_by"] == "good enough"
    assert sparksgd.load_model(tmp_path / "model", trust=["torch"]).about["finished"]


@pytest.mark.usefixtures("every_checkpoint")
def test_a_run_whose_time_is_over_is_saved_and_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    def config(**limit: Any) -> dict[str, Any]:
        return config_of(jobs, {"train": {"epochs": 3, **limit}, "early_stopping": {"patience": None}})

    whole = sparksgd.train(config(), rows_of(jobs))
    for step in range(1, whole.version):
        training = sparksgd.train(
            config(max_wall_s=0), rows_of(jobs), out=tmp_path,
            **({"resume_from": tmp_path} if step > 1 else {}),
        )  # fmt: skip
        assert training.stopped_by == "train.max_wall_s"
        assert not training.is_finished
        assert training.version == step
        assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"
    last = sparksgd.train(config(), rows_of(jobs), out=tmp_path, resume_from=tmp_path)
    assert last.is_finished
    assert last.flat.parameters_sha256() == whole.flat.parameters_sha256()


# Histories


def test_a_history_has_a_row_for_each_evaluation_and_each_epoch(jobs: Jobs) -> None:
    history = History()
    table = {"train": {"epochs": 3, "eval_every": 3}, "early_stopping": {"patience": None}}
    training = sparksgd.train(config_of(jobs, table), rows_of(jobs), observers=[history])
    per_epoch = training.plan.sampling.turns_per_epoch
    evaluated = {report.step: report for report in training.evaluations}
    assert [row["step"] for row in history.rows] == sorted(
        {*evaluated, *(per_epoch * n for n in range(1, 4))}
    )
    for row in history.rows:
        report = evaluated.get(row["step"])
        assert row["test_loss"] == (None if report is None else report.loss)
        assert row["test_accuracy"] == (None if report is None else report.accuracy)
        assert row["epoch"] == -(-row["step"] // per_epoch)
        assert row["lr"] == 0.2
        assert row.keys() == COLUMNS.keys()


def test_the_losses_of_a_history_are_means_over_rows(jobs: Jobs) -> None:
    history, steps = History(), []

    class Steps(Observer):
        def stepped(self, training: Training, report: Any) -> None:
            steps.append((report.loss, report.rows))

    table = {"train": {"epochs": 2}, "early_stopping": {"patience": None}}
    config = config_of(jobs, table)
    del config["data"]["validation_fraction"]
    training = sparksgd.train(config, rows_of(jobs), observers=[history, Steps()])
    per_epoch = training.plan.sampling.turns_per_epoch
    for row, part in zip(history.rows, (steps[:per_epoch], steps[per_epoch:]), strict=True):
        assert row["loss"] == pytest.approx(
            sum(loss * rows for loss, rows in part) / sum(rows for _, rows in part), rel=1e-12
        )


@pytest.mark.usefixtures("every_checkpoint")
def test_a_history_goes_on_with_its_run(jobs: Jobs, tmp_path: Path) -> None:
    config, whole, first, second = config_of(jobs, KEPT_EACH), History(), History(), History()
    sparksgd.train(config, rows_of(jobs), observers=[whole])
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[first, Stops(9)])
    sparksgd.train(
        config, rows_of(jobs), out=tmp_path, resume_from=tmp_path, observers=[second, Stops(10**6)]
    )
    assert second.rows == whole.rows


# A schedule that evaluations move


def plateau(jobs: Jobs, **arguments: Any) -> dict[str, Any]:
    schedule = {"name": "ReduceLROnPlateau", "factor": 0.5, "patience": 0, "threshold": 0.01, **arguments}
    return config_of(jobs, {"schedule": schedule, "early_stopping": {"patience": None}}, KEPT_EACH)


class Rates(Observer):
    """Notes the rate of each step, and each evaluation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def stepped(self, training: Training, report: Any) -> None:
        self.seen.append(("rate", report.lr))

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        self.seen.append(("loss", report.loss))
        self.accuracy = report.accuracy


@pytest.mark.parametrize("arguments", [{}, {"patience": 2, "cooldown": 1}, {"min_lr": 0.09}])
def test_a_plateau_lowers_the_rate_as_in_plain_torch(jobs: Jobs, arguments: dict[str, Any]) -> None:
    rates = Rates()
    sparksgd.train(plateau(jobs, **arguments), rows_of(jobs), observers=[rates])
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, **{"factor": 0.5, "patience": 0, "threshold": 0.01, **arguments}
    )
    for what, value in rates.seen:
        if what == "rate":
            assert value == optimizer.param_groups[0]["lr"]
        else:
            schedule.step(value)
    assert optimizer.param_groups[0]["lr"] < 0.2


def test_a_plateau_of_mode_max_judges_by_the_accuracy(jobs: Jobs) -> None:
    rates = Rates()
    training = sparksgd.train(plateau(jobs, mode="max"), rows_of(jobs), observers=[rates])
    accuracies = [report.accuracy for report in training.evaluations]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=0, threshold=0.01
    )
    for accuracy in accuracies[:-1]:
        assert accuracy is not None
        schedule.step(accuracy)
    assert [value for what, value in rates.seen if what == "rate"][-1] == optimizer.param_groups[0]["lr"]


@pytest.mark.usefixtures("every_checkpoint")
def test_a_run_with_a_plateau_goes_on_to_the_same_bits(jobs: Jobs, tmp_path: Path) -> None:
    config = plateau(jobs)
    config["train"]["epochs"] = 12
    whole = sparksgd.train(config, rows_of(jobs))
    for step in (4, 7, 20, whole.version):
        out = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows_of(jobs), out=out, observers=[Stops(step)])
        again = sparksgd.train(config, rows_of(jobs), out=out, resume_from=out)
        assert again.resumed
        assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
    config["train"]["eval_every"] = 2
    with pytest.raises(ConfigError, match=r"train\.eval_every is 2, but was"):
        sparksgd.train(config, rows_of(jobs), out=out, resume_from=out)
