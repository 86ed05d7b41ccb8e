"""Several workers in this process, each with its own computer: what one keeps, the others do not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from engine_makers import Inline
from torch import nn

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.compute import Computer
from sparksgd.engines.inline import InlineEngine
from sparksgd.models.losses import squared_error
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training


class _Computers:
    """Computers that share the shards: worker w has those whose number is w modulo their count."""

    def __init__(self, computers: list[Computer]) -> None:
        self._computers, self.numerics = computers, computers[0].numerics
        # As in processes of their own, settings of the driver's thread are not theirs.
        self._threads = [ThreadPoolExecutor(1) for _ in computers] if len(computers) > 1 else []

    def round(self, worker: int, shards: Any, answer: Any, asked: Any) -> Any:
        return self._together(shards, lambda one, number, own: one.round(number, own, answer, asked))

    def evaluations(self, worker: int, shards: Any, weights: Any) -> Any:
        return self._together(shards, lambda one, number, own: one.evaluations(number, own, weights))

    def _together(self, shards: Any, ask: Any) -> Any:
        total = None
        for number, one in enumerate(self._computers):
            own = [shard for shard in shards if shard.shard % len(self._computers) == number]
            reply = (
                self._threads[number].submit(ask, one, number, own).result()
                if self._threads
                else ask(one, number, own)
            )
            if reply.failure is not None:
                raise reply.failure
            if total is None:
                total = reply
            else:
                total += reply
        return total


class WorkersHere(InlineEngine):
    """An inline engine of several workers."""

    def __init__(self, num_workers: int, *given: Any) -> None:
        super().__init__(*given)
        self._num_workers = num_workers

    def open(self) -> None:
        self._computer = _Computers([Computer(self._plan) for _ in range(self._num_workers)])

    def contact(self) -> list[Numerics]:
        return [self._computer.numerics] * self._num_workers


def rows_of(folder: Path, rows: int = 48, width: int = 4) -> ParquetRows:
    """Write rows of a linear rule, float[width], to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(0).standard_normal((rows, width))
    y = x.sum(1) + 0.5
    pq.write_table(
        pa.table({"x": pa.array(x.tolist(), pa.list_(pa.float64())), "y": y}), folder / "rows.parquet"
    )
    return ParquetRows(str(folder))


def train_here(
    folder: Path,
    num_workers: int = 1,
    *,
    module: nn.Module | None = None,
    tested: bool = False,
    observers: Sequence[Observer] = (),
    **sections: Any,
) -> Training:
    """Train on 48 rows in 4 shards, 12 rows a step."""
    rows = rows_of(folder)
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y"},
            "loss": {"name": "squared_error"},
            "optimizer": {"lr": 0.05},
            **sections,
            "train": {"rows_per_step": 12, "num_shards": 4, "epochs": 2} | sections.get("train", {}),
        }
    )
    return train(
        config,
        rows=rows,
        test=rows if tested else None,
        make_engine=Inline(lambda *given: WorkersHere(num_workers, *given)),
        module=module,
        observers=observers,
    )


def by_plain_torch(
    folder: Path, module: nn.Module, steps: int, loss: Callable[[Any, Any], torch.Tensor] = squared_error
) -> list[float]:
    """Return a module's parameters after steps on all rows of `rows_of`, in one process."""
    table = rows_of(folder).first_rows(["x", "y"], 48)[1]
    x, y = torch.tensor(table["x"].to_pylist()), torch.tensor(table["y"].to_pylist())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module(x), y).mean().backward()
        optimizer.step()
    return [value for parameter in module.parameters() for value in parameter.flatten().tolist()]
