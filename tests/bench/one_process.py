"""Arm: one plain torch process with all cores of the machine, and no Spark: where Spark loses."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle, islice, repeat
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from measuring import LEARNING_RATE, LENET, MODELS, MOMENTUM, Block, Task, answer
from torch.nn import functional as F
from turns import Turns

from sparksgd.models import LeNet


def load(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, uint8[N, 784], and labels, int64[N]."""
    table = pq.read_table(path, columns=["image", "label"])
    images = np.frombuffer(b"".join(table["image"].to_pylist()), np.uint8).reshape(len(table), -1)
    return torch.from_numpy(images.copy()), torch.tensor(table["label"].to_pylist())


def timed(
    what: str, model: Mapping[str, Any], data: tuple[torch.Tensor, torch.Tensor], rows: int,
    steps: Iterable[int], turns: Turns,
) -> Iterator[Block]:  # fmt: skip
    """Train a model by itself, and yield a block of each number of steps but the first, which warms up."""
    images, labels = data
    module = LeNet(**model).to(memory_format=torch.channels_last)  # as sparksgd computes it
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    batches = cycle(torch.randperm(len(labels)).split(rows)[: len(labels) // rows])  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for number, count in enumerate(steps):
        step_s = []
        for batch in islice(batches, count):
            started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(module(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            step_s.append(time.perf_counter() - started)
        if number:
            yield Block(what=what, rows_per_step=rows, step_s=tuple(step_s))
        turns.next()


def measure(task: Task) -> list[Block]:
    """Train at every size, with the rows of all workers together."""
    turns = Turns()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = load(task.data)
    if not task.sizes:
        steps = [task.warmup_steps, *repeat(task.block_steps, task.blocks)]
        return list(timed("one process", LENET, data, task.rows_per_step, steps, turns))
    blocks: list[Block] = []
    for name, rows, block_steps in task.sizes:
        what = f"one process, {name}, {rows} rows"
        steps = list(repeat(block_steps, 1 + task.blocks))
        blocks += timed(what, MODELS[name], data, rows * task.num_workers, steps, turns)
    return blocks


if __name__ == "__main__":
    answer(measure)
