"""What jobs have returned is freed at the driver once it was read, and not some steps later."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark import SparkContext

from sparksgd.spark.engines.base import forget_results

_RESULT_BYTES = 16 << 20


def used_bytes(context: SparkContext) -> int:
    runtime: Any = context._jvm.java.lang.Runtime.getRuntime()
    context._jvm.System.gc()
    return int(runtime.totalMemory() - runtime.freeMemory())


@pytest.mark.session("local[2]")
def test_the_heap_holds_no_results_of_earlier_jobs(spark: Any) -> None:
    context = spark.sparkContext
    rows = context.parallelize(range(2), 2)
    before = used_bytes(context)
    for _ in range(5):
        result = rows.mapPartitions(lambda _: [bytes(_RESULT_BYTES)]).treeReduce(lambda one, _: one)
        assert len(result) == _RESULT_BYTES
        forget_results(context)
    assert used_bytes(context) - before < 2 * _RESULT_BYTES


def test_pythons_objects_of_java_are_told_to_it_and_its_end_is_left_to_py4j() -> None:
    told: list[str] = []

    def told_of(target: str, enqueue: bool) -> None:
        assert not enqueue
        told.append(target)

    client = SimpleNamespace(garbage_collect_object=told_of, finalizer_deque=deque())
    client.finalizer_deque.extend(["__shutdown__", (client, "o2"), (client, "o1")])
    forget_results(SimpleNamespace(_gateway=SimpleNamespace(_gateway_client=client)))
    assert told == ["o1", "o2"]
    assert list(client.finalizer_deque) == ["__shutdown__"]


def test_where_py4j_tells_at_once_there_is_nothing_to_do() -> None:
    forget_results(SimpleNamespace(_gateway=SimpleNamespace(_gateway_client=SimpleNamespace())))
