"""Where tasks run and blocks are: executors as preferred places, and the worker of each partition."""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Iterable, Sequence
from math import ceil, sqrt
from typing import Any

from pyspark import RDD, SparkContext
from pyspark.serializers import CPickleSerializer

__all__ = ["Placement", "is_local", "reduce_groups", "worker_of_partition"]

_DROPPED_S = 5.0


def worker_of_partition(num_workers: int) -> list[int]:
    """Return the worker of each partition, so that siblings of the addition tree are added early.

    With five partitions or more, treeAggregate adds the partitions whose numbers are equal modulo the number
    of groups.  Neighbouring workers belong in one group.

    >>> worker_of_partition(8)
    [0, 4, 1, 5, 2, 6, 3, 7]
    """
    groups = reduce_groups(num_workers)
    order = sorted(range(num_workers), key=lambda partition: (partition % groups, partition))
    workers = [0] * num_workers
    for worker, partition in enumerate(order):
        workers[partition] = worker
    return workers


def reduce_groups(num_partitions: int) -> int:
    """Return how many partitions treeAggregate(depth=2) combines the results into, before the driver."""
    scale = max(ceil(sqrt(num_partitions)), 2)
    gathers = num_partitions > scale + num_partitions / scale
    return int(num_partitions / scale) if gathers else num_partitions


def is_local(context: SparkContext) -> bool:
    """Return whether the driver's process is the only executor."""
    return re.fullmatch(r"local(\[.*\])?", str(context.master)) is not None


class Placement:
    """The executors of a session, and the blocks of persisted RDDs that they hold.

    Args:
        context: whose executors.
    """

    def __init__(self, context: SparkContext) -> None:
        self._context = context
        self._jvm: Any = context._jvm

    def drop_block(self, rdd: RDD[Any], partition: int) -> None:
        """Let Spark drop one partition of a persisted RDD, so that it computes it again."""
        block, blocks = self._block(rdd, partition)
        blocks.removeBlock(block)
        deadline = time.monotonic() + _DROPPED_S
        while not blocks.getLocations(block).isEmpty() and time.monotonic() < deadline:
            time.sleep(0.01)  # Spark does not report that an executor has dropped a block

    def has_block(self, rdd: RDD[Any], partition: int) -> bool:
        """Return whether an executor holds one partition of a persisted RDD."""
        block, blocks = self._block(rdd, partition)
        return not blocks.getLocations(block).isEmpty()

    def place_of(self, rdd: RDD[Any], partition: int) -> str | None:
        """Return the executor that holds one partition of a persisted RDD, as a preferred place."""
        block, blocks = self._block(rdd, partition)
        found = blocks.getLocations(block)
        return None if found.isEmpty() else _place(found.head())

    def places(self) -> set[str]:
        """Return all executors, as preferred places of tasks."""
        executors, found = self._blocks().getMemoryStatus().keysIterator(), set()
        while executors.hasNext():
            executor = executors.next()
            if is_local(self._context) or not executor.isDriver():
                found.add(_place(executor))
        return found

    def at_place(self, element: Any, place: str | None) -> Any:
        """Return an element for `placed_rdd`, with its preferred place; None: any place."""
        return self._jvm.scala.Tuple2(pickle.dumps(element), self._seq([] if place is None else [place]))

    def placed_rdd(self, elements: Sequence[Any]) -> RDD[Any]:
        """Return an RDD with a partition for each of these elements, which prefers the element's place."""
        tag = self._jvm.scala.reflect.ClassTag.apply(self._jvm.java.lang.Class.forName("[B"))
        placed = self._context._jsc.sc().makeRDD(self._seq(elements), tag)
        return RDD(placed.toJavaRDD(), self._context, CPickleSerializer())

    def _seq(self, values: Iterable[Any]) -> Any:
        listed = self._jvm.java.util.ArrayList()
        for value in values:
            listed.add(value)
        return self._jvm.PythonUtils.toSeq(listed)

    def _block(self, rdd: RDD[Any], partition: int) -> tuple[Any, Any]:
        """Return the name of a block, and Spark's object that knows where it is."""
        return self._jvm.org.apache.spark.storage.RDDBlockId(rdd.id(), partition), self._blocks()

    def _blocks(self) -> Any:
        """Return Spark's object that knows where blocks are."""
        manager = self._component(
            "SparkEnv", "blockManager", "storage.BlockManager", self._context._jsc.sc().env()
        )
        return self._component("storage.BlockManager", "master", "storage.BlockManagerMaster", manager)

    def _component(self, owner: str, name: str, kind: str, instance: Any) -> Any:
        """Return a field of a Spark object, by reflection: py4j would fail to load classes of its methods."""
        java = self._jvm.java.lang
        owner_class, kind_class = (java.Class.forName(f"org.apache.spark.{path}") for path in (owner, kind))
        getter = java.invoke.MethodHandles.publicLookup().findVirtual(
            owner_class, name, java.invoke.MethodType.methodType(kind_class)
        )
        return getter.bindTo(instance).invokeWithArguments(self._jvm.java.util.ArrayList())

    def unpersist(self, rdd: RDD[Any]) -> None:
        """Let Spark drop a persisted RDD; `unpersist` would log a warning if the RDD has no lineage."""
        rdd.is_cached = False
        self._context._jsc.sc().unpersistRDD(rdd.id(), True)


def _place(executor: Any) -> str:
    """Return the name of a BlockManagerId's executor as a task's preferred place."""
    return f"executor_{executor.host()}_{executor.executorId()}"
