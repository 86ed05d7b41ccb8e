"""What the engines on Spark have in common: workers are tasks over shards, and a failed request is retried.

A request is a transaction.  If it fails (an executor is lost, or the file of a shard), nothing has changed;
lost shards are rebuilt, and the request is made again.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from pyspark import RDD, Broadcast, SparkContext, cloudpickle

from sparksgd.arithmetic.copies import pickled
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.config import EngineConfig
from sparksgd.data.shard import Descriptor
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.protocol import Recovery, SegmentReport, ShardStates, StepTiming
from sparksgd.engines.replies import Evaluation, Reply
from sparksgd.errors import Cancelled, ClusterError, OutOfMemory, PeerLost, ShardMissing, SparkSGDError
from sparksgd.imports.same_code import Pickled
from sparksgd.solvers.protocol import CentralSolver, RoundSolver
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.environments import cannot_start
from sparksgd.spark.cluster.failures import final_error, gist, session_stopped
from sparksgd.spark.cluster.jobs import Watched, cancel_jobs, cleanup
from sparksgd.spark.cluster.lost_executors import advice_of
from sparksgd.spark.cluster.placement import worker_of_partition
from sparksgd.spark.cluster.shards import SparkShards
from sparksgd.spark.cluster.users_modules import code_for, computing
from sparksgd.spark.engines.step_rdd import StepRDD
from sparksgd.spark.tasks import step_tasks

__all__ = ["DYING_S", "Exchange", "SparkEngine", "destroy", "forget_results"]

log = logging.getLogger("sparksgd")

T = TypeVar("T")

DYING_S = 5.0
"""A killed container's folder goes before its executor does, which fails all tasks until then.  YARN took two
seconds to notice."""

_LITTLE_BYTES = 16 << 20


class SparkEngine:
    """The workers of a run.

    Args:
        cluster: where they are.
        config: how often a request is tried.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name: str
    mode: str
    segment_steps: int

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
        self._shipped: Broadcast[step_tasks.ShippedPlan]
        self._is_open = self._has_contact = False
        self._config = config
        self._workers = worker_of_partition(cluster.num_workers)
        self._behind = ThreadPoolExecutor(1, "sparksgd-cleanup")
        self._results_bytes = cluster.num_workers * sum(p.nbytes for p in plan.module.parameters())
        self._held_bytes = 0
        self._code: dict[str, str] | None = None

    def _ship(self, plan: Plan) -> None:
        """Broadcast what the workers compute."""
        self._plan = plan
        self._shipped = self._context.broadcast(step_tasks.ShippedPlan(self._pickled(plan)))
        self._is_open = True

    def _pickled(self, plan: Plan) -> Pickled:
        """Pickle a plan; classes of a notebook or of `__main__` are pickled by value."""
        if self._code is None:  # later on, files may have been changed
            self._code = code_for(self._cluster.users_modules, self._context)
            computing[self] = self._context.applicationId
        return Pickled(pickled(plan, {"": plan.module, "loss": plan.loss}, cloudpickle.Pickler), self._code)

    @staticmethod
    def check(cluster: Cluster, config: EngineConfig) -> None:
        """Refuse what cannot work at the driver, before the rows are dealt."""

    def open(self) -> None:
        """Refuse what cannot work, open what the engine needs, and send out the plan; only once."""
        if not self._is_open:
            self._ship(self._plan)

    def obstacle(self) -> str | None:
        """Return why the opened engine cannot work here; None: it can."""
        return None

    def close(self) -> None:
        """Remove the plan from driver and executors."""
        computing.pop(self, None)
        self._behind.shutdown()
        if self._is_open:
            destroy(self._shipped)

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Continue with the same rows in other shards."""
        plan, shards = deal()
        assert isinstance(shards, SparkShards)
        before, self._shards = self._shipped, shards
        self._ship(plan)
        destroy(before)

    @staticmethod
    def shard_states() -> ShardStates:
        """Return nothing: no engine on Spark carries rounds whose shards keep a state."""
        return {}

    def go_on(self, solver: Any, turns: Mapping[int, int], shards: ShardStates) -> None:
        """Go on as from the beginning: all that the next step depends on is the solver's."""

    def contact(self) -> list[Numerics]:
        """Reach every worker once, and return their numerics, in their order."""
        self._context.setJobDescription("sparksgd: first contact")
        task = partial(step_tasks.contact, self._shipped, self._workers)

        def job() -> list[tuple[int, Numerics]]:
            return self._map(self._shards, task).collect()

        answers = self._run(job, self._shards, "first contact", self._step_timeout_s)
        self._has_contact = True
        return [numerics for _, numerics in sorted(answers, key=lambda answer: answer[0])]

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        """Make steps; if this raises, the solver is as after the last complete step."""
        raise NotImplementedError

    def evaluate(self, solver: CentralSolver) -> Evaluation:
        """Evaluate the solver's weights on the test rows."""
        assert self._test is not None
        weights = solver.readout()
        exchange = self._ask(
            self._test, weights, step_tasks.evaluate, f"evaluation of version {solver.version}", limit_s=None
        )
        total = exchange.reply.total()
        assert isinstance(total, Evaluation)
        return total

    def _ask(
        self, shards: SparkShards, asked: Any, task_of: Callable[..., Any], doing: str, limit_s: float | None
    ) -> Exchange:
        """Ask all workers; again, if an executor or a file was lost.

        Args:
            shards: of the workers.
            asked: what is sent to all of them.
            task_of: the task; its first arguments are the plan, `asked`, and the workers of the partitions.
            doing: for Spark's pages, and for errors.
            limit_s: how long the tasks may run.
        """
        self._context.setJobDescription(f"sparksgd: {doing}")
        before = time.time()
        broadcast = self._context.broadcast(asked)
        submitted = time.time()

        def job() -> Exchange:
            task = partial(task_of, self._shipped, broadcast, self._workers)
            reply: Reply = self._map(shards, task).treeAggregate(None, step_tasks.add, step_tasks.add)  # type: ignore[misc]  # None is the zero value, which is part of the closure
            arrived = time.time()
            if reply.failure is not None:
                raise reply.failure
            return Exchange(
                reply=reply,
                broadcast_s=submitted - before,
                submitted_at_s=submitted,
                arrived_at_s=arrived,
            )

        try:
            return self._run(job, shards, doing, limit_s)
        finally:
            self._clear_behind(broadcast)

    def _clear_behind(self, broadcast: Broadcast[Any] | None) -> None:
        """Remove what a job leaves at the driver, while the next step is made: it takes some milliseconds."""
        if broadcast is not None:
            self._behind.submit(destroy, broadcast)
        self._held_bytes += self._results_bytes
        if self._held_bytes >= _LITTLE_BYTES:  # to forget costs a small model's step two percent
            self._held_bytes = 0
            self._behind.submit(forget_results, self._context)

    def _map(self, shards: SparkShards, task: Callable[[int, Iterable[Descriptor]], Iterable[T]]) -> RDD[T]:
        """Return the RDD of a task over the workers' shards, in barrier mode."""
        return StepRDD(shards.rdd, task, self._cluster.num_workers)

    def _map_in_place(
        self, shards: SparkShards, task: Callable[[int, Iterable[Descriptor]], Iterable[T]]
    ) -> RDD[T]:
        """Return the RDD of a task in an ordinary stage; for test shards, with at most as many tasks."""
        if shards is not self._test:
            return shards.rdd.mapPartitionsWithIndex(task)
        places, partition_of = shards.places(), shards.partition_of
        at_place: dict[str | None, list[Descriptor]] = {}
        for descriptor in shards.table:
            at_place.setdefault(places[partition_of[descriptor.shard]], []).append(descriptor)
        slots = min(self._cluster.slots(), self._cluster.num_workers)
        tasks = max(1, slots // max(1, len(at_place)))
        placed = [
            self._cluster.at_place(mine[number::tasks], place)
            for place, mine in at_place.items()
            for number in range(min(tasks, len(mine)))
        ]
        flat = self._cluster.placed_rdd(placed).mapPartitions(chain.from_iterable)
        return flat.mapPartitionsWithIndex(task)

    def _await_slots(self) -> None:
        """Wait for the slots that a job needs."""
        self._cluster.wait_for_slots(self._cluster.num_workers)

    def _watch(self, needed: int, limit_s: float | None = None) -> AbstractContextManager[Watched]:
        """Watch the job that the block runs."""
        return self._cluster.job_watch.over(needed, limit_s)

    def _recover(self, shards: SparkShards, missing: tuple[int, ...]) -> None:
        """Write lost shards again; if an executor was lost, those of all rows, training and test."""
        with self._watch(1):
            self.recovery.rebuilt_shards += shards.recover(missing)
            for others in (self._shards, self._test):
                if others not in (None, shards) and not missing:
                    self.recovery.rebuilt_shards += others.recover(())

    def _is_dying(self, error: Exception) -> bool:
        """Return whether a failure may be that of an executor whose container was killed."""
        return self._has_contact and cannot_start(str(error)) is not None

    def _run(self, job: Callable[[], T], shards: SparkShards, doing: str, limit_s: float | None = None) -> T:
        """Run a job; again, if an executor or a shard's file was lost, or its tasks ran too long."""
        failure, watched = "", None
        killed = self._cluster.lost_executors.killed_for_memory
        missing: tuple[int, ...] = ()
        is_dying = False
        for attempt in range(self._max_attempts):
            try:
                if is_dying:
                    time.sleep(DYING_S)
                if attempt:
                    self.recovery.retries += 1
                    self._await_slots()
                    self._recover(shards, missing)
                    self._context.setJobDescription(f"sparksgd: {doing}, tried again")
                with self._watch(self._cluster.num_workers, limit_s) as watched:
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
                    failure = f"its tasks ran for {limit_s:g} s, and counted as hung (engine.step_timeout_s)"
                    final = None
                is_dying = self._is_dying(error)
                if is_dying and attempt + 1 < self._max_attempts:
                    final = None
                if final is None and self._cluster.is_stopped():
                    final = session_stopped(self._context, doing)
                if isinstance(final, Cancelled):
                    cancel_jobs(self._context, self._cluster.run_id)
                if final is not None:
                    raise final from error
            with cleanup():
                self._cluster.lost_executors.look()
            if self._cluster.lost_executors.killed_for_memory > killed:
                raise OutOfMemory(f"{doing}: failed, because {advice_of(self._context)}")
            log.warning("%s: failed and is tried again: %s", doing, gist(failure))
        advice = advice_of(self._context)
        raise ClusterError(
            f"{doing}: failed {self._max_attempts} times, as often as engine.max_attempts allows"
            f"{f', because {advice}' if advice else ''}. The last failure:\n{failure}"
        )


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A request to all workers, and its answer; times by the clocks of driver and workers."""

    reply: Reply
    broadcast_s: float
    submitted_at_s: float
    arrived_at_s: float

    @property
    def compute_s(self) -> float:
        """Return the seconds of the slowest worker."""
        return max(worker.compute_s for worker in self.reply.workers)

    @property
    def launch_s(self) -> float:
        """Return the seconds from submission to the start of the last worker; at least 0."""
        started = max(worker.started_at_s for worker in self.reply.workers)
        return max(0.0, started - self.submitted_at_s)

    @property
    def aggregate_s(self) -> float:
        """Return the seconds from the end of the last worker to the sum; at least 0."""
        ended = max(worker.ended_at_s for worker in self.reply.workers)
        return max(0.0, self.arrived_at_s - ended)

    def timing(self, started: float, arrived: float) -> StepTiming:
        """Return the timing of a step that ends now.

        Args:
            started: when the step began, by `time.perf_counter`.
            arrived: when its sum had arrived, by the same clock.
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


def forget_results(context: SparkContext) -> None:
    """Let the driver's JVM free what jobs have returned.

    Its arrays live as long as PySpark's objects do.  These are in cycles, which Python collects some steps
    later; and py4j tells Java up to a second after that.  Of a large model that would be gigabytes.
    """
    with cleanup(), suppress(IndexError):
        gc.collect(1)  # what was made since the last step, also if Python has looked at it once
        client: Any = context._gateway._gateway_client  # type: ignore[union-attr]  # of a running context
        waiting: deque[Any] = getattr(client, "finalizer_deque", deque())  # none without pinned threads
        while True:
            task = waiting.pop()
            if not isinstance(task, tuple):  # py4j ends its own thread by it
                waiting.append(task)
                return
            owner, target = task
            owner.garbage_collect_object(target, False)
