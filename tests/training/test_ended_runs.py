"""Runs that observers, the time or evaluations end, which go on or are finished, and histories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from judged_runs import KEPT_EACH, Asks, config_of, rows_of
from resumed_jobs import Jobs, Stops, made_jobs

import sparksgd
from sparksgd.errors import ConfigError, TrainingError
from sparksgd.runs.replay import read_replay
from sparksgd.training.history import COLUMNS, History
from sparksgd.training.state import EvaluationReport, Observer, Training


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("early"))


# Going on to a later end


@pytest.mark.usefixtures("every_checkpoint")
def test_a_later_end_is_that_of_a_run_that_never_ended_before_or_refused(jobs: Jobs, tmp_path: Path) -> None:
    def config(steps: int) -> dict[str, Any]:
        return config_of(jobs, KEPT_EACH, {"train": {"steps": steps, "eval_every": 3}})

    whole = sparksgd.train(config(18), rows_of(jobs))
    for steps in (9, 10):
        out = tmp_path / str(steps)
        sparksgd.train(config(steps), rows_of(jobs), out=out)
        if steps == 9:
            again = sparksgd.train(config(18), rows_of(jobs), out=out, resume_from=out)
            assert again.resumed
            assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
        else:
            with pytest.raises(
                ConfigError, match=r"evaluated its end\. But evaluations shape its parameters"
            ):
                sparksgd.train(config(18), rows_of(jobs), out=out, resume_from=out)


@pytest.mark.usefixtures("every_checkpoint")
def test_a_run_that_an_observer_ended_is_finished_through_each_door(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, KEPT_EACH, {"early_stopping": {"patience": None}, "train": {"epochs": 4}})
    first = sparksgd.train(config, rows_of(jobs), out=tmp_path / "out", observers=[Asks(5)])
    assert first.evaluations[-1].step == 5  # its end is evaluated
    again = sparksgd.train(
        config, rows_of(jobs), out=tmp_path / "out", resume_from=tmp_path / "out", observers=[Asks(10**6)]
    )
    assert (again.version, again.stopped_by) == (5, "good enough")
    many = {"checkpoint_dir": tmp_path / "many"}
    fits = [sparksgd.train(config, rows_of(jobs), observers=[Asks(5)], **many) for _ in range(2)]
    assert [len(fit.step_times) for fit in fits] == [5, 0]
    assert {fit.flat.parameters_sha256() for fit in fits} == {first.flat.parameters_sha256()}
    longer = config_of(jobs, KEPT_EACH, {"early_stopping": {"patience": None}, "train": {"epochs": 5}})
    further = sparksgd.train(longer, rows_of(jobs), out=tmp_path / "out", resume_from=tmp_path / "out")
    assert further.stopped_by is None
    assert further.turns == further.total_turns


@pytest.mark.usefixtures("every_checkpoint")
def test_a_run_out_of_time_has_its_best_weights_and_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    whole = sparksgd.train(config_of(jobs), rows_of(jobs))
    config, resumed = config_of(jobs, {"train": {"max_wall_s": 0}}), {}
    for _ in range(7):
        training = sparksgd.train(config, rows_of(jobs), out=tmp_path, **resumed)
        assert training.is_out_of_time
        resumed = {"resume_from": tmp_path}
        losses = [report.loss for report in training.evaluations]
        assert (training.restored.loss if training.restored else None) == min(losses, default=None)
        saved = sparksgd.load_model(tmp_path / "model", trust=["torch"])
        assert saved.about["version"] == training.module_step
    training = sparksgd.train(config_of(jobs), rows_of(jobs), out=tmp_path, **resumed)
    assert training.stopped_by == "early_stopping"
    assert training.version == whole.version
    assert training.flat.parameters_sha256() == whole.flat.parameters_sha256()


@pytest.mark.parametrize("reason", ["", " ", None, ValueError("no")])
def test_a_reason_to_stop_is_a_text(jobs: Jobs, reason: Any) -> None:
    class Stopping(Observer):
        def started(self, training: Training) -> None:
            training.stop(reason)

    with pytest.raises(ConfigError, match="but must be a text that says why the run ends"):
        sparksgd.train(config_of(jobs), rows_of(jobs), observers=[Stopping()])


def test_stopping_at_the_last_turn_changes_nothing(jobs: Jobs) -> None:
    class AtTheEnd(Observer):
        def evaluated(self, training: Training, report: EvaluationReport) -> None:
            if training.turns == training.total_turns:
                training.stop("too late")

    config = config_of(jobs, {"train": {"epochs": 2}})
    assert sparksgd.train(config, rows_of(jobs), observers=[AtTheEnd()]).stopped_by is None


def test_local_sgd_ends_early_too(jobs: Jobs) -> None:
    local = {"solver": {"name": "local_sgd", "turns_per_round": 2}, "train": {"eval_every": 3}}
    training = sparksgd.train(config_of(jobs, local), rows_of(jobs))
    assert training.stopped_by == "early_stopping"
    assert training.restored is training.evaluations[-3]
    shorter = config_of(jobs, local, {"train": {"steps": training.restored.turn}})
    shorter["early_stopping"] = {"patience": 1000}
    until_best = sparksgd.train(shorter, rows_of(jobs))
    assert training.flat.parameters_sha256() == until_best.flat.parameters_sha256()


# Observers and time


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


# What a checkpoint remembers


class Remembers(Observer):
    """Remembers what no checkpoint can hold."""

    def memory(self) -> dict[str, Any]:
        return {"rates": [0.1, lambda step: step]}


@pytest.mark.usefixtures("every_checkpoint")
def test_what_a_checkpoint_cannot_hold_ends_the_checkpoints_with_a_word(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(jobs, KEPT_EACH, {"train": {"epochs": 2}})
    training = sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[Remembers()])
    assert training.is_finished
    assert "Remembers.memory().rates[1] is a function, which a checkpoint cannot hold" in caplog.text


@pytest.mark.usefixtures("every_checkpoint")
def test_a_finished_run_is_not_taken_for_one_that_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    """Early stopping may leave the weights that the module had when its run was cut by the time."""

    def fit(module: torch.nn.Module, **limit: Any) -> Training:
        first_stays_best = {"early_stopping": {"patience": 1000, "min_delta": 1e9}}
        config = config_of(jobs, {"train": {"epochs": 5, **limit}}, first_stays_best)
        return sparksgd.train(config, rows_of(jobs), module=module, checkpoint_dir=tmp_path)

    torch.manual_seed(1)
    module = torch.nn.Linear(4, 2)
    for _ in range(7):
        assert fit(module, max_wall_s=0).is_out_of_time
    assert fit(module).is_finished
    assert len(fit(module).step_times) == 15  # a warm start is another run


def test_a_module_that_diverges_ends_with_its_best_weights(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, {"train": {"eval_every": 1}, "early_stopping": {"patience": 1000}})
    config["optimizer"] = {"name": "SGD", "lr": 3e37, "momentum": 0.99}
    with pytest.raises(TrainingError):
        sparksgd.train(config, rows_of(jobs), out=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["test_loss"] for line in metrics if line["kind"] == "evaluation"}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    assert summary["best_step"] == min(known, key=known.__getitem__)
    assert summary["test_loss"] == min(known.values())
    assert sparksgd.load_model(tmp_path / "model", trust=["torch"]).about["version"] == summary["best_step"]


class Named(Observer):
    """Has a name of its own, as observers of before may have."""

    def __init__(self) -> None:
        self.name = "mine"


@pytest.mark.usefixtures("every_checkpoint")
@pytest.mark.soak
def test_a_replay_with_early_stopping_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, KEPT_EACH)
    whole = sparksgd.train(config, rows_of(jobs), out=tmp_path / "run")
    replay = read_replay(tmp_path / "run", trust=["torch"])
    for step in (4, whole.version):
        out = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows_of(jobs), replay=replay, out=out, observers=[Named(), Stops(step)])
        again = sparksgd.train(config, rows_of(jobs), replay=replay, out=out, resume_from=out)
        assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
