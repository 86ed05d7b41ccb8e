"""What the engines on Spark have in common: workers are tasks over shards, asked again where one was lost.

A request is a transaction: what fails on the way (a lost executor, a shard's file that is gone)
changed nothing, is mended, and is asked again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pyspark import RDD, Broadcast, cloudpickle

from sparksgd.compute import Answer, Evaluation, Plan
from sparksgd.config import EngineConfig
from sparksgd.engines.protocol import Recovery, Shards, StepTiming
from sparksgd.errors import Cancelled, ClusterError, PeerLost, ShardMissing, SparkSGDError
from sparksgd.flat import Weights
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
    session_stopped,
    worker_of_partition,
)
from sparksgd.spark.lost_executors import advice_of
from sparksgd.spark.rows import SparkShards
from sparksgd.spark.step_rdd import StepRDD

__all__ = ["Exchange", "SparkEngine", "destroy"]

log = logging.getLogger("sparksgd")

T = TypeVar("T")


class SparkEngine:
    """The workers of a run.

    Args:
        cluster: where they are.
        config: how often something is tried.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

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
        self.recovery = Recovery()
        self._cluster = cluster
        self._context = cluster.context
        self._max_attempts = config.max_attempts
        self._step_timeout_s = config.step_timeout_s
        self._shards = shards
        self._test = test
        self._plan = plan
        self._workers = worker_of_partition(cluster.num_workers)
        self._prepare(config)
        self._behind = ThreadPoolExecutor(1, "sparksgd-cleanup")
        self._ship(plan)

    def _ship(self, plan: Plan) -> None:
        """Broadcast what the workers compute."""
        self._plan = plan
        self._shipped = self._context.broadcast(step_tasks.ShippedPlan(_pickled(plan)))

    def _prepare(self, config: EngineConfig) -> None:
        """Refuse what cannot work, and open what the engine needs, before anything is shipped."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove the plan from driver and executors."""
        self._behind.shutdown()
        with cleanup():
            self._shipped.destroy()

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Go on with the same rows in other shards."""
        plan, shards = deal()
        assert isinstance(shards, SparkShards)
        before, self._shards = self._shipped, shards
        self._ship(plan)
        destroy(before)

    def contact(self) -> list[Numerics]:
        """Reach every worker once, and return their numerics, in their order."""
        self._context.setJobDescription("sparksgd: first contact")
        task = partial(step_tasks.contact, self._shipped, self._workers)

        def job() -> list[tuple[int, Numerics]]:
            return self._map(self._shards, task).collect()

        answers = self._run(job, self._shards, "first contact", self._step_timeout_s)
        return [numerics for _, numerics in sorted(answers, key=lambda answer: answer[0])]

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
            return self._run(job, shards, doing, None if step is None else self._step_timeout_s)
        finally:
            self._behind.submit(destroy, broadcast)  # 1 ms that the next step need not wait for

    def _map(self, shards: SparkShards, task: Callable[[int, Iterable[Descriptor]], Iterable[T]]) -> RDD[T]:
        """Return the RDD of a task over the workers' shards, in barrier mode."""
        return StepRDD(shards.rdd, task, self._cluster.num_workers)

    def _await_slots(self) -> None:
        """Wait for the slots that a job needs."""
        self._cluster.wait_for_slots(self._cluster.num_workers)

    def _recover(self, shards: SparkShards, missing: tuple[int, ...]) -> None:
        """Write lost shards again; what an executor took with it, of all rows at once."""
        with self._cluster.job_watch.over(1):
            self.recovery.rebuilt_shards += shards.recover(missing)
            for others in (self._shards, self._test):
                if others not in (None, shards) and not missing:
                    self.recovery.rebuilt_shards += others.recover(())

    def _run(self, job: Callable[[], T], shards: SparkShards, doing: str, limit_s: float | None = None) -> T:
        """Run a job, again where an executor or a shard's file was lost, or its tasks ran too long."""
        failure, watched = "", None
        missing: tuple[int, ...] = ()
        for attempt in range(self._max_attempts):
            try:
                if attempt:
                    self.recovery.retries += 1
                    self._await_slots()
                    self._recover(shards, missing)
                    self._context.setJobDescription(f"sparksgd: {doing}, tried again")
                with self._cluster.job_watch.over(self._cluster.num_workers, limit_s) as watched:
                    return job()
            except ShardMissing as error:
                failure, missing = str(error), error.shards
            except PeerLost as error:
                failure, missing = str(error), ()
            except SparkSGDError:
                raise
            except KeyboardInterrupt:
                cancel_jobs(self._context, self._cluster.run_id)
                raise
            except Exception as error:
                failure, missing, final = str(error), (), final_error(error, self._context)
                if watched is not None and watched.expired:
                    failure = (
                        f"its tasks ran for {limit_s:g} s, and were taken for hung (engine.step_timeout_s)"
                    )
                    final = None
                if final is None and self._cluster.is_stopped():
                    final = session_stopped(self._context, doing)
                if isinstance(final, Cancelled):
                    cancel_jobs(self._context, self._cluster.run_id)
                if final is not None:
                    raise final from error
            with cleanup():
                self._cluster.lost_executors.look()
            log.warning("%s: failed and is tried again: %s", doing, gist(failure))
        advice = advice_of(self._context)
        raise ClusterError(
            f"{doing}: failed {self._max_attempts} times, as often as engine.max_attempts allows"
            f"{f', because {advice}' if advice else ''}. The last failure:\n{failure}"
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

    def timing(self, started: float, arrived: float) -> StepTiming:
        """Return where the seconds of a step went that ends now.

        Args:
            started: when it began, by `time.perf_counter`.
            arrived: when its sum had arrived.
        """
        ended = time.perf_counter()
        return StepTiming(
            total=ended - started,
            broadcast=self.broadcast_s,
            launch=self.launch_s,
            compute=self.compute_s,
            aggregate=self.aggregate_s,
            update=ended - arrived,
        )


def destroy(broadcast: Broadcast[Any]) -> None:
    """Remove a broadcast from driver and executors."""
    with cleanup():
        broadcast.destroy()


def _pickled(plan: Plan) -> bytes:
    """Pickle a plan; classes of a notebook or of `__main__` go by value."""
    pickled: bytes = cloudpickle.dumps(plan)  # type: ignore[no-untyped-call]  # untyped in pyspark
    return pickled
