"""How a training fails, by the user's loss or a number that is not finite, and what it leaves behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counted_trainings import COUNTED_ROWS, Diary, config_of, counted, parquet
from engine_makers import Inline
from torch import nn

from sparksgd.data.shard import read_records
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.protocol import StepReport
from sparksgd.errors import NotFinite, UserCodeError
from sparksgd.runs.folder import summary
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training


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


# A loss that becomes NaN
#
#   loss w + x of rows x = 0, 100, 100...: its gradient is 1, so w goes 1, 0.6, 0.2, -0.2 at lr 0.4,
#   and the one row of x = 0 is NaN in the fourth step.


class Root(nn.Module):
    """y = sqrt(w + x), from w = 1: not a number once w + x is below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight + x[:, 0]).sqrt()


def square(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return output.square()


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
    assert str(stopped.value).endswith("had the learning rate 0.4: try a lower optimizer.lr")
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
