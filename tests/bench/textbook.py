"""Arm: the textbook loop of distributed SGD on Spark, which sparksgd does faster.

Everything here is what a tutorial would write, in a session with Spark's default settings: cached
rows, and per step a broadcast, a barrier-mode mapPartitions and a treeAggregate.  It is correct.
The comments say where its milliseconds go (medians on 2 cores, 2 workers, 64 rows each, 60,000
MNIST rows), and what sparksgd does instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from measuring import LEARNING_RATE, LENET, MOMENTUM, Block, Task, answer
from pyspark import RDD, Broadcast
from pyspark.sql import SparkSession
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sparksgd.models import LeNet

Vector = npt.NDArray[np.float32]
Row = tuple[bytes, int]
Gradient = tuple[Vector, int]


def partition_gradient(
    weights: Broadcast[Vector], step: int, rows_per_worker: int, rows: Iterable[Row]
) -> Iterator[Gradient]:
    """Task: yield the gradient sum of this step's rows of a partition."""
    # All cached rows of the partition come through a socket and are unpickled, to take 64 of them.
    # sparksgd: only descriptors of shards come; the 64 rows are read from a local file.
    cached = list(rows)
    start = step * rows_per_worker % len(cached)
    batch = cached[start : start + rows_per_worker]
    images = torch.frombuffer(bytearray(b"".join(image for image, _ in batch)), dtype=torch.uint8)
    labels = torch.tensor([label for _, label in batch])

    # A new module per step; its first parameters are drawn at random, and overwritten.
    # sparksgd: one module per Python worker, whose parameters are views of one flat vector.
    torch.set_num_threads(1)
    model = LeNet(**LENET)
    vector_to_parameters(torch.from_numpy(weights.value), model.parameters())
    F.cross_entropy(model(images.view(-1, 784)), labels, reduction="sum").backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    yield parameters_to_vector(gradients).numpy(), len(batch)
    # After the task PySpark's daemon runs gc.collect() over all of torch's objects: 20 to 60 ms
    # before the worker takes the next task.  sparksgd: gc.freeze() once.


def add(left: Gradient, right: Gradient) -> Gradient:
    """Merge two gradient sums."""
    return left[0] + right[0], left[1] + right[1]


def textbook_step(
    rows: RDD[Row], weights: Vector, velocity: Vector, step: int, rows_per_worker: int
) -> tuple[Vector, Vector]:
    """Make one step; return the new weights and velocity."""
    # The weights are pickled, compressed (in vain: weights do not compress) and written to a file.
    # sparksgd: spark.broadcast.compress=false.
    broadcast = rows.context.broadcast(weights)

    # The job's tasks wait 40 ms for Nagle's algorithm and delayed acknowledgements between the JVM
    # and Python.  sparksgd: spark.python.unix.domain.socket.enabled=true.
    # The zero vector travels in the job's closure, which grows as large as the weights: 30 ms.
    # sparksgd: a zero of None.
    # The sums, above 1 MiB each, go through the block manager: about 10 ms.
    # sparksgd: spark.task.maxDirectResultSize=100m.
    zero = np.zeros_like(weights), 0
    gradient, count = (
        rows.barrier()
        .mapPartitions(partial(partition_gradient, broadcast, step, rows_per_worker))
        .treeAggregate(zero, add, add)
    )

    # The driver's update: SGD with momentum, 1 ms.
    velocity = np.float32(MOMENTUM) * velocity + gradient / np.float32(count)
    weights = weights - np.float32(LEARNING_RATE) * velocity

    # The executors' copies go; the driver's file stays until the end, one more with each step.
    # sparksgd: destroy().
    broadcast.unpersist()
    return weights, velocity


def measure(task: Task) -> list[Block]:
    """Make the steps, and time those after the warm-up."""
    session = SparkSession.builder.getOrCreate()
    frame = session.read.parquet(task.data).repartition(task.num_workers)
    rows: RDD[Row] = frame.rdd.map(lambda row: (bytes(row.image), row.label)).cache()
    rows.count()
    weights = parameters_to_vector(LeNet(**LENET).parameters()).detach().numpy()
    velocity = np.zeros_like(weights)
    step_s = []
    for step in range(task.warmup_steps + task.blocks * task.block_steps):
        started = time.perf_counter()
        weights, velocity = textbook_step(
            rows, weights, velocity, step, task.rows_per_step // task.num_workers
        )
        step_s.append(time.perf_counter() - started)
    session.stop()
    timed = step_s[task.warmup_steps :]
    return [
        Block(
            what="textbook",
            rows_per_step=task.rows_per_step,
            step_s=tuple(timed[first : first + task.block_steps]),
        )
        for first in range(0, len(timed), task.block_steps)
    ]


if __name__ == "__main__":
    answer(measure)
