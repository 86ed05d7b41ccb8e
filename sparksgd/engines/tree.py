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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from pyspark import Broadcast, cloudpickle
from rich.filesize import decimal

from sparksgd.compute import Answer, Evaluation, Plan
from sparksgd.config import EngineConfig
from sparksgd.engines.protocol import Recovery, SegmentReport, Shards, StepTiming, take_step
from sparksgd.errors import Cancelled, ClusterError, ShardMissing, SparkSGDError
from sparksgd.flat import FlatModule, Weights
from sparksgd.numerics import Numerics
from sparksgd.shard import Descriptor
from sparksgd.solvers.protocol import Solver
from sparksgd.spark import step_tasks
from sparksgd.spark.cluster import (
    Cluster,
    cancel_jobs,
    cleanup,
    final_error,
    gist,
    reduce_groups,
    worker_of_partition,
    worker_shards,
)
from sparksgd.spark.rows import SparkShards
from sparksgd.spark.step_rdd import StepRDD
from sparksgd.treesum import Partials, add_partial

__all__ = ["TreeEngine"]

log = logging.getLogger("sparksgd")

T = TypeVar("T")


class TreeEngine:
    """Runs each step as one Spark job.

    Args:
        cluster: where the workers are.
        config: how often a step is tried.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    segment_steps = 1

    def __init__(
        self,
        cluster: Cluster,
        config: EngineConfig,
        plan: Plan,
        shards: Shards,
        test: Shards | None,
    ) -> None:
        assert isinstance(shards, SparkShards)
        assert test is None or isinstance(test, SparkShards)
        self._cluster = cluster
        self._context = cluster.context
        self._max_attempts = config.max_attempts
        self._plan = plan
        self._shards = shards
        self._test = test
        self._workers = worker_of_partition(cluster.num_workers)
        self.recovery = Recovery()
        _check_sizes(cluster, plan)
        self._shipped = self._context.broadcast(step_tasks.ShippedPlan(_pickled(plan)))
        self._behind = ThreadPoolExecutor(1, "sparksgd-cleanup")

    def close(self) -> None:
        """Remove the plan from driver and executors."""
        self._behind.shutdown()
        with cleanup():
            self._shipped.destroy()

    def contact(self) -> list[Numerics]:
        """Reach every worker once, and return their numerics, in their order."""
        self._context.setJobDescription("sparksgd: first contact")
        task = partial(step_tasks.contact, self._shipped, self._workers)

        def job() -> list[tuple[int, Numerics]]:
            return self._map(self._shards, task).collect()

        answers = self._run(job, self._shards, "first contact")
        return [numerics for _, numerics in sorted(answers, key=lambda answer: answer[0])]

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

            def timing(
                started: float = started, arrived: float = arrived, exchange: Exchange = exchange
            ) -> StepTiming:
                ended = time.perf_counter()
                return StepTiming(
                    total=ended - started,
                    broadcast=exchange.broadcast_s,
                    launch=exchange.launch_s,
                    compute=exchange.compute_s,
                    aggregate=exchange.aggregate_s,
                    update=ended - arrived,
                )

            report.steps.append(take_step(solver, self._plan, exchange.answer, timing))
        return report

    def evaluate(self, solver: Solver) -> Evaluation:
        """Evaluate the solver's weights on the test rows."""
        assert self._test is not None
        exchange = self._ask(self._test, solver.weights(), None, f"evaluation of version {solver.step}")
        total = exchange.answer.total()
        assert isinstance(total, Evaluation)
        return total

    def _ask(self, shards: SparkShards, weights: Weights, step: int | None, doing: str) -> Exchange:
        """Ask all workers, again where an executor or a file was lost."""
        self._context.setJobDescription(f"sparksgd: {doing}")
        before = time.time()
        broadcast = self._context.broadcast(weights)
        submitted = time.time()

        def job() -> Exchange:
            task = partial(step_tasks.answer, self._shipped, broadcast, self._workers, step)
            answer: Answer = self._map(shards, task).treeAggregate(None, step_tasks.add, step_tasks.add)  # type: ignore[misc]  # None is the zero: it travels in the closure
            arrived = time.time()
            if answer.failure is not None:
                raise answer.failure
            return Exchange(
                answer=answer,
                broadcast_s=submitted - before,
                submitted_at_s=submitted,
                arrived_at_s=arrived,
            )

        try:
            return self._run(job, shards, doing)
        finally:
            self._behind.submit(_destroy, broadcast)  # 1 ms that the next step need not wait for

    def _map(
        self, shards: SparkShards, task: Callable[[int, Iterable[Descriptor]], Iterable[T]]
    ) -> StepRDD[Descriptor, T]:
        """Return the barrier-mode RDD of a task over the workers' shards."""
        return StepRDD(shards.rdd, task, self._cluster.num_workers)

    def _recover(self, shards: SparkShards, missing: tuple[int, ...]) -> None:
        """Write lost shards again; what an executor took with it, of all rows at once."""
        with self._cluster.slot_watch.over(1):
            self.recovery.rebuilt_shards += shards.recover(missing)
            for others in (self._shards, self._test):
                if others not in (None, shards) and not missing:
                    self.recovery.rebuilt_shards += others.recover(())

    def _run(self, job: Callable[[], T], shards: SparkShards, doing: str) -> T:
        """Run a job, again where an executor or a shard's file was lost."""
        failure = ""
        missing: tuple[int, ...] = ()
        for attempt in range(self._max_attempts):
            try:
                if attempt:
                    self.recovery.retries += 1
                    self._cluster.wait_for_slots()
                    self._recover(shards, missing)
                    self._context.setJobDescription(f"sparksgd: {doing}, tried again")
                with self._cluster.slot_watch.over(self._cluster.num_workers):
                    return job()
            except ShardMissing as error:
                failure, missing = str(error), error.shards
            except SparkSGDError:
                raise
            except KeyboardInterrupt:
                cancel_jobs(self._context, self._cluster.run_id)
                raise
            except Exception as error:
                failure, missing = str(error), ()
                final = final_error(error)
                if final is None and self._cluster.is_stopped():
                    final = ClusterError(f"the Spark session was stopped during the run, in {doing}")
                if isinstance(final, Cancelled):
                    cancel_jobs(self._context, self._cluster.run_id)
                if final is not None:
                    raise final from error
            log.warning("%s: failed and is tried again: %s", doing, gist(failure))
        raise ClusterError(
            f"{doing}: failed {self._max_attempts} times, as often as engine.max_attempts allows. The "
            f"last failure:\n{failure}"
        )


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request to all workers, answered; times by the clocks of driver and workers."""

    answer: Answer
    broadcast_s: float
    submitted_at_s: float
    arrived_at_s: float

    @property
    def compute_s(self) -> float:
        """The slowest worker's work."""
        return max(worker.compute_s for worker in self.answer.workers)

    @property
    def launch_s(self) -> float:
        """From submission to the last worker's start; 0 where another host's clock is ahead."""
        started = max(worker.started_at_s for worker in self.answer.workers)
        return max(0.0, started - self.submitted_at_s)

    @property
    def aggregate_s(self) -> float:
        """From the last worker's end to the sum at the driver; 0 where its clock is ahead."""
        ended = max(worker.ended_at_s for worker in self.answer.workers)
        return max(0.0, self.arrived_at_s - ended)


def _destroy(broadcast: Broadcast[Weights]) -> None:
    with cleanup():
        broadcast.destroy()


def _pickled(plan: Plan) -> bytes:
    """Pickle a plan; classes of a notebook or of `__main__` go by value."""
    pickled: bytes = cloudpickle.dumps(plan)  # type: ignore[no-untyped-call]  # untyped in pyspark
    return pickled


def _partials(num_workers: int, num_shards: int) -> tuple[int, int]:
    """Return how many partial sums reach the driver: in one result at most, and in all."""
    groups = reduce_groups(num_workers)
    gathered: list[Partials] = [{} for _ in range(groups)]
    for partition, worker in enumerate(worker_of_partition(num_workers)):
        for shard in worker_shards(worker, num_workers, num_shards):
            add_partial(gathered[partition % groups], (shard, shard + 1), None, num_shards)
    return max(map(len, gathered)), sum(map(len, gathered))


def _check_sizes(cluster: Cluster, plan: Plan) -> None:
    """Refuse gradients that Spark's limits, or the driver's heap, cannot hold."""
    size = FlatModule(plan.module, plan.dtype).parameters.numel() * np.dtype(np.float32).itemsize
    most, count = _partials(cluster.num_workers, len(plan.sampling.shard_rows))
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
