"""Rows in shards, and a plan to compute on them in this process; with modules and a loss to plan for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sparksgd.arithmetic.flat import FlatModule, Weights
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.data.shard import Descriptor, ShardWriter, read_records
from sparksgd.engines.compute import Computer, Plan
from sparksgd.engines.replies import Evaluation, Reply
from sparksgd.engines.trial.trial import Use, try_out
from sparksgd.models.losses import cross_entropy, squared_error
from sparksgd.solvers.protocol import Answer, Halves, Message
from sparksgd.solvers.synchronous import SendGradients
from sparksgd.solvers.without_compiler import without_compiler

Row = tuple[Any, ...]  # the features, then the label


class Job:
    """Rows written to shards, and a plan to compute on them."""

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        shards: Sequence[Sequence[Row]],
        *,
        loss: Callable[..., Any] = squared_error,
        rows_per_step: int = 1000,
        seed: int = 0,
        threads: int = 1,
        rows_per_backward: int | None = None,
    ) -> None:
        example = next(rows[0] for rows in shards if rows)
        schema = RowSchema(
            features=tuple(
                Feature(name=name, dtype="float32", length=len(value) if isinstance(value, tuple) else None)
                for name, value in zip("abc", example[:-1], strict=False)
            ),
            label="y",
            label_dtype="int64" if loss is cross_entropy else "float32",
            classes=3 if loss is cross_entropy else None,
        )
        self.table = [written(folder, schema, number, rows) for number, rows in enumerate(shards)]
        self.plan = Plan(
            module=module,
            loss=loss,
            schema=schema,
            sampling=Sampling(shard_rows=tuple(map(len, shards)), rows_per_step=rows_per_step, seed=seed),
            halves=Halves(make=SendGradients),
            threads=threads,
            rows_per_backward=rows_per_backward,
        )
        self.weights: Weights = FlatModule(copy.deepcopy(module)).weights(0)

    def computer(self) -> Computer:
        return Computer(self.plan)

    def gradients(self, shards: Sequence[int] | None = None, step: int = 0, worker: int = 0) -> Reply:
        asked = self.table if shards is None else [self.table[number] for number in shards]
        return self.computer().round(worker, asked, self.answer(step))

    def answer(self, turn: int) -> Answer:
        return Answer(weights=self.weights, turn=turn)

    def evaluation(self) -> Evaluation:
        answer = self.computer().evaluations(0, self.table, self.weights)
        assert answer.failure is None
        total = answer.total()
        assert isinstance(total, Evaluation)
        return total

    def tried(self, rows: int | None = None) -> tuple[tuple[int, ...], bool]:
        records = read_records(self.table[0], range(self.table[0].rows), self.plan.schema.record)[:rows]
        plan = self.plan
        without_compiler()
        use = Use(loss=plan.loss, schema=plan.schema, dtype=plan.dtype, classifies=plan.loss is cross_entropy)
        found = try_out(plan.module, records, use)
        return found.shapes[""], found.channels_last


def written(folder: Path, schema: RowSchema, number: int, rows: Sequence[Row]) -> Descriptor:
    records = np.array([tuple(row) for row in rows], schema.record)
    with ShardWriter(folder, number) as writer:
        keys = np.zeros((len(rows), 32), np.uint8)
        writer.append(keys, records.view(np.uint8).reshape(len(rows), schema.record.itemsize))
        return writer.close()


def the_sum(answer: Reply) -> Message:
    assert answer.failure is None
    total = answer.total()
    assert isinstance(total, Message)
    return total


def slope(value: float = 0.0) -> nn.Linear:
    """y = value x."""
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(value)
    return module


def bits(sum_: Any) -> bytes:
    return sum_.vectors["gradient"].tobytes() + sum_.statistics.tobytes() + np.float64(sum_.loss).tobytes()


ROWS = [((1.0,), 3.0), ((1.0,), 6.0), ((2.0,), 0.0)]


class Noisy(nn.Module):
    """y = sum(dropout(w)), with the weights beside a batch-norm: it hears of every other row."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, width))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.dropout(self.norm(x), 0.5, self.training) * self.weight).sum(1)


def noisy_job(folder: Path, **options: Any) -> Job:
    drawn = np.random.default_rng(0)
    rows = [(tuple(drawn.standard_normal(4)), drawn.standard_normal()) for _ in range(36)]
    return Job(folder, Noisy(), [rows[:10], rows[10:24], rows[24:]], rows_per_step=12, **options)


def picky(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such label")
