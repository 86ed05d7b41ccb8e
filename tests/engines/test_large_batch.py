"""S shards are one process that takes the rows of each step as one large mini-batch.

The other side of each comparison is plain torch: a module, torch.optim, the mean of the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from engine_makers import Inline
from torch import nn
from torch.nn import functional as F

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config, OptimizerConfig, ScheduleConfig
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.data.shard import Descriptor, ShardWriter, read_records
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.models import LeNet
from sparksgd.models.losses import cross_entropy
from sparksgd.solvers.protocol import Halves
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.synchronous import SendGradients, SynchronousSettings, SynchronousSolver
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Probe

SGD = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
SCHEMA = RowSchema(
    features=(Feature(name="image", dtype="uint8", length=784),),
    label="label",
    label_dtype="int64",
    classes=10,
)


@dataclass
class Dealt:
    """Shards on this disk."""

    table: list[Descriptor]

    def close(self) -> None:
        """The folder is pytest's."""


def small_lenet() -> LeNet:
    torch.manual_seed(1)
    return LeNet(maps=(2, 3), hidden=8, dropout=0.0).double()


def images(rows: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    records = np.empty(rows, SCHEMA.record)
    records["image"] = drawn.integers(0, 256, (rows, 784))
    records["(label)"] = drawn.integers(0, 10, rows)
    return records


def written(folder: Path, shards: Sequence[np.ndarray]) -> Dealt:
    table = []
    for number, records in enumerate(shards):
        with ShardWriter(folder, number) as writer:
            keys = np.zeros((len(records), 32), np.uint8)
            writer.append(keys, records.view(np.uint8).reshape(len(records), SCHEMA.record.itemsize))
            table.append(writer.close())
    return Dealt(table)


def by_shards(
    module: nn.Module, dealt: Dealt, sampling: Sampling, steps: int, rows_per_backward: int | None = None
) -> Iterator[tuple[torch.Tensor, float, int]]:
    """Yield the parameters, the mean loss and the rows of each step of the trainer."""
    plan = Plan(
        module=copy.deepcopy(module),
        loss=cross_entropy,
        schema=SCHEMA,
        sampling=sampling,
        halves=Halves(make=SendGradients),
        threads=1,
        rows_per_backward=rows_per_backward,
        dtype=torch.float64,
    )
    flat = FlatModule(copy.deepcopy(module), torch.float64)
    solver = SynchronousSolver(
        flat,
        SynchronousSettings(),
        Experiment(
            optimizer=OptimizerConfig(name="SGD", arguments=SGD),
            schedule=ScheduleConfig(),
            num_shards=len(sampling.shard_rows),
            turns_per_epoch=sampling.turns_per_epoch,
            total_turns=1,
        ),
    )
    engine = InlineEngine(plan, dealt, None)
    engine.open()
    for _ in range(steps):
        (report,) = engine.advance(solver, 1).steps
        yield flat.parameters.clone(), report.loss, report.rows


def by_one_process(
    module: nn.Module, shards: Sequence[np.ndarray], sampling: Sampling, steps: int
) -> Iterator[tuple[torch.Tensor, float, int]]:
    """Yield the same of one plain torch process on the union of the pieces."""
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), **SGD)
    for step in range(steps):
        epoch = step // sampling.turns_per_epoch
        union = np.concatenate(
            [
                records[sampling.shuffled(shard, epoch)[slice(*sampling.piece_bounds(shard, step))]]
                for shard, records in enumerate(shards)
            ]
        )
        optimizer.zero_grad()
        loss = F.cross_entropy(
            module(torch.from_numpy(union["image"].copy())), torch.from_numpy(union["(label)"].copy())
        )
        loss.backward()
        optimizer.step()
        yield nn.utils.parameters_to_vector(module.parameters()).detach(), loss.item(), len(union)


