"""Batch-norm normalises within a piece; its running statistics are the row-weighted mean over shards."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config, OptimizerConfig, ScheduleConfig
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.data.shard import Descriptor, ShardWriter
from sparksgd.engines.compute import Plan
from sparksgd.engines.forward import evaluated_parts
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ModelError
from sparksgd.models.losses import squared_error
from sparksgd.solvers.protocol import Halves
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.synchronous import SendGradients, SynchronousSettings, SynchronousSolver
from sparksgd.training.in_process import train_in_process
from sparksgd.training.state import Training

SCHEMA = RowSchema(features=(Feature(name="x", dtype="float32", length=3),), label="y", label_dtype="float32")
SIZES = (14, 0, 5, 9)


@dataclass
class Dealt:
    """Shards on this disk."""

    table: list[Descriptor]

    def close(self) -> None:
        """The folder is pytest's."""


class Run:
    """A training of `module` on four shards, 14 rows per step: two steps per epoch."""

    def __init__(self, folder: Path, module: nn.Module) -> None:
        drawn = np.random.default_rng(0)
        self.shards, table = [], []
        for number, size in enumerate(SIZES):
            records = np.empty(size, SCHEMA.record)
            records["x"] = drawn.normal(5, 2, (size, 3))
            records["(label)"] = drawn.standard_normal(size)
            with ShardWriter(folder, number) as writer:
                keys = np.zeros((size, 32), np.uint8)
                writer.append(keys, records.view(np.uint8).reshape(size, SCHEMA.record.itemsize))
                table.append(writer.close())
            self.shards.append(records)
        self.sampling = Sampling(shard_rows=SIZES, rows_per_step=14, seed=1)
        plan = Plan(
            module=copy.deepcopy(module),
            loss=squared_error,
            schema=SCHEMA,
            sampling=self.sampling,
            halves=Halves(make=SendGradients),
            threads=1,
        )
        self.flat = FlatModule(module)
        self.solver = SynchronousSolver(
            self.flat,
            SynchronousSettings(),
            Experiment(
                optimizer=OptimizerConfig(arguments={"lr": 0.01}),
                schedule=ScheduleConfig(),
                num_shards=len(SIZES),
                turns_per_epoch=2,
                total_turns=2,
            ),
        )
        self.engine = InlineEngine(plan, Dealt(table), None)
        self.engine.open()

    def advance(self, steps: int = 1) -> None:
        self.engine.advance(self.solver, steps)

    def pieces(self, step: int) -> list[np.ndarray]:
        """Return the features of each piece of a step that has rows."""
        pieces = []
        for shard, records in enumerate(self.shards):
            order = self.sampling.shuffled(shard, step // 2)
            rows = order[slice(*self.sampling.piece_bounds(shard, step))]
            pieces += [records["x"][rows]] if len(rows) else []
        return pieces


def first_normed(**arguments: float | None) -> nn.Sequential:
    """Batch-norm right on the features, so that its statistics are theirs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3, **arguments), nn.Linear(3, 1))


def test_running_statistics_are_the_row_weighted_mean_of_each_piece_s(tmp_path: Path) -> None:
    module = first_normed(momentum=0.3)
    run = Run(tmp_path, module)
    mean, variance = np.zeros(3), np.ones(3)
    for step in range(4):
        run.advance()
        pieces = run.pieces(step)
        assert len({len(piece) for piece in pieces}) > 1
        weights = [len(piece) / 14 for piece in pieces]
        seen = sum(w * piece.mean(0, dtype=float) for w, piece in zip(weights, pieces, strict=True))
        spread = sum(w * piece.var(0, ddof=1, dtype=float) for w, piece in zip(weights, pieces, strict=True))
        mean, variance = 0.7 * mean + 0.3 * seen, 0.7 * variance + 0.3 * spread
        np.testing.assert_allclose(module[0].running_mean.numpy(), mean, rtol=1e-5)
        np.testing.assert_allclose(module[0].running_var.numpy(), variance, rtol=1e-5)
        assert module[0].num_batches_tracked.item() == step + 1


def test_deep_statistics_are_those_of_torch_run_on_each_piece(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    run = Run(tmp_path, module)
    for step in range(3):
        copies = []
        for piece in run.pieces(step):
            alone = copy.deepcopy(module).train()
            alone(torch.from_numpy(piece.copy()))
            copies.append((len(piece), alone[1]))
        run.advance()
        for name in ("running_mean", "running_var"):
            expected = sum(rows * getattr(norm, name).double() for rows, norm in copies) / 14
            np.testing.assert_allclose(getattr(module[1], name).numpy(), expected.numpy(), rtol=1e-5)


def test_a_cumulative_average_counts_steps(tmp_path: Path) -> None:
    module = first_normed(momentum=None)  # torch's running_mean is then the plain mean of all batches
    run = Run(tmp_path, module)
    run.advance(4)
    each = [np.concatenate(run.pieces(step)).mean(0, dtype=float) for step in range(4)]
    np.testing.assert_allclose(module[0].running_mean.numpy(), np.mean(each, axis=0), rtol=1e-5)
    assert module[0].num_batches_tracked.item() == 4


def test_a_norm_without_running_statistics_trains(tmp_path: Path) -> None:
    run = Run(tmp_path, nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)))
    before = run.flat.parameters.clone()
    run.advance()
    assert not torch.equal(run.flat.parameters, before)


def evaluated_in(folder: Path, test_rows: int, num_shards: int = 1) -> Training:
    rng = np.random.default_rng(3)
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y", "id": "i"},
            "loss": {"name": "squared_error"},
            "train": {"rows_per_step": 12, "num_shards": num_shards},
        }
    )
    for name, rows in (("train", 24), ("test", test_rows)):
        table = {"x": [*rng.normal(2, 1, (rows, 3)).astype(np.float32)], "y": np.ones(rows, np.float32)}
        pq.write_table(pa.table(table | {"i": np.arange(rows)}), folder / f"{name}.parquet")
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    module = nn.Sequential(norm, nn.Linear(3, 1), nn.Flatten(0))
    return train_in_process(
        config, str(folder / "train.parquet"), str(folder / "test.parquet"), module=module
    )


@pytest.mark.parametrize("rows", [20, 512, 513])
def test_an_evaluation_leaves_no_row_to_a_norm_without_statistics_alone(tmp_path: Path, rows: int) -> None:
    training = evaluated_in(tmp_path, rows)
    x = torch.tensor(np.stack(pq.read_table(tmp_path / "test.parquet")["x"].to_numpy()))
    expected = float((training.module.eval()(x) - 1).square().mean().detach())
    assert training.evaluations[-1].loss == pytest.approx(expected, rel=1e-5)


def test_only_a_norm_without_statistics_gets_more_rows_at_once() -> None:
    ordinary, without = nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    assert evaluated_parts(1025, ordinary) == [range(512), range(512, 1024), range(1024, 1025)]
    assert evaluated_parts(1025, without) == [range(512), range(512, 1025)]
    assert evaluated_parts(1, without) == [range(1)]
    assert evaluated_parts(0, without) == []


def test_a_test_shard_of_one_row_is_refused_for_a_norm_without_statistics(tmp_path: Path) -> None:
    told = r"keeps no running statistics.*of the test data has one row.*lower train\.num_shards"
    with pytest.raises(ModelError, match=told):
        evaluated_in(tmp_path, 3, num_shards=2)
