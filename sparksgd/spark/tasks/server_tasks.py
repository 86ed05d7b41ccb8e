"""What executors run for the server engine: one task for each worker, as long as the run.

No pyspark at module level: executors import this as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparksgd.data.shard import Descriptor
from sparksgd.errors import ModelError, SparkSGDError
from sparksgd.peers.server_worker import ServerAddress, serve
from sparksgd.spark.tasks.step_tasks import ShippedPlan

if TYPE_CHECKING:
    from pyspark import Broadcast

__all__ = ["WorkerTask", "work"]


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What a worker's task is given."""

    request: int
    """Which of the server's requests it is."""

    worker: int
    shards: Sequence[Descriptor]
    server: ServerAddress


def work(shipped: Broadcast[ShippedPlan], tasks: Iterable[WorkerTask]) -> Iterator[SparkSGDError | None]:
    """Task: be a worker; yield what failed, as a value."""
    for task in tasks:
        try:
            computer = shipped.value.computer
        except ModelError as error:
            yield error
            return
        yield serve(computer, task.server, task.request, task.worker, task.shards)
