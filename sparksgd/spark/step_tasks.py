"""What executors run at each step: make the computer once, answer with partial sums.

No pyspark at module level: executors import this as it is.
"""

from __future__ import annotations

import gc
import json
import pickle
import socket
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from sparksgd.compute import EVALUATION_ROWS, Answer, Computer, forward, predictions
from sparksgd.errors import ClusterError, SparkSGDError
from sparksgd.flat import Weights
from sparksgd.mesh import Meeting
from sparksgd.numerics import Numerics, thread_count
from sparksgd.output import SavedModel
from sparksgd.replica import Replica, Segment, SegmentAnswer
from sparksgd.rows import RowReport
from sparksgd.shard import Descriptor
from sparksgd.solvers.protocol import SolverState
from sparksgd.spark.quiet import leave_quietly
from sparksgd.spark.row_tasks import rows_of, texts

if TYPE_CHECKING:
    from pyspark import Broadcast

__all__ = ["ShippedPlan", "add", "answer", "contact", "meet", "score", "segment"]


class ShippedPlan:
    """A pickled plan on its way to the workers; each process that gets it makes one computer of it."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    @cached_property
    def computer(self) -> Computer:
        """The process's computer, kept as long as Spark keeps the broadcast."""
        leave_quietly()
        computer = Computer(pickle.loads(self._pickled))
        gc.collect()
        gc.freeze()  # PySpark's daemon collects after every task: over all of torch, 20 to 60 ms
        return computer

    @cached_property
    def replica(self) -> Replica:
        """The process's part in all-reduce, kept likewise."""
        return Replica(self.computer)

    def __getstate__(self) -> dict[str, Any]:
        return {"_pickled": self._pickled}


def contact(
    shipped: Broadcast[ShippedPlan], workers: list[int], partition: int, shards: Iterable[Descriptor]
) -> Iterator[tuple[int, Numerics]]:
    """Task: make the computer, and yield this worker's number and numerics."""
    list(shards)
    yield workers[partition], shipped.value.computer.numerics


def answer(
    shipped: Broadcast[ShippedPlan],
    weights: Broadcast[Weights],
    workers: list[int],
    step: int | None,
    partition: int,
    shards: Iterable[Descriptor],
) -> Iterator[Answer]:
    """Task: answer a step, or an evaluation where `step` is None.

    Args:
        shipped: the plan.
        weights: what to compute at.
        workers: which worker each partition is.
        step: its number, from 0.
        partition: this task's.
        shards: the partition's.
    """
    worker, computer = workers[partition], shipped.value.computer
    if step is None:
        yield computer.evaluations(worker, shards, weights.value)
    else:
        yield computer.gradients(worker, shards, weights.value, step)


def meet(
    shipped: Broadcast[ShippedPlan],
    meeting: Meeting,
    workers: list[int],
    partition: int,
    shards: Iterable[Descriptor],
) -> Iterator[ClusterError | None]:
    """Task: meet the other workers, and yield what was in the way."""
    list(shards)
    yield shipped.value.replica.meet(workers[partition], meeting)


def segment(
    shipped: Broadcast[ShippedPlan],
    state: Broadcast[SolverState] | None,
    asked: Segment,
    workers: list[int],
    partition: int,
    shards: Iterable[Descriptor],
) -> Iterator[SegmentAnswer]:
    """Task: make the steps of a segment with the other workers.

    Args:
        shipped: the plan.
        state: the solver's, at the first step; None where the workers should have kept it.
        asked: what to do.
        workers: which worker each partition is.
        partition: this task's.
        shards: the partition's.
    """
    load = None if state is None else lambda: state.value
    yield shipped.value.replica.run(workers[partition], shards, asked, load)


def add(into: Answer | None, other: Answer) -> Answer:
    """Merge two answers, as treeAggregate wants it; None is the empty one."""
    if into is None:
        return other
    into += other
    return into


def score(shipped: Broadcast[bytes], batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Task: run a saved model over a partition's rows; yield its sums as JSON."""
    leave_quietly()
    model: SavedModel = pickle.loads(shipped.value)
    try:
        scores = _scores(model, batches)
    except SparkSGDError as error:  # as a value: Spark would try a task that raises again
        scores = {
            "failure": [type(error).__name__, f"{error}\n  in the evaluation, at {socket.gethostname()}"]
        }
    yield texts("scores", [json.dumps(scores)])


def _scores(model: SavedModel, batches: Iterable[pa.RecordBatch]) -> dict[str, Any]:
    schema = model.schema
    report, total = RowReport(), 0.0
    confusion = np.zeros((schema.classes or 0,) * 2, np.int64)
    for rows in rows_of(schema, batches):
        report += rows.report
        for first in range(0, len(rows.records), EVALUATION_ROWS):
            records = rows.records[first : first + EVALUATION_ROWS]
            with torch.inference_mode(), thread_count(1):
                output, losses = forward(model.module, model.loss, schema, records)
            total += float(losses.double().sum())
            if schema.classes is not None:
                np.add.at(confusion, (schema.label_array(records), predictions(output).numpy()), 1)
    return {"report": report.to_json(), "loss": total, "confusion": confusion.tolist()}
