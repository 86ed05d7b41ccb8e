"""A training's steps, losses, metrics and reports are those that a person works out."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counted_trainings import (
    COUNTED_LOSSES,
    COUNTED_ROWS,
    COUNTED_WEIGHTS,
    Diary,
    config_of,
    counted,
    parquet,
    slope,
)
from torch import nn

from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.protocol import SegmentReport
from sparksgd.runs.folder import summary
from sparksgd.solvers.protocol import RoundSolver
from sparksgd.training.loop import train


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("rows_per_backward", [None, 1, 2])
def test_a_training_takes_the_steps_that_a_person_works_out(
    tmp_path: Path, num_shards: int, rows_per_backward: int | None
) -> None:
    diary = Diary()
    config = counted(num_shards=num_shards)
    config = replace(config, train=replace(config.train, rows_per_backward=rows_per_backward))
    training = train(
        config,
        rows=parquet(tmp_path, COUNTED_ROWS),
        test=None,
        make_engine=InlineEngine,
        observers=[diary],
    )
    assert diary.parameters == [[weight] for weight in COUNTED_WEIGHTS]
    assert [step.loss for step in diary.steps] == COUNTED_LOSSES
    assert [(s.step, s.epoch, s.version, s.rows, s.lr) for s in diary.steps] == [
        (1, 1, 0, 3, 0.125),
        (2, 2, 1, 3, 0.125),
        (3, 3, 2, 3, 0.125),
        (4, 4, 3, 3, 0.125),
    ]
    assert training.module.weight.item() == 1.40625
    assert (training.version, training.total_turns, training.error) == (4, 4, None)


def test_the_metrics_of_the_test_rows_are_the_ones_that_a_person_works_out(tmp_path: Path) -> None:
    # at w = 0.75, 1.125: (w - 1)^2 and (2 w - 1)^2, halved
    training = train(
        counted(epochs=2),
        rows=parquet(tmp_path / "train", COUNTED_ROWS),
        test=parquet(tmp_path / "test", [([1.0], 1.0), ([2.0], 1.0)]),
        make_engine=InlineEngine,
    )
    found = [(e.step, e.epoch, e.loss, e.accuracy, e.rows) for e in training.evaluations]
    assert found == [(1, 1, (0.0625 + 0.25) / 2, None, 2), (2, 2, (0.015625 + 1.5625) / 2, None, 2)]


class Tied(nn.Module):
    """y = w x + w x, plus a frozen 100."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = slope(), slope()
        self.second.weight = self.first.weight
        self.offset = nn.Parameter(torch.full((1,), 100.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x) + self.offset


def test_a_tied_parameter_counts_once_and_a_frozen_one_stays(tmp_path: Path) -> None:
    # y = 2 w x + 100 of rows (1, 104): gradient 2 (2 w - 4) 2 = 8 w - 16; at lr 1/16: w / 2 + 1
    training = train(
        config_of(
            model={"name": f"{__name__}:Tied"},
            loss={"name": "squared_error"},
            optimizer={"lr": 0.0625},
            train={"rows_per_step": 4, "num_shards": 2, "epochs": 3},
        ),
        rows=parquet(tmp_path, [([1.0], 104.0)] * 4),
        test=None,
        make_engine=InlineEngine,
    )
    assert training.flat.parameters.tolist() == [1.75]  # 1, 1.5, 1.75
    assert training.module.first.weight is training.module.second.weight
    assert training.module.offset.tolist() == [100.0]


# The loop


@pytest.mark.parametrize(
    ("train_keys", "lines"),
    [
        (
            {"epochs": 2},
            "started, step 1, step 2, evaluation 2, step 3, step 4, evaluation 4, ended NoneType",
        ),
        (
            {"epochs": 2, "steps": 3},
            "started, step 1, step 2, evaluation 2, step 3, evaluation 3, ended NoneType",
        ),
        ({"epochs": 1, "steps": 99}, "started, step 1, step 2, evaluation 2, ended NoneType"),
        (
            {"epochs": 2, "eval_every": 3},
            "started, step 1, step 2, step 3, evaluation 3, step 4, evaluation 4, ended NoneType",
        ),
    ],
)
def test_steps_and_evaluations_come_when_they_should(
    tmp_path: Path, train_keys: dict[str, int], lines: str
) -> None:
    rows, diary = parquet(tmp_path, [*COUNTED_ROWS, ([0.0], 0.0)]), Diary()
    config = counted(rows_per_step=2, num_shards=2, **train_keys)
    train(config, rows=rows, test=rows, make_engine=InlineEngine, observers=[diary])
    assert ", ".join(diary.lines) == lines


def test_epochs_are_shuffled_anew(tmp_path: Path) -> None:
    # With lr 0 a step's loss names its row: x is 1 and the labels' squares are all different.
    rows = [([1.0], float(label)) for label in range(6)]
    config = counted(rows_per_step=1, epochs=4)
    config = replace(config, optimizer=replace(config.optimizer, arguments={"lr": 0.0}))
    diary = Diary()
    train(config, rows=parquet(tmp_path, rows), test=None, make_engine=InlineEngine, observers=[diary])
    epochs = [[step.loss for step in diary.steps if step.epoch == epoch] for epoch in (1, 2, 3, 4)]
    assert all(sorted(losses) == [0.0, 1.0, 4.0, 9.0, 16.0, 25.0] for losses in epochs)
    assert len({tuple(losses) for losses in epochs}) == 4


def test_a_module_of_one_s_own_is_trained_in_place(tmp_path: Path) -> None:
    module = slope()
    training = train(
        counted(), rows=parquet(tmp_path, COUNTED_ROWS), test=None, make_engine=InlineEngine, module=module
    )
    assert training.module is module
    assert training.model_name is None
    assert module.weight.item() == 1.40625
    again = train(
        counted(epochs=1),
        rows=parquet(tmp_path, COUNTED_ROWS),
        test=None,
        make_engine=InlineEngine,
        module=module,
    )
    assert again.flat.parameters.tolist() == [1.40625 / 2 + 0.75]  # it goes on from where it was


# Said aloud


class Replaced(InlineEngine):
    """Another executor takes the worker's place after the first step."""

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        report = super().advance(solver, steps)
        self._computer.numerics = replace(self._computer.numerics, instruction_set="OTHER")
        return report


def test_a_worker_that_is_replaced_by_one_of_other_arithmetic_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(counted(), rows=parquet(tmp_path, COUNTED_ROWS), test=None, make_engine=Replaced)
    before = training.numerics[0].instruction_set
    assert (
        f"before step 2 by one that differs (before / now): instruction_set {before} / OTHER" in caplog.text
    )
    assert caplog.text.count("was replaced") == 1
    (change,) = summary(training, wall_s=1.0)["numerics"]["changes"]
    assert (change["step"], change["worker"], change["numerics"]["instruction_set"]) == (2, 0, "OTHER")


def test_reports_of_rows_and_numerics_are_kept(tmp_path: Path) -> None:
    rows = parquet(tmp_path, COUNTED_ROWS)
    training = train(counted(), rows=rows, test=rows, make_engine=InlineEngine)
    assert training.rows.rows == 3
    assert training.test_rows is not None
    assert training.test_rows.digest == training.rows.digest != RowReport().digest
    assert isinstance(training.plan.schema, RowSchema)
    driver, worker = training.numerics
    assert driver == worker
    assert driver.threads == 1
