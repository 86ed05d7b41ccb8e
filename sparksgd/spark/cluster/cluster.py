"""The cluster of a run: a Spark session as the place of its workers."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from pyspark import RDD
from pyspark.sql import SparkSession

from sparksgd.arithmetic.instruction_set import HELD_BY
from sparksgd.config import EngineConfig
from sparksgd.errors import ClusterError
from sparksgd.spark.cluster.environments import NEEDED, ExecutorPython, by_value, own_version, require_fit
from sparksgd.spark.cluster.failures import is_stopped
from sparksgd.spark.cluster.jobs import (
    JobWatch,
    RunTasks,
    cleanup,
    keep_names,
    no_locality_wait,
    spark_job,
)
from sparksgd.spark.cluster.lost_executors import LostExecutors
from sparksgd.spark.cluster.placement import Placement
from sparksgd.spark.cluster.slots import Slots, WorkerDemand
from sparksgd.spark.tasks import environment_tasks

__all__ = ["Cluster", "is_connect", "job_on", "refuse_connect"]

log = logging.getLogger("sparksgd")

T = TypeVar("T")


class Cluster:
    """A Spark session as the place of a run's workers; call `settle` before their first job.

    Args:
        session: the user's or ours.
        demand: what the run asks for.
        run_id: the group of the run's jobs; None for a new one.

    Raises:
        ClusterError: the session is Spark Connect.
    """

    def __init__(self, session: SparkSession, demand: WorkerDemand, run_id: str | None = None) -> None:
        refuse_connect(session)
        self.session = session
        self.context = session.sparkContext
        self.jvm: Any = self.context._jvm
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.lost_executors = LostExecutors(self.context)
        self.placement = Placement(self.context)
        self._slots = Slots(self.context, demand, self.placement)
        self._tasks = RunTasks(self.context, self.run_id)
        self.job_watch = JobWatch(
            self._tasks, self._slots.count, demand.slots_timeout_s, self.lost_executors.look
        )
        self.users_modules: set[str] = set()
        """The modules of the user's that workers import."""
        self._num_workers: int | None = None

    def settle(self) -> None:
        """Refuse a session that does not fit, wait for slots, and settle the number of workers.

        Raises:
            ClusterError: barrier-mode jobs cannot run here, or the session ended meanwhile.
            ConfigError: more workers or threads are asked for than there can be.
            NotEnoughSlots: there are fewer slots than workers, even after the demand's `slots_timeout_s`.
        """
        keep_names(self.jvm)
        self.lost_executors.forget_earlier()
        self._slots.check_settings()
        self._num_workers = self._slots.settled_workers()

    @property
    def num_workers(self) -> int:
        """Return how many workers there are."""
        assert self._num_workers is not None, "settle() comes first"
        return self._num_workers

    @property
    def is_elastic(self) -> bool:
        """Return whether executors are added when tasks wait for them (dynamic allocation)."""
        return self._slots.are_elastic

    @contextmanager
    def job_group(self) -> Iterator[None]:
        """Put all jobs of the block into the run's group; then restore the session's settings.

        During the block no task in the session waits for a slot beside its data.  Spark starts the tasks of a
        barrier-mode job together.  If one waited (3 s by default), all would wait, in every step.
        """
        names = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel")
        before = {name: self.context.getLocalProperty(name) for name in names}
        self.context.setJobGroup(self.run_id, "sparksgd")
        try:
            with no_locality_wait(self.context._jsc.sc()):
                yield
        finally:
            self.job_watch.close()
            with cleanup():
                for name, value in before.items():
                    self.context.setLocalProperty(name, value)  # type: ignore[arg-type]  # None unsets it

    def is_stopped(self) -> bool:
        """Return whether the session has ended, or its JVM is ending after Ctrl-C."""
        return is_stopped(self.context)

    @property
    def driver_heap_bytes(self) -> int:
        """Return how large the driver's heap may grow."""
        return int(self.jvm.java.lang.Runtime.getRuntime().maxMemory())

    @property
    def driver_host(self) -> str:
        """Return the name or address by which executors reach the driver."""
        return str(self.context.getConf().get("spark.driver.host", "127.0.0.1"))

    @property
    def driver_bind_address(self) -> str:
        """Return the address that the driver listens on."""
        return str(self.context.getConf().get("spark.driver.bindAddress", self.driver_host))

    def slots(self) -> int:
        """Return how many tasks can run at once."""
        return self._slots.count()

    def wait_for_slots(self, wanted: int) -> None:
        """Wait until there are this many slots; see `Slots.wait_for`."""
        self._slots.wait_for(wanted)

    def running_tasks(self) -> tuple[int, int]:
        """Return how many tasks run now: of this run, and of other jobs."""
        return self._tasks.running()

    def running_of(self, jobs: Iterable[Any]) -> int:
        """Return how many tasks of these jobs, the JVM's JavaFutureActions, run now."""
        return self._tasks.running_of(jobs)

    def places(self) -> set[str]:
        """Return all executors, as preferred places of tasks."""
        return self.placement.places()

    def at_place(self, element: Any, place: str | None) -> Any:
        """Return an element for `placed_rdd`, with its preferred place; None: any place."""
        return self.placement.at_place(element, place)

    def placed_rdd(self, elements: Sequence[Any]) -> RDD[Any]:
        """Return an RDD with a partition for each of these elements, which prefers the element's place."""
        return self.placement.placed_rdd(elements)

    def visit(self, task: Callable[[Iterable[int]], Iterator[T]]) -> list[T]:
        """Run a small task in every slot at once, which reaches every executor with a free one."""
        slots = max(1, self.slots())
        with self.job_watch.over(1):
            return self.context.parallelize(range(slots), slots).mapPartitions(task).collect()

    def survey(self, packages: Sequence[str]) -> list[dict[str, Any]]:
        """Return what executors say of their Python and their machine, see `environment_tasks.survey`."""
        task = partial(by_value(environment_tasks.survey), NEEDED, HELD_BY, packages)
        with spark_job(self.context, "looking at the executors"):
            return self.visit(task)

    def check_executors(self, instruction_set: str | None = None) -> list[tuple[float, float]]:
        """Refuse executors whose Python cannot train; warn of needless copies of an environment.

        Args:
            instruction_set: what the configuration asks for.

        Returns:
            When each host unpacked its environment, from when to when.

        Raises:
            ConfigError: something is missing there, or of another version.
        """
        conf = self.context.getConf()
        walks = any(conf.get(key, "") for key in ("spark.archives", "spark.yarn.dist.archives"))
        asks_cpu = instruction_set is not None
        task = partial(by_value(environment_tasks.look), NEEDED, HELD_BY, asks_cpu, walks)
        with spark_job(self.context, "looking at the executors' Python"):
            pythons = [ExecutorPython(**answer) for answer in self.visit(task)]
        require_fit(pythons, own_version(), instruction_set)
        found = {(one.host, one.unpacked[:2]): one.unpacked for one in pythons if one.unpacked is not None}
        copies = Counter(host for host, _ in found)
        for host, count in copies.items():
            if count > 1:
                log.warning(
                    "the environment was unpacked %d times on %s, once for each executor: ask for one "
                    "executor of more cores on each host",
                    count, host,
                )  # fmt: skip
        return [(first_s, last_s) for _, _, first_s, last_s in found.values()]


@contextmanager
def job_on(session: SparkSession) -> Iterator[None]:
    """In the block, let a session's jobs be a job of ours: it waits for executors, with a time limit.

    Raises:
        NotEnoughSlots: no executor came.
        ConfigError: the executors' Python lacks something.
    """
    patience_s = EngineConfig().slots_timeout_s
    demand = WorkerDemand(num_workers=1, num_shards=1, barrier=False, slots_timeout_s=patience_s)
    cluster = Cluster(session, demand)
    cluster.settle()
    with cluster.job_group(), cluster.job_watch.over(1):
        cluster.check_executors()
        yield


def is_connect(part: Any) -> bool:
    """Return whether a session, or a DataFrame, is Spark Connect's."""
    return type(part).__module__.startswith("pyspark.sql.connect")


def refuse_connect(session: Any) -> None:
    """Raise ClusterError for a session of Spark Connect."""
    if is_connect(session):
        raise ClusterError(
            "this session is Spark Connect, which has no RDDs, and sparksgd needs them: on "
            "Databricks use dedicated compute (standard and serverless are Connect); elsewhere start "
            "a classic session, without --remote"
        )
