"""The tree engine: one barrier-mode Spark job per step.

    driver ── broadcast(weights) ──> workers: mapPartitions over their shards, in barrier mode
    driver <── treeAggregate ─────── {node of the addition tree: gradient sum}
    driver: solver.receive(sum)

Spark's own aggregation adds in an order of its own, so what it merges are partial sums by node of
our tree, which combine with their siblings only.

A step is a transaction: what fails on the way (a lost executor, a shard's file that is gone) leaves
the solver as it was, and the step is tried again.
"""

from __future__ import annotations

import logging
import time
from functools import partial

import numpy as np
from rich.filesize import decimal

from sparksgd.compute import Plan
from sparksgd.config import EngineConfig
from sparksgd.engines.protocol import SegmentReport, take_step
from sparksgd.engines.spark import SparkEngine
from sparksgd.errors import ClusterError
from sparksgd.ranges import balanced_range
from sparksgd.solvers.protocol import Solver
from sparksgd.spark.cluster import (
    Cluster,
    reduce_groups,
    worker_of_partition,
)
from sparksgd.treesum import nodes_of

__all__ = ["TreeEngine", "check_sizes"]

log = logging.getLogger("sparksgd")


class TreeEngine(SparkEngine):
    """Runs each step as one Spark job.

    Args:
        cluster: where the workers are.
        config: how often a step is tried.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = "tree"
    mode = "a barrier stage for each step"
    segment_steps = 1

    def _prepare(self, config: EngineConfig) -> None:
        most, count = _partials(self._cluster.num_workers, len(self._plan.sampling.shard_rows))
        check_sizes(self._cluster, self._plan, most, count)

    def advance(self, solver: Solver, steps: int) -> SegmentReport:
        """Make steps."""
        report = SegmentReport()
        sampling = self._plan.sampling
        for _ in range(steps):
            started = time.perf_counter()
            step, rows = solver.step, sampling.rows_of_step(solver.step)
            weights = solver.weights()
            exchange = self._ask(
                self._shards,
                weights,
                step,
                f"step {step + 1} (epoch {sampling.epoch_of(step) + 1}): gradients of "
                f"{rows} rows on {self._cluster.num_workers} workers",
            )
            arrived = time.perf_counter()

            timing = partial(exchange.timing, started, arrived)
            report.steps.append(take_step(solver, self._plan, exchange.answer, timing))
        return report


def _partials(num_workers: int, num_shards: int) -> tuple[int, int]:
    """Return how many partial sums reach the driver: in one result at most, and in all."""
    groups = reduce_groups(num_workers)
    gathered: list[list[int]] = [[] for _ in range(groups)]
    for partition, worker in enumerate(worker_of_partition(num_workers)):
        gathered[partition % groups] += balanced_range(worker, num_workers, num_shards)
    counts = [len(nodes_of(held, num_shards)) for held in gathered]
    return max(counts), sum(counts)


def check_sizes(cluster: Cluster, plan: Plan, most: int, count: int) -> None:
    """Refuse gradients that Spark's limits, or the driver's heap, cannot hold.

    Args:
        cluster: whose limits.
        plan: of what size.
        most: partial sums in one task's result.
        count: partial sums that reach the driver in a step.
    """
    trained = sum(parameter.numel() for parameter in plan.module.parameters() if parameter.requires_grad)
    size = trained * np.dtype(np.float32).itemsize
    limits = cluster.context._jsc.sc().conf()
    results = int(limits.getSizeAsBytes("spark.driver.maxResultSize", "1g"))
    arithmetic = f"a step returns {count} partial sums of {decimal(size)} to the driver"
    if results and count * size > results:
        raise ClusterError(
            f"{arithmetic}, {decimal(count * size)}, but spark.driver.maxResultSize is "
            f"{decimal(results)}: raise it, or use fewer engine.num_workers"
        )
    heap = cluster.driver_heap_bytes
    needed = (count + 2) * size  # and the weights, once on their way and once as a broadcast's blocks
    if needed > 0.8 * heap:
        raise ClusterError(
            f"{arithmetic}, beside two copies of the weights: {decimal(needed)}, but the driver's heap "
            f"is {decimal(heap)}: submit with --driver-memory {-(-2 * needed >> 30)}g"
        )
    message = int(limits.get("spark.rpc.message.maxSize", "128")) << 20
    direct = min(message, int(limits.getSizeAsBytes("spark.task.maxDirectResultSize", f"{message}b")))
    if most * size > direct:
        log.warning(
            "a task's result has %s, but the smaller of spark.task.maxDirectResultSize and "
            "spark.rpc.message.maxSize is %s: results take the slower way by the block manager; raise it",
            decimal(most * size),
            decimal(direct),
        )
