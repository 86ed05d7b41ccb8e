"""Arm: one plain torch process with all cores of the machine, and no Spark: where Spark loses."""

from __future__ import annotations

import os
import time

import numpy as np
import pyarrow.parquet as pq
import torch
from measuring import LEARNING_RATE, LENET, MOMENTUM, Block, Task, answer
from torch.nn import functional as F

from sparksgd.models import LeNet


def load(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, uint8[N, 784], and labels, int64[N]."""
    table = pq.read_table(path, columns=["image", "label"])
    images = np.frombuffer(b"".join(table["image"].to_pylist()), np.uint8).reshape(len(table), -1)
    return torch.from_numpy(images.copy()), torch.tensor(table["label"].to_pylist())


def measure(task: Task) -> list[Block]:
    """Make the steps, and time those after the warm-up."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images, labels = load(task.data)
    model = LeNet(**LENET)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    batches = torch.randperm(len(labels)).split(task.rows_per_step)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    step_s = []
    for step in range(task.warmup_steps + task.blocks * task.block_steps):
        started = time.perf_counter()
        batch = batches[step % (len(labels) // task.rows_per_step)]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        step_s.append(time.perf_counter() - started)
    timed = step_s[task.warmup_steps :]
    return [
        Block(
            what="one process",
            rows_per_step=task.rows_per_step,
            step_s=tuple(timed[first : first + task.block_steps]),
        )
        for first in range(0, len(timed), task.block_steps)
    ]


if __name__ == "__main__":
    answer(measure)
