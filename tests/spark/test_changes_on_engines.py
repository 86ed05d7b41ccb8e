"""What forward changes, and what its own train() and eval() do, is the same on every engine."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from spark_helpers import configured, digests

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ModelError
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline
from sparksgd.training.state import Training

pytestmark = pytest.mark.session("local[5]")

CHANGING = (
    "model.name=changing_modules:ChangingNet",
    "train.steps=12",
    "train.eval_every=4",
    "optimizer.lr=0.3",
)
LOCAL = (
    "model.name=changing_modules:ChangingNet", "model.averages=false", "solver.name=local_sgd",
    "solver.turns_per_round=3", "train.steps=12", "train.eval_every=6",
)  # fmt: skip


def ended(training: Training) -> tuple[object, ...]:
    """Return all that must be equal."""
    state = training.module.state_dict()
    losses = [report.loss for report in training.evaluations]
    return digests(training), losses, {name: tensor.tolist() for name, tensor in state.items()}


@cache
def inline(path: str, settings: tuple[str, ...]) -> Training:
    rows = ParquetRows(path)
    return train_inline(configured(*settings), rows=rows, test=rows, make_engine=InlineEngine)


@pytest.mark.parametrize(
    ("settings", "engine", "workers"),
    [
        pytest.param(
            settings,
            engine,
            workers,
            marks=() if workers == 3 and (settings, engine) != (LOCAL, "tree") else pytest.mark.soak,
        )
        for settings in (CHANGING, LOCAL)
        for engine in ("tree", "allreduce")
        for workers in (1, 3)
    ],
    ids=lambda value: ("local" if value is LOCAL else "synchronous") if isinstance(value, tuple) else None,
)
def test_every_engine_ends_at_one_state(spark, small, settings, engine, workers):
    rows = spark.read.parquet(small)
    config = configured(*settings, f"engine.name={engine}", f"engine.num_workers={workers}")
    assert ended(train(spark, config, rows, rows)) == ended(inline(small, settings))


def test_it_changed_what_forward_changes(small):
    module = inline(small, CHANGING).module
    assert module.steps.item() == 12
    assert 0 < module.average.abs().max() <= 0.2
    assert not torch.equal(module.teacher.weight, module.out.weight)
    assert module.filters.weight.flatten(1).norm(dim=1).max() > 0.4  # the optimiser moved it afterwards


@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_a_value_for_each_piece_is_refused_at_its_step(spark, small, engine):
    config = configured("model.name=changing_modules:PeakNet", "train.steps=9", f"engine.name={engine}")
    with pytest.raises(ModelError, match="forward changes peak"):
        train(spark, config, spark.read.parquet(small))
