"""Replies of the tasks of ordinary stages, one by one, when each task ends.

The result of a Spark job is available when all of its tasks have ended.  Accumulators are available earlier.
Spark adds the update of a task at the driver as soon as the task has ended, once for each partition, even if
a task is retried or runs twice.  So a task puts its reply into an accumulator, whose value at the driver is
an inbox.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from pyspark import RDD, Accumulator, AccumulatorParam, Broadcast

from sparksgd.data.shard import Descriptor
from sparksgd.engines.replies import Reply
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.tasks.step_tasks import Round, ShippedPlan

__all__ = ["Arrived", "Desk"]

Work = tuple[int, Sequence[Descriptor]]
"""A worker's number, and its shards."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A reply that arrived by itself."""

    request: int
    """Which request it is of."""

    worker: int
    reply: Reply


class _NoInbox:
    """Takes the place of a closed inbox: Spark 3.5 stops its accumulator server if one is unknown."""

    def put(self, _: Any) -> None:
        """Drop an answer."""


class _Inbox(AccumulatorParam[Any]):
    """Defines how replies are added: at the driver they are put into a queue, with the time."""

    def zero(self, value: Any) -> Any:
        """Return the initial value in a task."""
        return None

    def addInPlace(self, value1: Any, value2: Any) -> Any:  # noqa: N802  # PySpark's name
        """Put an answer where it belongs."""
        if value1 is None:
            return value2
        value1.put((time.time(), value2))
        return value1


class Desk:
    """Sends requests to workers, and receives their replies.

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

    def place(self, worker: int, shards: Sequence[Descriptor], place: str | None) -> None:
        """Say what a worker works on, and where that is, as Spark names places; None: anywhere."""
        self._work[worker] = self._cluster.at_place((worker, shards), place)

    def ask(self, number: int, workers: Iterable[int], asked: Broadcast[Round]) -> Any:
        """Submit a job that asks workers for their messages of a round; return the JVM's JavaFutureAction.

        Args:
            number: of the request; replies have it.
            workers: there is a task for each.
            asked: the round.
        """
        work: RDD[Work] = self._cluster.placed_rdd([self._work[worker] for worker in sorted(workers)])
        task = partial(_arrive, self._shipped, asked, self._inbox, number)
        return work.mapPartitions(task)._jrdd.collectAsync()

    def next(self, timeout_s: float) -> tuple[float, Arrived] | None:
        """Return the next reply, and when it arrived; None if none arrives in time."""
        try:
            return self._queue.get(timeout=timeout_s)
        except Empty:
            return None

    def close(self) -> None:
        """Stop receiving; later replies are thrown away."""
        self._inbox.value = _NoInbox()


def _arrive(
    shipped: Broadcast[ShippedPlan],
    asked: Broadcast[Round],
    inbox: Accumulator[Any],
    request: int,
    work: Iterable[Work],
) -> Iterator[None]:
    """Task: put a worker's messages into the inbox."""
    for worker, shards in work:
        reply = shipped.value.computer.round(worker, shards, asked.value.answer, asked.value.asked)
        inbox.add(Arrived(request=request, worker=worker, reply=reply))
    yield from ()
