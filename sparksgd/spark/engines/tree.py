"""The tree engine: one barrier-mode Spark job per step.

    driver ── broadcast(answer) ───> workers: mapPartitions over their shards, in barrier mode
    driver <── treeAggregate ─────── {node of the addition tree: sum of messages}
    driver: solver.receive(sum)

Spark's aggregation adds in its own order.  So it merges partial sums by node of our tree, and only siblings
are added.

A step is a transaction.  If it fails (an executor is lost, or the file of a shard), the solver does not
change, and the step is tried again.
"""

from __future__ import annotations

import logging
import time
from functools import partial

import numpy as np
from rich.filesize import decimal

from sparksgd.arithmetic.addition_tree import nodes_of
from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.engines.compute import Plan
from sparksgd.engines.kinds import TREE
from sparksgd.engines.protocol import SegmentReport, take_step
from sparksgd.errors import ClusterError
from sparksgd.solvers.protocol import RoundSolver
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.placement import reduce_groups, worker_of_partition
from sparksgd.spark.engines.base import SparkEngine
from sparksgd.spark.tasks import step_tasks

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

    name = TREE.name
    mode = TREE.mode
    segment_steps = 1

    def open(self) -> None:
        """Refuse sizes above Spark's limits, and send the plan to the workers."""
        most, count = _partials(self._cluster.num_workers, len(self._plan.sampling.shard_rows))
        check_sizes(self._cluster, self._plan, most, count)
        super().open()

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        """Make steps."""
        report = SegmentReport()
        sampling, workers = self._plan.sampling, self._cluster.num_workers
        for _ in range(steps):
            started = time.perf_counter()
            answer, asked = solver.answer(), solver.quorum().shards
            rows = sampling.rows_of_round(range(answer.turn, answer.turn + answer.turns))
            exchange = self._ask(
                self._shards,
                step_tasks.Round(answer=answer, asked=asked),
                step_tasks.make_round,
                f"step {solver.version + 1} (epoch {sampling.epoch_of(answer.turn) + 1}): gradients of "
                f"{rows} rows on {workers} workers",
                limit_s=self._step_timeout_s * answer.turns,
            )
            timing = partial(exchange.timing, started, time.perf_counter())
            report.steps.append(take_step(solver, self._plan, exchange.reply, timing))
        return report


def _partials(num_workers: int, num_shards: int) -> tuple[int, int]:
    """Return how many partial sums reach the driver: at most in one result, and in all."""
    groups = reduce_groups(num_workers)
    gathered: list[list[int]] = [[] for _ in range(groups)]
    for partition, worker in enumerate(worker_of_partition(num_workers)):
        gathered[partition % groups] += balanced_range(worker, num_workers, num_shards)
    counts = [len(nodes_of(held, num_shards)) for held in gathered]
    return max(counts), sum(counts)


def check_sizes(cluster: Cluster, plan: Plan, most: int, count: int) -> None:
    """Refuse gradients that are too large for Spark's limits or the driver's heap.

    Args:
        cluster: has the limits.
        plan: has the sizes.
        most: partial sums in one task's result.
        count: partial sums that reach the driver in a step.
    """
    trained = sum(parameter.numel() for parameter in plan.module.parameters() if parameter.requires_grad)
    size = trained * np.dtype(np.float32).itemsize * plan.halves.vectors
    limits = cluster.context._jsc.sc().conf()
    results = int(limits.getSizeAsBytes("spark.driver.maxResultSize", "1g"))
    arithmetic = f"a step returns {count} partial sums of {decimal(size)} to the driver"
    if results and count * size > results:
        raise ClusterError(
            f"{arithmetic}, {decimal(count * size)}, but spark.driver.maxResultSize is "
            f"{decimal(results)}: raise it, or use fewer engine.num_workers"
        )
    heap = cluster.driver_heap_bytes
    needed = (count + 2) * size  # with the weights twice: in transfer, and as blocks of a broadcast
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
            "spark.rpc.message.maxSize is %s: results go through the block manager, which is slow; raise it",
            decimal(most * size),
            decimal(direct),
        )
