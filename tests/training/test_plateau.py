"""A schedule that evaluations move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from judged_runs import KEPT_EACH, config_of, rows_of
from resumed_jobs import Jobs, Stops, made_jobs

import sparksgd
from sparksgd.errors import ConfigError
from sparksgd.training.state import EvaluationReport, Observer, Training


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("early"))


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
    last = [value for what, value in rates.seen if what == "rate"][-1]
    assert last == optimizer.param_groups[0]["lr"] < 0.2
    by_loss = Rates()
    sparksgd.train(plateau(jobs), rows_of(jobs), observers=[by_loss])
    assert [one for one in by_loss.seen if one[0] == "rate"] != [
        one for one in rates.seen if one[0] == "rate"
    ]


@pytest.mark.usefixtures("every_checkpoint")
@pytest.mark.soak
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


def test_a_plateau_by_epochs_is_refused(jobs: Jobs) -> None:
    with pytest.raises(ConfigError, match="evaluations move ReduceLROnPlateau: leave it out"):
        sparksgd.train(plateau(jobs, interval="epoch"), rows_of(jobs))


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
        ConfigError,
        match=r"early_stopping\.metric names .accuracy., but the loss is one whose kind is .numbers",
    ):
        sparksgd.train(config, rows_of(jobs))
