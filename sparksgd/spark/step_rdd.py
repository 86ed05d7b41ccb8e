"""The RDD of a step's answers: PySpark's own, whose job costs the driver less.

Of a step of 75 ms (2 cores, 2 workers, 431,080 parameters) these took 8 ms:

    RDD.collect has Spark clean two closures of its own: it parses all bytecode of RDD and SparkContext, to
    find nothing.  collectAsync cleans one, of a small class.

    PySpark names the JVM's classes without their packages, and py4j looks through every jar for each package
    that they could be in, five times a job.  Here a name that was found is kept.

    treeAggregate asks the JVM twice how many partitions there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from pyspark import RDD
from pyspark.traceback_utils import SCCallSiteSync

if TYPE_CHECKING:
    from pyspark.core.rdd import PipelinedRDD
    from pyspark.util import _load_from_socket
else:  # Spark 3.5 has no pyspark.core
    PipelinedRDD = sys.modules[RDD.__module__].PipelinedRDD
    _load_from_socket = sys.modules[RDD.__module__]._load_from_socket

__all__ = ["StepRDD", "keep_names"]

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")

_NAMES = ("PythonRDD", "PythonUtils", "SimplePythonFunction")


def keep_names(jvm: Any) -> None:
    """Let py4j find the classes that every job names where they were found once."""
    for name in _NAMES:
        setattr(jvm, name, getattr(jvm, name))


class StepRDD(PipelinedRDD[T, U]):
    """What `rdd.barrier().mapPartitionsWithIndex(task)` gives, with a quicker `collect`.

    From five partitions on, treeAggregate shuffles, and collects another RDD than this.

    Args:
        rdd: the partitions that tasks get.
        task: (partition, its elements) -> what it yields.
        num_partitions: how many there are.
    """

    def __init__(
        self,
        rdd: RDD[T],
        task: Callable[[int, Iterable[T]], Iterable[U]],
        num_partitions: int,
        preserves_partitioning: bool = False,
    ) -> None:
        super().__init__(rdd, task, preserves_partitioning, isFromBarrier=True)
        self._num_partitions = num_partitions

    def getNumPartitions(self) -> int:  # noqa: N802  # PySpark's name
        """Return how many there are."""
        return self._num_partitions

    def mapPartitionsWithIndex(  # noqa: N802  # PySpark's name
        self,
        f: Callable[[int, Iterable[U]], Iterable[V]],
        preservesPartitioning: bool = False,  # noqa: N803  # PySpark's name
    ) -> StepRDD[U, V]:
        """Return an RDD that pipes this one through a function."""
        return StepRDD(self, f, self._num_partitions, preservesPartitioning)

    def collect(self) -> list[U]:
        """Return what the tasks yield, in the partitions' order."""
        jvm: Any = self.ctx._jvm
        with SCCallSiteSync(self.ctx):  # type: ignore[no-untyped-call]  # untyped in pyspark
            yielded = self._jrdd.collectAsync().get()
        served = jvm.PythonRDD.serveIterator(jvm.PythonUtils.toSeq(yielded).iterator(), "answers")
        stream: Any = _load_from_socket(served, self._jrdd_deserializer)
        with stream if hasattr(stream, "__exit__") else nullcontext(stream) as loaded:
            return list(loaded)
