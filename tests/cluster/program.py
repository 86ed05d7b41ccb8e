"""The driver program of test_servers.py: a barrier job, and Parquet written and read.

program.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from pyspark import BarrierTaskContext
from pyspark.sql import SparkSession


def total(numbers: Iterable[int]) -> Iterator[tuple[str, int]]:
    """Return a task's host, and the sum of all tasks' sums."""
    context = BarrierTaskContext.get()
    sums = context.allGather(str(sum(numbers)))
    host = context.getTaskInfos()[context.partitionId()].address.partition(":")[0]
    yield host, sum(map(int, sums))


def main(folder: str) -> None:
    """Print what came of both."""
    session = SparkSession.builder.getOrCreate()
    found = session.sparkContext.parallelize(range(100), 2).barrier().mapPartitions(total).collect()
    session.range(1000).write.parquet(f"{folder}/numbers")
    rows = session.read.parquet(f"{folder}/numbers").count()
    text = f"{rows} rows, sums {[value for _, value in found]}, hosts {sorted({host for host, _ in found})}"
    session.sparkContext.parallelize([text], 1).saveAsTextFile(f"{folder}/found")
    session.stop()


if __name__ == "__main__":
    main(sys.argv[1])
