"""Whether a session has the memory that a run takes, asked before rows are dealt.

A refusal has the arithmetic, and the options of spark-submit that would do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from sparksgd.arithmetic.addition_tree import nodes_of, partials_sent
from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.engines.kinds import ALLREDUCE, STAGES, EngineKind
from sparksgd.engines.memory import (
    LARGEST_RESULT,
    Copies,
    Places,
    RunSizes,
    Takes,
    listed,
    machine_bytes,
    takes,
    total,
)
from sparksgd.errors import OutOfMemory
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.placement import is_local, reduce_groups, worker_of_partition

__all__ = ["Limits", "at_driver", "places_of", "require_memory", "warn_of_slow_results"]

log = logging.getLogger("sparksgd")

_STEP_MIB = 256  # options name multiples of this
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the processes of a session may use, in bytes."""

    driver_heap: int

    executor_heap: int | None
    """None: the driver's JVM is the executor."""

    driver: int
    """All of the container or the machine that the driver is on."""

    executor: int | None
    """All of an executor's container; None where nothing bounds it."""

    worker: int | None
    """spark.executor.pyspark.memory of one Python worker; None: not set."""

    results: int | None
    """spark.driver.maxResultSize; None: without a limit."""

    cores: int = 1
    """spark.executor.cores."""

    @classmethod
    def of(cls, cluster: Cluster) -> Limits:
        """Return the limits of a session."""
        conf: Any = cluster.context._jsc.sc().conf()

        def mib(key: str, default: int) -> int:
            return int(conf.getSizeAsMb(key, f"{default}m")) * _MIB

        master = str(cluster.context.master)
        on_kubernetes = master.startswith("k8s")
        in_containers = on_kubernetes or master.startswith("yarn")

        def container(of: str) -> int:
            heap = mib(f"spark.{of}.memory", 1024)
            usual = conf.get("spark.kubernetes.memoryOverheadFactor", "0.4") if on_kubernetes else "0.1"
            factor = float(conf.get(f"spark.{of}.memoryOverheadFactor", usual))
            return heap + mib(f"spark.{of}.memoryOverhead", max(384, int(heap * factor / _MIB)))

        driver_too = in_containers and conf.get("spark.submit.deployMode", "client") == "cluster"
        results = int(conf.getSizeAsBytes("spark.driver.maxResultSize", "1g"))
        pyspark = mib("spark.executor.pyspark.memory", 0)
        has_off_heap = conf.get("spark.memory.offHeap.enabled", "false") == "true"
        off_heap = int(conf.getSizeAsBytes("spark.memory.offHeap.size", "0")) if has_off_heap else 0
        cores = max(1, int(conf.get("spark.executor.cores", "1")))
        return cls(
            driver_heap=cluster.driver_heap_bytes,
            executor_heap=None if is_local(cluster.context) else mib("spark.executor.memory", 1024),
            driver=container("driver") if driver_too else machine_bytes(),
            executor=container("executor") + pyspark + off_heap if in_containers else None,
            worker=pyspark // cores if pyspark else None,
            cores=cores,
            results=results or None,
        )