def assert_equal(ours: Any, theirs: Any) -> int:
    """Compare step by step to 1e-12, and return how many steps there were."""
    steps = 0
    for (parameters, loss, rows), (expected, expected_loss, expected_rows) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-12)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert rows == expected_rows
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("sizes", "rows_per_step"),
    [
        ((16, 16), 8),
        ((23, 3, 14), 8),
        ((12, 0, 17, 5), 9),
        ((1, 0, 0, 1, 30), 7),
        ((13,), 5),
        ((4, 3, 2), 100),
    ],
    ids=["even", "uneven", "an empty shard", "tiny shards", "one shard", "one step per epoch"],
)
def test_lenet_on_shards_is_lenet_on_the_union_of_their_rows(
    tmp_path: Path, sizes: tuple[int, ...], rows_per_step: int
) -> None:
    shards = [images(rows, seed) for seed, rows in enumerate(sizes)]
    sampling = Sampling(shard_rows=sizes, rows_per_step=rows_per_step, seed=3)
    steps = 2 * sampling.turns_per_epoch + 1  # into the third epoch
    module, dealt = small_lenet(), written(tmp_path, shards)
    assert steps == assert_equal(
        by_shards(module, dealt, sampling, steps), by_one_process(module, shards, sampling, steps)
    )


def test_lenet_of_the_default_size_is_no_exception(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = LeNet(dropout=0.0).double()
    shards = [images(rows, seed) for seed, rows in enumerate((7, 0, 4))]
    sampling = Sampling(shard_rows=(7, 0, 4), rows_per_step=6, seed=0)
    dealt = written(tmp_path, shards)
    assert_equal(by_shards(module, dealt, sampling, 3), by_one_process(module, shards, sampling, 3))


def test_cutting_pieces_into_backward_passes_changes_nothing_but_rounding(tmp_path: Path) -> None:
    shards = [images(rows, seed) for seed, rows in enumerate((20, 9))]
    sampling = Sampling(shard_rows=(20, 9), rows_per_step=10, seed=0)
    module, dealt = small_lenet(), written(tmp_path, shards)
    in_passes = by_shards(module, dealt, sampling, 4, rows_per_backward=2)
    assert_equal(in_passes, by_one_process(module, shards, sampling, 4))


class Snapshots(Observer):
    """An observer that keeps each step's parameters, mean loss and rows."""

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, float, int]] = []

    def started(self, training: Any) -> None:
        self.steps.clear()

    def stepped(self, training: Any, report: Any) -> None:
        self.steps.append((training.flat.parameters.clone(), report.loss, report.rows))


def test_a_whole_training_from_parquet_is_one_process_on_its_rows(tmp_path: Path) -> None:
    rows = images(61)
    table = pa.table({"image": [row.tobytes() for row in rows["image"]], "label": rows["(label)"].tolist()})
    pq.write_table(table, tmp_path / "rows.parquet")
    config = Config.from_dict(
        {
            "data": {"features": "image"},
            "optimizer": {"name": "SGD", **SGD},
            "train": {"rows_per_step": 12, "num_shards": 4, "epochs": 2, "seed": 5},
        }
    )
    read_back: list[np.ndarray] = []

    def engine(plan: Plan, shards: Any, test: Any) -> InlineEngine:
        read_back.extend(read_records(shard, range(shard.rows), SCHEMA.record) for shard in shards.table)
        return InlineEngine(plan, shards, test)

    module, watching = small_lenet(), Snapshots()
    training = train(
        config,
        rows=ParquetRows(str(tmp_path / "rows.parquet")),
        test=None,
        make_engine=Inline(engine),
        module=copy.deepcopy(module),
        observers=[watching],
        probe=Probe(dtype=torch.float64),
    )
    assert sorted(row.tobytes() for part in read_back for row in part) == sorted(r.tobytes() for r in rows)
    sampling = training.plan.sampling
    assert len(set(sampling.shard_rows)) > 1  # the hash deals unevenly, which is the harder case
    assert assert_equal(watching.steps, by_one_process(module, read_back, sampling, 12)) == 2 * 6
