"""Answers of the tasks of ordinary stages, one by one, as each task ends.

A job's result is there when all of its tasks are.  What is there earlier is accumulators: Spark adds a
task's update at the driver as soon as that task has ended, once for each partition, whatever was tried
again or run twice.  So a task puts its answer into an accumulator, whose value at the driver is an inbox.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from pyspark import RDD, Accumulator, AccumulatorParam, Broadcast

from sparksgd.compute import Answer
from sparksgd.flat import Weights
from sparksgd.shard import Descriptor
from sparksgd.spark.cluster import Cluster
from sparksgd.spark.step_tasks import ShippedPlan

__all__ = ["Arrived", "Desk", "Request"]

Work = tuple[int, Sequence[Descriptor]]
"""A worker's number, and its shards."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """An answer that has come by itself."""

    request: int
    """Which request it answers."""

    worker: int
    answer: Answer


@dataclass(kw_only=True)
class Request:
    """A job that asks workers for gradients, and what has come of it."""

    number: int
    version: int
    """The version of the weights."""

    began_at_s: float
    """When the step that it is for began to ask, by the driver's clock."""

    missing: set[int]
    """Workers that have not answered."""

    weights: Broadcast[Weights]
    future: Any
    """The JVM's JavaFutureAction."""


class _NoInbox:
    """Stays where an inbox was: Spark 3.5 ends its server of accumulators if it does not know one."""

    def put(self, _: Any) -> None:
        """Drop an answer."""


class _Inbox(AccumulatorParam[Any]):
    """Says how answers add up: at the driver they go into a queue, with the time."""

    def zero(self, value: Any) -> Any:
        """Return what a task begins with."""
        return None

    def addInPlace(self, value1: Any, value2: Any) -> Any:  # noqa: N802  # PySpark's name
        """Put an answer where it belongs."""
        if value1 is None:
            return value2
        value1.put((time.time(), value2))
        return value1


class Desk:
    """Sends requests to workers, and takes what arrives.

    Args:
        cluster: where the workers are.
        shipped: what they compute.
    """

    def __init__(self, cluster: Cluster, shipped: Broadcast[ShippedPlan]) -> None:
        self._cluster = cluster
        self._shipped = shipped
        self._queue: SimpleQueue[tuple[float, Arrived]] = SimpleQueue()
        self._inbox: Accumulator[Any] = cluster.context.accumulator(self._queue, _Inbox())
        self._work: dict[int, Any] = {}
        self._requests = 0

    def place(self, worker: int, shards: Sequence[Descriptor], place: str | None) -> None:
        """Say what a worker works on, and where that is, as Spark names places; None: anywhere."""
        self._work[worker] = self._cluster.at_place((worker, shards), place)

    def ask(
        self,
        workers: Iterable[int],
        weights: Broadcast[Weights],
        version: int,
        asked: frozenset[int],
        began_at_s: float,
    ) -> Request:
        """Submit a job that asks workers for the gradients of a step.

        Args:
            workers: a task for each.
            weights: to compute at.
            version: theirs, which is the step from 0.
            asked: the shards that take part.
            began_at_s: when the step began to ask.
        """
        wanted = sorted(workers)
        self._requests += 1
        work: RDD[Work] = self._cluster.placed_rdd([self._work[worker] for worker in wanted])
        task = partial(_arrive, self._shipped, weights, self._inbox, self._requests, version, asked)
        future = work.mapPartitions(task)._jrdd.collectAsync()
        return Request(
            number=self._requests,
            version=version,
            began_at_s=began_at_s,
            missing=set(wanted),
            weights=weights,
            future=future,
        )

    def next(self, timeout_s: float) -> tuple[float, Arrived] | None:
        """Return when the next answer arrived, and what it is; None if none does in time."""
        try:
            return self._queue.get(timeout=timeout_s)
        except Empty:
            return None

    def close(self) -> None:
        """Take nothing any more; what still comes finds an inbox that keeps nothing."""
        self._inbox.value = _NoInbox()


def _arrive(
    shipped: Broadcast[ShippedPlan],
    weights: Broadcast[Weights],
    inbox: Accumulator[Any],
    request: int,
    step: int,
    asked: frozenset[int],
    work: Iterable[Work],
) -> Iterator[None]:
    """Task: put a worker's gradients into the inbox."""
    for worker, shards in work:
        answer = shipped.value.computer.gradients(worker, shards, weights.value, step, asked)
        inbox.add(Arrived(request=request, worker=worker, answer=answer))
    yield from ()