def places_of(cluster: Cluster, kind: EngineKind, num_shards: int) -> Places:
    """Return where an engine would compute."""
    workers = cluster.num_workers
    sent = list(partials_sent(workers, num_shards))
    in_driver = is_local(cluster.context)
    executors = max(1, len(cluster.places()))
    most, count = (max(sent), sum(sent)) if kind is STAGES else partial_sums(workers, num_shards)
    return Places(
        num_workers=workers,
        workers_per_executor=workers if in_driver else max(1, min(workers, -(-cluster.slots() // executors))),
        in_driver=in_driver,
        shards_of_worker=-(-num_shards // workers),
        sums_of_worker=max(sent),
        sums_of_task=most,
        sums=count,
    )


def partial_sums(num_workers: int, num_shards: int) -> tuple[int, int]:
    """Return how many partial sums reach the driver of treeAggregate: at most in one result, and in all."""
    groups = reduce_groups(num_workers)
    gathered: list[list[int]] = [[] for _ in range(groups)]
    for partition, worker in enumerate(worker_of_partition(num_workers)):
        gathered[partition % groups] += balanced_range(worker, num_workers, num_shards)
    counts = [len(nodes_of(held, num_shards)) for held in gathered]
    return max(counts), sum(counts)


def require_memory(cluster: Cluster, kind: EngineKind, sizes: RunSizes, num_shards: int) -> Takes:
    """Return what a run takes, if the session has it.

    Args:
        cluster: where it computes.
        kind: the engine.
        sizes: of the run.
        num_shards: S.

    Raises:
        OutOfMemory: one of its processes has too little; with the arithmetic, and the options that would do.
    """
    places, limits = places_of(cluster, kind, num_shards), Limits.of(cluster)
    needed = takes(kind, sizes, places)
    refuse_too_little(kind, needed, limits, places)
    return needed


def at_driver(needed: Takes, places: Places) -> tuple[Copies, ...]:
    """Return what the driver's container or machine holds: Python, JVM, and the workers that are there."""
    return tuple(needed.at_driver(places.workers_per_executor if places.in_driver else 0))


def refuse_too_little(kind: EngineKind, needed: Takes, limits: Limits, places: Places) -> None:
    """Refuse a run that takes more than the limits.

    Raises:
        OutOfMemory: with all that is too little, each with its arithmetic and its option.
    """
    each = places.workers_per_executor
    workers = needed.workers(each)
    worker = _option(limits.cores * total(needed.worker_python))
    rows: list[tuple[str, Sequence[Copies], int | None, str]] = [
        (
            "the heap of the driver",
            needed.driver_heap,
            limits.driver_heap,
            f"--driver-memory {_option(total(needed.driver_heap))}",
        ),
        (
            "the heap of an executor",
            needed.executor_heap,
            limits.executor_heap,
            f"--executor-memory {_option(total(needed.executor_heap))}",
        ),
        (
            "spark.driver.maxResultSize",
            [Copies("results of a job", 1, needed.results)],
            limits.results,
            f"--conf spark.driver.maxResultSize={_option(needed.results)}",
        ),
        (
            "all memory at the driver",
            at_driver(needed, places),
            limits.driver,
            _more_at_driver(needed, limits, places),
        ),
        (
            "all memory of an executor",
            (*workers, *needed.executor_heap),
            limits.executor,
            f"--conf spark.executor.memoryOverhead={_option(total(workers))}, or with fewer --executor-cores",
        ),
        (
            "spark.executor.pyspark.memory of one Python worker",
            needed.worker_python,
            limits.worker,
            f"--conf spark.executor.pyspark.memory={worker}, which Spark divides by spark.executor.cores",
        ),
    ]
    found = [
        f"{where} is {decimal(limit)}, but the run takes {listed(parts)} = {decimal(total(parts))}: submit "
        f"with {remedy}"
        for where, parts, limit, remedy in rows
        if limit is not None and total(parts) > limit
    ]
    if needed.largest_result > LARGEST_RESULT:
        found.append(
            f"the result of one task has {decimal(needed.largest_result)}, but a JVM holds no array above "
            f"{decimal(LARGEST_RESULT)}: use "
            + ("more engine.num_workers" if kind is ALLREDUCE else 'engine.name = "allreduce"')
        )
    if found:
        raise OutOfMemory(f"{kind} takes more memory than there is. " + ". ".join(found))


def _more_at_driver(needed: Takes, limits: Limits, places: Places) -> str:
    """Return what gives the driver's container or machine more memory, or asks less of it."""
    if not places.in_driver:
        return (
            "a driver on a larger machine; on YARN and Kubernetes --conf spark.driver.memoryOverhead="
            + _option(total(needed.driver_python))
        )
    if total(needed.at_driver()) > limits.driver:
        return "a larger machine, or fewer parameters"
    return "fewer engine.num_workers, or a larger machine"


def _option(needed: int) -> str:
    """Return a size for an option of spark-submit, with a little to spare."""
    return f"{-(-int(1.05 * needed) // (_STEP_MIB * _MIB)) * _STEP_MIB}m"


def warn_of_slow_results(cluster: Cluster, largest: int) -> None:
    """Warn of results that are too large for Spark to send directly.

    Args:
        cluster: has the settings.
        largest: bytes of a task's result.
    """
    conf = cluster.context._jsc.sc().conf()
    message = int(conf.get("spark.rpc.message.maxSize", "128")) * _MIB
    direct = min(message, int(conf.getSizeAsBytes("spark.task.maxDirectResultSize", f"{message}b")))
    if largest > direct:
        needed = -(-largest // _MIB) + 1  # a result has a frame
        log.warning(
            "a task's result has %s, but the smaller of spark.task.maxDirectResultSize and "
            "spark.rpc.message.maxSize is %s: results go through the block manager, which is slow; submit "
            "with --conf spark.task.maxDirectResultSize=%dm --conf spark.rpc.message.maxSize=%d",
            decimal(largest),
            decimal(direct),
            needed,
            max(needed, message // _MIB),
        )
