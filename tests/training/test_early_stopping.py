"""Runs that evaluations end, and the weights that they end with."""

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
from judged_runs import KEPT_EACH, Asks, config_of, rows_of
from resumed_jobs import EVERY_STEP, Jobs, Stops, made_jobs

import sparksgd
from sparksgd.config import EarlyStoppingConfig
from sparksgd.errors import ConfigError, DataError
from sparksgd.runs.replay import read_replay
from sparksgd.training import checkpoint
from sparksgd.training.early_stopping import best_of, why_over
from sparksgd.training.state import EvaluationReport

NAN = float("nan")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("early"))


# Judging


def evaluations(losses: Sequence[float]) -> list[EvaluationReport]:
    return [
        EvaluationReport(step=5 * n, turn=5 * n, epoch=n, loss=loss, accuracy=-loss, rows=9, time_s=0.0)
        for n, loss in enumerate(losses, 1)
    ]


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


def test_no_accuracy_is_better_than_the_loss_that_is_no_number() -> None:
    found = [
        EvaluationReport(step=n, turn=n, epoch=n, loss=loss, accuracy=accuracy, rows=9, time_s=0.0)
        for n, (loss, accuracy) in enumerate([(0.5, 0.8), (NAN, 0.9), (0.7, 0.7)], 1)
    ]
    assert best_of(EarlyStoppingConfig(patience=2, metric="accuracy"), found) is found[0]


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
    assert training.restored is training.evaluations[best] is training.last_evaluation
    # The same as a run that was asked for no more steps than the best one.
    shorter = config_of(jobs, {"train": {"steps": training.restored.step}})
    until_best = sparksgd.train(shorter, rows_of(jobs))
    assert until_best.stopped_by is None
    assert training.flat.parameters_sha256() == until_best.flat.parameters_sha256()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["stopped_by"] == "early_stopping"
    assert summary["best_step"] == training.restored.step < summary["steps"] == training.version
    assert summary["test_loss"] == losses[best]
    assert summary["parameters_sha256"] == until_best.flat.parameters_sha256()
    saved = sparksgd.load_model(tmp_path / "model", trust=["torch"])
    assert torch.equal(saved.module.weight, training.module.weight)
    assert saved.about["version"] == training.restored.step


def test_the_weights_of_the_last_step_stay_where_that_is_asked_for(jobs: Jobs) -> None:
    kept = sparksgd.train(config_of(jobs), rows_of(jobs))
    last = sparksgd.train(config_of(jobs, {"early_stopping": {"keep_best": False}}), rows_of(jobs))
    assert last.version == kept.version
    assert last.restored is None
    assert last.flat.parameters_sha256() != kept.flat.parameters_sha256()
    assert last.last_evaluation is last.evaluations[-1]


def test_a_run_that_is_not_ended_early_has_its_best_weights_too(jobs: Jobs) -> None:
    epochs = len(sparksgd.train(config_of(jobs), rows_of(jobs)).evaluations)
    config = config_of(jobs, {"train": {"epochs": epochs}, "early_stopping": {"patience": 1000}})
    training = sparksgd.train(config, rows_of(jobs))
    assert training.stopped_by is None
    assert training.is_finished
    assert training.turns == training.total_turns
    assert training.restored is not None
    assert training.restored.loss == min(report.loss for report in training.evaluations)
    assert training.restored.step < training.version


def test_patience_counts_evaluations_of_eval_every(jobs: Jobs) -> None:
    training = sparksgd.train(config_of(jobs, {"train": {"eval_every": 2}}), rows_of(jobs))
    turns = [report.turn for report in training.evaluations]
    assert turns == list(range(2, 2 * len(turns) + 1, 2))
    assert training.stopped_by == "early_stopping"
    assert training.restored is training.evaluations[-3]


@pytest.mark.usefixtures("every_checkpoint")
@pytest.mark.soak
def test_a_run_that_is_stopped_and_goes_on_ends_at_the_same_step(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs, KEPT_EACH)
    whole = sparksgd.train(config, rows_of(jobs))
    assert whole.restored is not None
    for number, step in enumerate((2, whole.restored.step + 1, whole.version)):
        out = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows_of(jobs), out=out, observers=[Stops(step)])
        again = sparksgd.train(config, rows_of(jobs), out=out, resume_from=out)
        assert again.resumed
        assert (again.version, again.stopped_by) == (whole.version, "early_stopping")
        assert again.restored is not None
        assert again.restored.step == whole.restored.step
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
    assert training.restored is not None
    assert training.stopped_by == "early_stopping"
    norm = module[1]
    assert isinstance(norm, torch.nn.BatchNorm1d)
    assert int(norm.num_batches_tracked) == training.restored.step  # buffers are those of the best step, too


def test_a_replay_ends_early_at_the_same_parameters(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs)
    whole = sparksgd.train(config, rows_of(jobs), out=tmp_path)
    replay = read_replay(tmp_path, trust=["torch"])
    again = sparksgd.train(config, rows_of(jobs), replay=replay)
    assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
    assert again.version == whole.version


@pytest.mark.parametrize("end", ["interrupted", "stopped", "out of time", "of keep_best=false"])
def test_a_replay_of_a_run_that_ended_otherwise_ends_at_its_parameters(
    jobs: Jobs, tmp_path: Path, end: str
) -> None:
    config = config_of(jobs, {"train": {"eval_every": 2}})
    if end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[Stops(7)])
    elif end == "stopped":
        sparksgd.train(config, rows_of(jobs), out=tmp_path, observers=[Asks(7)])
    elif end == "out of time":
        limit = config_of(jobs, {"train": {"eval_every": 2, "max_wall_s": 0}})
        sparksgd.train(limit, rows_of(jobs), out=tmp_path)
        for _ in range(4):
            sparksgd.train(limit, rows_of(jobs), out=tmp_path, resume_from=tmp_path)
    else:
        config["early_stopping"]["keep_best"] = False
        sparksgd.train(config, rows_of(jobs), out=tmp_path)
    replay = read_replay(tmp_path, trust=["torch"])
    assert replay.parameters_sha256 is not None
    again = sparksgd.train(config, rows_of(jobs), replay=replay)
    assert again.version == len(replay.took_part)
    assert again.flat.parameters_sha256() == replay.parameters_sha256
    if end == "out of time":  # the limit of then is none of the replay
        assert sparksgd.train(replay.config, rows_of(jobs), replay=replay).version == again.version


def test_a_replay_needs_the_rows_that_shaped_the_run(jobs: Jobs, tmp_path: Path) -> None:
    config = config_of(jobs)
    del config["data"]["validation_fraction"]
    sparksgd.train(config, rows_of(jobs), rows_of(jobs), out=tmp_path / "run")
    replay = read_replay(tmp_path / "run", trust=["torch"])
    pq.write_table(pq.read_table(rows_of(jobs)).slice(0, 50), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="the rows to evaluate on are not those of the run to be replayed"):
        sparksgd.train(config, rows_of(jobs), str(tmp_path / "other.parquet"), replay=replay)


# What is refused


@pytest.mark.parametrize("key", [{"metric": "accuracy"}, {"min_delta": 0.1}, {"keep_best": False}])
def test_a_key_that_would_do_nothing_is_refused(key: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is set, but early_stopping\.patience is not"):
        sparksgd.Config.from_dict({"early_stopping": key})
