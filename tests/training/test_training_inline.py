"""A training in this process: the job that a person can count, and what never changes its bits."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from engine_makers import Inline
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.schema import RowReport, RowSchema
from sparksgd.data.shard import read_records
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.protocol import SegmentReport, StepReport
from sparksgd.errors import NotFinite, UserCodeError
from sparksgd.runs.folder import summary
from sparksgd.solvers.protocol import RoundSolver
from sparksgd.training.loop import train
from sparksgd.training.state import EvaluationReport, Observer, Training

# Modules and losses, named by import path


def slope() -> nn.Module:
    """y = w x, from w = 0."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class Root(nn.Module):
    """y = sqrt(w + x), from w = 1: not a number once w + x is below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight + x[:, 0]).sqrt()


def square(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return output.square()


class Tied(nn.Module):
    """y = w x + w x, plus a frozen 100."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = slope(), slope()
        self.second.weight = self.first.weight
        self.offset = nn.Parameter(torch.full((1,), 100.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x) + self.offset


# Files, configurations, observers


def parquet(folder: Path, rows: list[tuple[list[float], float]], files: int = 1) -> ParquetRows:
    """Write rows of (x, y) to so many files, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        part = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        table = pa.table(
            {"x": pa.array([x for x, _ in part], pa.list_(pa.float64())), "y": [y for _, y in part]}
        )
        pq.write_table(table, folder / f"part-{number:02}.parquet", row_group_size=29)
    return ParquetRows(str(folder))


def config_of(**sections: dict[str, Any]) -> Config:
    return Config.from_dict({"data": {"features": "x", "label": "y"}, **sections})


class Diary(Observer):
    """An observer that writes down everything that it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[StepReport] = []
        self.parameters: list[list[float]] = []
        self.training: Training | None = None

    def started(self, training: Training) -> None:
        self.training = training
        self.lines.append("started")

    def stepped(self, training: Training, report: StepReport) -> None:
        self.steps.append(report)
        self.parameters.append(training.flat.parameters.tolist())
        self.lines.append(f"step {report.step}")

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        self.lines.append(f"evaluation {report.step}")

    def ended(self, training: Training) -> None:
        self.lines.append(f"ended {type(training.error).__name__}")


@pytest.fixture(scope="module")
def classified() -> list[tuple[list[float], int]]:
    """600 rows of ten features and three classes that a line can tell apart, mostly."""
    drawn = np.random.default_rng(0)
    x = drawn.standard_normal((600, 10))
    y = (x[:, :3] + 0.3 * drawn.standard_normal((600, 3))).argmax(1)
    return list(zip(x.tolist(), y.tolist(), strict=True))


# The job that a person can count
#
#   rows (x, y): (1, 3), (1, 6), (2, 0);  all in each step;  lr 1/8;  from w = 0
#   mean loss      ((w - 3)^2 + (w - 6)^2 + (2w)^2) / 3 = (6 w^2 - 18 w + 45) / 3
#   mean gradient  (12 w - 18) / 3 = 4 w - 6,  so w becomes w - (4 w - 6) / 8 = w / 2 + 3 / 4

COUNTED_ROWS = [([1.0], 3.0), ([1.0], 6.0), ([2.0], 0.0)]
COUNTED_WEIGHTS = [0.75, 1.125, 1.3125, 1.40625]
COUNTED_LOSSES = [15.0, 11.625, 10.78125, 10.5703125]


def counted(**train_keys: Any) -> Config:
    return config_of(
        model={"name": f"{__name__}:slope"},
        loss={"name": "squared_error"},
        optimizer={"lr": 0.125},
        train={"rows_per_step": 3, "num_shards": 1, "epochs": 4} | train_keys,
    )


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


# Same bits


def sha256(
    rows: ParquetRows, factory: Callable[[], nn.Module], test: ParquetRows | None = None, **train_keys: Any
) -> tuple[str, str, str]:
    training = train(
        config_of(
            model={"name": f"{__name__}:{factory.__name__}"},
            optimizer={"lr": 0.1, "momentum": 0.9},
            train={"rows_per_step": 64, "num_shards": 4, "epochs": 2} | train_keys,
        ),
        rows=rows,
        test=test,
        make_engine=InlineEngine,
    )
    return training.flat.parameters_sha256(), training.flat.buffers_sha256(), training.rows.data_digest


@pytest.mark.parametrize("factory", [with_dropout, with_batch_norm])
def test_neither_files_nor_their_order_nor_an_evaluation_change_a_bit(
    tmp_path: Path, classified: list[Any], factory: Callable[[], nn.Module]
) -> None:
    shuffled = [classified[row] for row in np.random.default_rng(1).permutation(600)]
    one_file, thirteen = parquet(tmp_path / "1", classified), parquet(tmp_path / "13", shuffled, files=13)
    first = sha256(one_file, factory)
    torch.manual_seed(1234)
    assert sha256(thirteen, factory) == first
    assert sha256(thirteen, factory, test=one_file, eval_every=3) == first


@pytest.mark.parametrize("key", ["seed", "num_shards", "rows_per_step", "rows_per_backward"])
def test_each_key_of_the_experiment_changes_the_bits(tmp_path: Path, classified: list[Any], key: str) -> None:
    rows = parquet(tmp_path, classified)
    other = {"seed": 1, "num_shards": 5, "rows_per_step": 50, "rows_per_backward": 3}[key]
    assert sha256(rows, with_dropout, epochs=1)[0] != sha256(rows, with_dropout, epochs=1, **{key: other})[0]


def test_trainings_in_threads_of_one_process_do_not_mix_their_numbers(
    tmp_path: Path, classified: list[Any]
) -> None:
    rows = parquet(tmp_path, classified)

    def trained(seed: int) -> object:
        return sha256(rows, with_dropout, epochs=1, seed=seed)

    alone = [trained(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(trained, range(6))) == alone


def test_features_stored_as_doubles_or_floats_train_the_same_module(
    tmp_path: Path, classified: list[Any]
) -> None:
    as_floats = pa.table(
        {
            "y": [y for _, y in classified],
            "x": pa.array([x for x, _ in classified], pa.list_(pa.float64())).cast(
                pa.list_(pa.float32(), 10)
            ),
        }
    )
    pq.write_table(as_floats, tmp_path / "floats.parquet")
    assert sha256(ParquetRows(str(tmp_path / "floats.parquet")), with_dropout, epochs=1) == sha256(
        parquet(tmp_path / "doubles", classified), with_dropout, epochs=1
    )


def test_a_training_learns_what_there_is_to_learn(tmp_path: Path, classified: list[Any]) -> None:
    training = train(
        config_of(
            model={"name": f"{__name__}:with_dropout"},
            optimizer={"lr": 0.1, "momentum": 0.9},
            train={"rows_per_step": 50, "num_shards": 4, "epochs": 8},
        ),
        rows=parquet(tmp_path / "train", classified[:500]),
        test=parquet(tmp_path / "test", classified[500:]),
        make_engine=InlineEngine,
    )
    accuracies = [evaluation.accuracy for evaluation in training.evaluations]
    assert len(accuracies) == 8
    assert accuracies[-1] > 0.75 > 1 / 3


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


def test_threads_and_torch_s_generator_are_left_as_they_were(tmp_path: Path, classified: list[Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    try:
        sha256(parquet(tmp_path, classified), with_dropout, epochs=1, threads=2)
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    monkeypatch.undo()


def test_twenty_trainings_leave_the_disk_as_it_was(tmp_path: Path, own_temporary_folder: Path) -> None:
    rows, seen = parquet(tmp_path / "rows", COUNTED_ROWS), []

    class Watching(Observer):
        def stepped(self, training: Training, report: StepReport) -> None:
            files = [name for _, _, names in os.walk(own_temporary_folder) for name in names]
            seen.append(sum(not name.startswith(".") for name in files))  # but for who owns a folder

    for _ in range(20):
        train(counted(epochs=1), rows=rows, test=rows, make_engine=InlineEngine, observers=[Watching()])
    assert seen == [2] * 20  # a shard to train on and one to evaluate on
    assert list(own_temporary_folder.iterdir()) == []


def test_a_training_that_failed_leaves_the_disk_as_it_was(
    tmp_path: Path, own_temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRAINS, "now", False)
    with pytest.raises(UserCodeError, match="raised ValueError: later"):
        train(
            replace(counted(), loss=replace(counted().loss, name=f"{__name__}:fails_in_training")),
            rows=parquet(tmp_path / "rows", COUNTED_ROWS * 3),
            test=None,
            make_engine=InlineEngine,
            observers=[Starting()],
        )
    assert list(own_temporary_folder.iterdir()) == []


TRAINS = {"now": False}


def fails_in_training(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Raise in the first step, not when the module is tried out."""
    if TRAINS["now"]:
        raise ValueError("later")
    return (output[:, 0] - label).square()


class Starting(Diary):
    """Lets the loss fail from the start of the training on."""

    def started(self, training: Training) -> None:
        TRAINS["now"] = True
        super().started(training)


def test_what_the_user_s_loss_raises_ends_the_run_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRAINS, "now", False)
    diary = Starting()
    with pytest.raises(UserCodeError) as raised:
        train(
            replace(counted(), loss=replace(counted().loss, name=f"{__name__}:fails_in_training")),
            rows=parquet(tmp_path, COUNTED_ROWS * 3),
            test=None,
            make_engine=InlineEngine,
            observers=[diary],
        )
    for phrase in ("ValueError: later", "in fails_in_training", "in turn 1, on worker 0 at"):
        assert phrase in str(raised.value)
    assert diary.lines == ["started", "ended UserCodeError"]
    assert diary.training is not None
    assert diary.training.error is raised.value


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


# A loss that becomes NaN
#
#   loss w + x of rows x = 0, 100, 100...: its gradient is 1, so w goes 1, 0.6, 0.2, -0.2 at lr 0.4,
#   and the one row of x = 0 is NaN in the fourth step.


def rooted(
    folder: Path, steps: int | None = None, *, evaluates: bool = False
) -> tuple[Diary, Callable[[], Training], list[np.ndarray]]:
    diary, read_back = Diary(), []

    def engine(plan: Plan, shards: Any, test: Any) -> InlineEngine:
        read_back.extend(read_records(shard, range(shard.rows), plan.schema.record) for shard in shards.table)
        return InlineEngine(plan, shards, test)

    config = config_of(
        model={"name": f"{__name__}:Root"},
        loss={"name": f"{__name__}:square"},
        optimizer={"lr": 0.4},
        train={"rows_per_step": 10, "num_shards": 3, "epochs": 9, "eval_every": 1}
        | ({} if steps is None else {"steps": steps}),
    )
    rows = parquet(folder, [([0.0], 0.0), *[([100.0 + row], 0.0) for row in range(9)]])
    return (
        diary,
        lambda: train(
            config, rows=rows, test=rows if evaluates else None, make_engine=Inline(engine), observers=[diary]
        ),
        read_back,
    )


def test_a_loss_that_becomes_nan_stops_the_run_and_names_the_row(tmp_path: Path) -> None:
    diary, run, shards = rooted(tmp_path)
    with pytest.raises(NotFinite) as stopped:
        run()
    (place,) = [
        (number, row)
        for number, records in enumerate(shards)
        for row, record in enumerate(records)
        if record["x"][0] == 0
    ]
    assert f"the loss of turn 4 is nan in shard {place[0]}, rows {place[1]}\n" in str(stopped.value)
    assert diary.lines == ["started", "step 1", "step 2", "step 3", "ended NotFinite"]
    assert diary.training is not None
    assert diary.training.error is stopped.value


def test_a_run_that_was_stopped_by_nan_leaves_the_last_good_weights(tmp_path: Path) -> None:
    diary, run, _ = rooted(tmp_path)
    with pytest.raises(NotFinite):
        run()
    stopped = diary.training
    assert stopped is not None
    _, run_two_steps, _ = rooted(tmp_path, steps=2)
    good = run_two_steps()
    assert stopped.version == good.version == 2  # the third step's weights are those of the NaN
    assert stopped.module.weight.item() == good.module.weight.item() == pytest.approx(0.2)
    assert diary.parameters[2] == pytest.approx([-0.2])


def test_a_run_that_was_stopped_by_nan_stands_by_no_evaluation_of_weights_it_gave_up(tmp_path: Path) -> None:
    diary, run, _ = rooted(tmp_path, evaluates=True)
    with pytest.raises(NotFinite):
        run()
    assert diary.training is not None
    assert [report.step for report in diary.training.evaluations] == [1, 2, 3]
    assert diary.training.last_evaluation == diary.training.evaluations[1]
    assert summary(diary.training, wall_s=1.0)["test_loss"] == diary.training.evaluations[1].loss


def test_a_step_that_overflows_is_not_made(tmp_path: Path) -> None:
    diary, config = Diary(), counted()
    config = replace(config, optimizer=replace(config.optimizer, arguments={"lr": 1e38}))
    with pytest.raises(NotFinite, match=r"step 1 made a parameter infinite or NaN; lower optimizer.lr"):
        train(
            config,
            rows=parquet(tmp_path, COUNTED_ROWS),
            test=None,
            make_engine=InlineEngine,
            observers=[diary],
        )
    assert diary.lines == ["started", "ended UpdateNotFinite"]
    assert diary.training is not None
    assert (diary.training.version, diary.training.flat.parameters.tolist()) == (0, [0.0])


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


def test_a_shard_of_its_share_is_not_worth_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, classified: list[Any]
) -> None:
    with caplog.at_level(logging.WARNING, "sparksgd"):
        sha256(parquet(tmp_path, classified), with_dropout, epochs=1)
    assert caplog.text == ""


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
