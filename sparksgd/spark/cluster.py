"""What the cluster offers: slots for workers, and the checks that Spark would make in silence."""

from __future__ import annotations

import logging
import pickle
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Any, TypeVar

from pyspark import RDD, SparkConf, SparkContext
from pyspark.serializers import CPickleSerializer
from pyspark.sql import SparkSession

from sparksgd.config import Config
from sparksgd.errors import (
    Cancelled,
    ClusterError,
    ConfigError,
    ModelError,
    NotEnoughSlots,
    SparkSGDError,
    UserCodeError,
)
from sparksgd.spark import environment_tasks
from sparksgd.spark.lost_executors import LostExecutors, advice_of, memory_advice
from sparksgd.spark.step_rdd import keep_names
from sparksgd.treesum import partials_sent, useful_workers

__all__ = [
    "Cluster",
    "JobWatch",
    "cancel_jobs",
    "cleanup",
    "final_error",
    "gist",
    "is_elastic",
    "reduce_groups",
    "refuse_connect",
    "session_stopped",
    "spark_job",
    "worker_of_partition",
]

log = logging.getLogger("sparksgd")

T = TypeVar("T")

_POLL_S = 0.2
_SETTLED_S = 3.0
_DROPPED_S = 5.0
_SILENCE_S = 3.0
_SAID_EVERY_S = 15.0
_WAITS = tuple(f"spark.locality.wait.{level}" for level in ("process", "node", "rack"))
_CANCELLED = re.compile(r"SPARK_JOB_CANCELLED|(Job|Stage) \d+ (was )?cancelled")
_LOST = re.compile(r"CHECKPOINT_RDD_BLOCK_ID_NOT_FOUND|Checkpoint block rdd_\d+_\d+ not found|ExecutorLost")
_WRAPPED = re.compile(r"Job aborted|Exception thrown by job")
_RAISED = re.compile(r"(Exception|Error): ")
_TOO_LARGE = "bigger than spark.driver.maxResultSize"
_USERS = re.compile(r"sparksgd\.errors\.UserCodeError: (.+?)\s*\n\s*at org\.apache\.", re.DOTALL)
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def worker_of_partition(num_workers: int) -> list[int]:
    """Return which worker each partition is, so that siblings of the addition tree meet early.

    From five partitions on, treeAggregate adds partition i to those of the same i modulo the number
    of groups; neighbouring workers belong into one group.

    >>> worker_of_partition(8)
    [0, 4, 1, 5, 2, 6, 3, 7]
    """
    groups = reduce_groups(num_workers)
    order = sorted(range(num_workers), key=lambda partition: (partition % groups, partition))
    workers = [0] * num_workers
    for worker, partition in enumerate(order):
        workers[partition] = worker
    return workers


def reduce_groups(num_partitions: int) -> int:
    """Return into how many partitions treeAggregate(depth=2) gathers before the driver."""
    scale = max(ceil(sqrt(num_partitions)), 2)
    gathers = num_partitions > scale + num_partitions / scale
    return int(num_partitions / scale) if gathers else num_partitions


def session_stopped(context: SparkContext, doing: str = "") -> ClusterError:
    """Return the error of a run whose session ended under it."""
    advice = advice_of(context)
    return ClusterError(
        f"the Spark session was stopped during the run{f', in {doing}' if doing else ''}: "
        + (advice or "somebody killed the application, or ended the session, or its cluster is gone")
    )


def final_error(error: Exception, context: SparkContext) -> SparkSGDError | None:
    """Return what a failed job means where no second attempt can mend it, else None."""
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, KeyboardInterrupt):  # py4j's clean-up may fail, and hide it
            return Cancelled("interrupted")
        before = before.__context__
    text = str(error)
    if "SparkContext was shut down" in text or "stopped SparkContext" in text:
        return session_stopped(context)
    if _CANCELLED.search(text):
        return Cancelled("the Spark job was cancelled, and the run ends with it")
    if _TOO_LARGE in text:
        return ClusterError(
            f"results of a job are {_TOO_LARGE}: raise it (--conf spark.driver.maxResultSize=4g)"
        )
    raised = _USERS.search(text)
    if raised:
        return UserCodeError(raised[1])
    missing = _NO_MODULE.search(text)
    if missing:
        return ModelError(
            f"the executors' Python finds no module {missing[1]!r}: ship it with --py-files, or install "
            f"it on every host"
        )
    return None


def gist(text: str) -> str:
    """Return the line of a Java stack trace that a person wants."""
    if _LOST.search(text):
        return "an executor was lost"
    lines = [line.strip().removeprefix("Caused by: ").removeprefix(": ") for line in text.splitlines()]
    raised = [line for line in lines if _RAISED.search(line) and not line.startswith("at ")]
    causes = [line for line in raised if not _WRAPPED.search(line)]
    return (causes or raised[-1:] or lines)[0][-300:]


@contextmanager
def spark_job(context: SparkContext, doing: str) -> Iterator[None]:
    """Name the jobs of the block, and turn what Spark raises in it into an error of ours."""
    before = context.getLocalProperty("spark.job.description")
    group = context.getLocalProperty("spark.jobGroup.id")
    context.setJobDescription(f"sparksgd: {doing}")
    try:
        yield
    except SparkSGDError:
        raise
    except KeyboardInterrupt:
        cancel_jobs(context, group)
        raise
    except Exception as error:
        final = final_error(error, context)
        if isinstance(final, Cancelled):
            cancel_jobs(context, group)
        if final is None:
            advice = memory_advice(context.getConf(), str(error))
            final = ClusterError(f"{doing} failed: {advice or gist(str(error))}\n{error}")
        raise final from error
    finally:
        with cleanup():
            context.setLocalProperty("spark.job.description", before)  # type: ignore[arg-type]  # None unsets it


def cancel_jobs(context: SparkContext, group: str | None) -> None:
    """End the jobs of a group: after Ctrl-C they would run on, and hold their slots."""
    with cleanup():
        if group is not None:
            context.cancelJobGroup(group)


@contextmanager
def cleanup() -> Iterator[None]:
    """Let a clean-up fail quietly: in a session that was stopped there is nothing left to clean."""
    try:
        yield
    except Exception as error:
        log.debug("clean-up failed: %s", error)


class Cluster:
    """A Spark session as a place for workers.

    Args:
        session: the user's or ours.
        config: what will run; its engine.num_workers is settled here.
        run_id: the group of the run's jobs; None for a new one.

    Raises:
        ClusterError: barrier-mode jobs cannot run here.
        NotEnoughSlots: fewer slots than workers, also after engine.slots_timeout_s.
    """

    def __init__(self, session: SparkSession, config: Config, run_id: str | None = None) -> None:
        refuse_connect(session)
        self.session = session
        self.context = session.sparkContext
        self.jvm: Any = self.context._jvm
        keep_names(self.jvm)
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.lost_executors = LostExecutors(self.context)
        self.job_watch = JobWatch(self)
        self.slots_timeout_s = config.engine.slots_timeout_s
        self._sized_by = "train.num_shards" if config.solver.backup_workers else "engine.num_workers"
        conf = self.context.getConf()
        self.is_elastic = is_elastic(conf)
        if self.is_elastic and config.needs_barrier:
            raise ClusterError(
                "spark.dynamicAllocation.enabled is true, but Spark runs no barrier-mode job then: "
                "submit with --conf spark.dynamicAllocation.enabled=false and a fixed number of executors, "
                "or set engine.barrier=false (tree engine, ordinary stages)"
            )
        task_cpus = int(conf.get("spark.task.cpus", "1") or 1)
        if config.train.threads > task_cpus:
            raise ConfigError(
                f"train.threads is {config.train.threads}, but spark.task.cpus is {task_cpus}: workers "
                f"would take cores that Spark gave to others; submit with "
                f"--conf spark.task.cpus={config.train.threads}"
            )
        self.num_workers = self._settled_workers(config)

    @contextmanager
    def job_group(self) -> Iterator[None]:
        """Put all jobs of the block into the run's group, then give back the session's own, and rest.

        Meanwhile nothing in the session waits for a place beside its data: Spark starts the tasks of a
        barrier-mode job together, so one that waits (3 s, by default) would hold up all, at every step.
        """
        names = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel")
        before = {name: self.context.getLocalProperty(name) for name in names}
        self.context.setJobGroup(self.run_id, "sparksgd")
        try:
            with _no_locality_wait(self.context._jsc.sc()):
                yield
        finally:
            self.job_watch.close()
            with cleanup():
                for name, value in before.items():
                    self.context.setLocalProperty(name, value)  # type: ignore[arg-type]  # None unsets it

    def is_stopped(self) -> bool:
        """Return whether the session has ended, or is ending with its JVM after Ctrl-C."""
        try:
            return bool(self.context._jsc.sc().isStopped())
        except Exception:
            return True

    @property
    def driver_heap_bytes(self) -> int:
        """How large the driver's heap may grow."""
        return int(self.jvm.java.lang.Runtime.getRuntime().maxMemory())

    @property
    def driver_host(self) -> str:
        """How executors reach the driver."""
        return str(self.context.getConf().get("spark.driver.host", "127.0.0.1"))

    @property
    def driver_bind_address(self) -> str:
        """Which address the driver listens on."""
        return str(self.context.getConf().get("spark.driver.bindAddress", self.driver_host))

    def slots(self) -> int:
        """Return how many tasks can run at once."""
        spark = self.context._jsc.sc()
        profile = spark.resourceProfileManager().defaultResourceProfile()
        return int(spark.maxNumConcurrentTasks(profile))

    def has_tasks(self) -> bool:
        """Return whether tasks of the run's own run, or wait to."""
        pool = self.context._jsc.sc().taskScheduler().rootPool()
        return any(self._is_ours(task_set) for task_set in _task_sets(pool))

    def _is_ours(self, task_set: Any) -> bool:
        properties = task_set.taskSet().properties()
        return bool(properties) and properties.getProperty("spark.jobGroup.id") == self.run_id

    def running_tasks(self) -> tuple[int, int]:
        """Return how many tasks run now: the run's own, and those of other jobs.

        The scheduler knows; what Spark's status tracker says may be seconds old.
        """
        ours = others = 0
        for task_set in _task_sets(self.context._jsc.sc().taskScheduler().rootPool()):
            if self._is_ours(task_set):
                ours += task_set.runningTasks()
            else:
                others += task_set.runningTasks()
        return ours, others

    def visit(self, task: Callable[[Iterable[int]], Iterator[T]]) -> list[T]:
        """Run a small task in every slot at once, which reaches every executor with a free one."""
        slots = max(1, self.slots())
        with self.job_watch.over(1):
            return self.context.parallelize(range(slots), slots).mapPartitions(task).collect()

    def unpacked_environments(self) -> list[tuple[float, float]]:
        """Return when hosts unpacked the environment that was shipped to them; warn of needless copies."""
        conf = self.context.getConf()
        if not any(conf.get(key, "") for key in ("spark.archives", "spark.yarn.dist.archives")):
            return []
        with spark_job(self.context, "looking at the environment"):
            found = {(one.host, one.place): one for one in self.visit(environment_tasks.look)}
        copies = Counter(host for host, _ in found)
        for host, count in copies.items():
            if count > 1:
                log.warning(
                    "the environment was unpacked %d times on %s, once for each executor: ask for one "
                    "executor of more cores on each host",
                    count, host,
                )  # fmt: skip
        return [(one.first_s, one.last_s) for one in found.values()]

    def unpersist(self, rdd: RDD[Any]) -> None:
        """Let Spark drop all of a persisted RDD; its own `unpersist` warns of every cut-off one."""
        rdd.is_cached = False
        self.context._jsc.sc().unpersistRDD(rdd.id(), True)

    def drop_block(self, rdd: RDD[Any], partition: int) -> None:
        """Let Spark drop one partition of a persisted RDD, so that it computes that one anew."""
        block, blocks = self._block(rdd, partition)
        blocks.removeBlock(block)
        deadline = time.monotonic() + _DROPPED_S
        while not blocks.getLocations(block).isEmpty() and time.monotonic() < deadline:
            time.sleep(0.01)  # Spark tells no one when an executor has dropped a block

    def has_block(self, rdd: RDD[Any], partition: int) -> bool:
        """Return whether an executor holds one partition of a persisted RDD."""
        block, blocks = self._block(rdd, partition)
        return not blocks.getLocations(block).isEmpty()

    def place_of(self, rdd: RDD[Any], partition: int) -> str | None:
        """Return the executor that holds one partition of a persisted RDD, as tasks may prefer it."""
        block, blocks = self._block(rdd, partition)
        found = blocks.getLocations(block)
        return None if found.isEmpty() else _place(found.head())

    def places(self) -> set[str]:
        """Return all executors, as tasks may prefer them."""
        executors, found = self._blocks().getMemoryStatus().keysIterator(), set()
        while executors.hasNext():
            executor = executors.next()
            if self.is_local or not executor.isDriver():
                found.add(_place(executor))
        return found

    def at_place(self, element: Any, place: str | None) -> Any:
        """Return what `placed_rdd` takes of an element that belongs to a place; None: to any."""
        return self.jvm.scala.Tuple2(pickle.dumps(element), self._seq([] if place is None else [place]))

    def placed_rdd(self, elements: Sequence[Any]) -> RDD[Any]:
        """Return an RDD that has each of these in a partition of its own, which prefers its place."""
        tag = self.jvm.scala.reflect.ClassTag.apply(self.jvm.java.lang.Class.forName("[B"))
        placed = self.context._jsc.sc().makeRDD(self._seq(elements), tag)
        return RDD(placed.toJavaRDD(), self.context, CPickleSerializer())

    def _seq(self, values: Iterable[Any]) -> Any:
        listed = self.jvm.java.util.ArrayList()
        for value in values:
            listed.add(value)
        return self.jvm.PythonUtils.toSeq(listed)

    def _block(self, rdd: RDD[Any], partition: int) -> tuple[Any, Any]:
        """Return a block's name, and who knows where it is."""
        return self.jvm.org.apache.spark.storage.RDDBlockId(rdd.id(), partition), self._blocks()

    def _blocks(self) -> Any:
        """Return who knows where blocks are."""
        manager = self._component(
            "SparkEnv", "blockManager", "storage.BlockManager", self.context._jsc.sc().env()
        )
        return self._component("storage.BlockManager", "master", "storage.BlockManagerMaster", manager)

    def _component(self, owner: str, name: str, kind: str, instance: Any) -> Any:
        """Return a part of Spark: py4j by itself would load every class that its methods name, and fail."""
        java = self.jvm.java.lang
        owner_class, kind_class = (java.Class.forName(f"org.apache.spark.{path}") for path in (owner, kind))
        getter = java.invoke.MethodHandles.publicLookup().findVirtual(
            owner_class, name, java.invoke.MethodType.methodType(kind_class)
        )
        return getter.bindTo(instance).invokeWithArguments(self.jvm.java.util.ArrayList())

    def remove_shuffle(self, rdd: RDD[Any]) -> None:
        """Remove the files of the last shuffle behind an RDD; Spark waits until the JVM collects garbage."""
        cleaner, parent = self.context._jsc.sc().cleaner(), rdd._jrdd.rdd()
        while parent.dependencies().size():
            dependency = parent.dependencies().apply(0)
            if dependency.getClass().getSimpleName() == "ShuffleDependency":
                if cleaner.isDefined():
                    cleaner.get().doCleanupShuffle(dependency.shuffleId(), True)
                return
            parent = dependency.rdd()

    @property
    def is_local(self) -> bool:
        """Whether the driver's process is the only executor."""
        return re.fullmatch(r"local(\[.*\])?", str(self.context.master)) is not None

    def wait_for_slots(self, wanted: int) -> None:
        """Return when there are so many slots; where executors come as tasks wait for them, at once.

        Raises:
            NotEnoughSlots: not within engine.slots_timeout_s.
            ClusterError: the session ended meanwhile.
        """
        if self.is_elastic:
            return
        start, said = time.monotonic(), 0.0
        while (slots := self._slots_while_it_lasts()) < wanted:
            waited_s = time.monotonic() - start
            if self.is_local or waited_s >= self.slots_timeout_s:
                raise NotEnoughSlots(self._too_few(wanted, slots, waited_s))
            if waited_s - said >= 5:
                said = waited_s
                log.info("waiting for slots: %d of %d have come (%.0f s)", slots, wanted, waited_s)
            time.sleep(_POLL_S)

    def _slots_while_it_lasts(self) -> int:
        """Return how many slots there are, or raise what a session's end means to one who waits for them."""
        try:
            slots = self.slots()
        except Exception:
            slots = 0
            if not self.is_stopped():
                raise
        if self.is_stopped():
            raise session_stopped(self.context, "waiting for slots")
        return slots

    def _too_few(self, wanted: int, slots: int, waited_s: float) -> str:
        """Return what was asked for, what came, and what to change."""
        fewer = f"set {self._sized_by}={slots}" if slots else "check that executors can start"
        asked = self._asked_slots()
        if asked is None:
            waited = "" if self.is_local else f" after {waited_s:.0f} s"
            return (
                f"{self._sized_by} is {wanted}, but the cluster has {slots} slots{waited}: "
                f"give it {wanted} cores (now {self.context.master}), or {fewer}"
            )
        asked_slots, settings = asked
        executors = len(self.places())
        if asked_slots < wanted:
            return (
                f"{self._sized_by} is {wanted}, but only {asked_slots} slots were asked for ({settings}): "
                f"ask for more executors, or set {self._sized_by}={asked_slots}"
            )
        return (
            f"{wanted} slots are needed, and {asked_slots} were asked for ({settings}), but after "
            f"{waited_s:.0f} s there are {slots}, of {executors} executors: the queue may hold no more, or "
            f"be full of others. Ask for fewer executors, or {fewer}, or wait longer "
            f"(engine.slots_timeout_s={2 * max(waited_s, 30):.0f})"
        )

    def _asked_slots(self) -> tuple[int, str] | None:
        """Return how many slots the session asked its cluster for, and how; None: as many as there are."""
        conf, master = self.context.getConf(), str(self.context.master)
        by_resources = any(key.startswith("spark.task.resource.") for key, _ in conf.getAll())
        if self.is_elastic or by_resources or not master.startswith(("yarn", "k8s:", "spark:")):
            return None
        task_cpus = int(str(conf.get("spark.task.cpus", "1")))
        cores = conf.get("spark.executor.cores", None)
        if master.startswith("spark:"):
            total = conf.get("spark.cores.max", None)
            if total is None or (cores is None and task_cpus > 1):  # spread over workers, who knows how
                return None
            each = int(cores or total)
            return int(total) // each * (each // task_cpus), f"spark.cores.max={total}"
        executors = int(str(conf.get("spark.executor.instances", "2")))
        each = int(cores or 1)
        return executors * (each // task_cpus), f"spark.executor.instances={executors} of {each} cores"

    def _settled_workers(self, config: Config) -> int:
        """Return engine.num_workers, or as many as there are slots once no more come."""
        wanted, shards = config.engine.num_workers, config.train.num_shards
        if wanted is not None:
            if wanted > shards:
                raise ConfigError(
                    f"engine.num_workers is {wanted}, but train.num_shards is {shards}, and a worker "
                    f"owns one shard at least: set engine.num_workers={shards}, or more shards"
                )
            asked = self._asked_slots()
            if asked is not None and asked[0] < wanted:
                raise NotEnoughSlots(self._too_few(wanted, self.slots(), 0.0))
            self.wait_for_slots(wanted)
            _warn_of_waste(wanted, config)
            return wanted
        if config.solver.backup_workers or self.is_elastic:
            self.wait_for_slots(shards)
            return shards
        asked = self._asked_slots()
        self.wait_for_slots(1 if asked is None else max(1, min(asked[0], shards)))
        slots, since = self.slots(), time.monotonic()
        grows = asked is None and not self.is_local
        while grows and slots < shards and time.monotonic() - since < _SETTLED_S:
            time.sleep(_POLL_S)
            if (now := self.slots()) != slots:
                slots, since = now, time.monotonic()
        workers = _as_fast(min(slots, shards), shards)
        log.info("%d workers for %d shards: the cluster has %d slots", workers, shards, slots)
        _warn_of_waste(workers, config)
        return workers


def _as_fast(workers: int, shards: int) -> int:
    """Return the fewest workers of which none owns more shards than the busiest of these.

    >>> _as_fast(6, 8)
    4
    """
    return ceil(shards / ceil(shards / workers))


def _warn_of_waste(workers: int, config: Config) -> None:
    """Name a number of workers some of which wait for others, or that send more than they need to."""
    if config.data.placement == "in_place":
        return  # who owns what is Spark's choice then
    shards = config.train.num_shards
    fewer, sent = _as_fast(workers, shards), sum(partials_sent(workers, shards))
    if fewer < workers:
        log.warning(
            "%d workers are no faster than %d: of %d shards the busiest owns %d either way; without waste "
            "are %s workers",
            workers, fewer, shards, ceil(shards / workers), _listed(useful_workers(shards)),
        )  # fmt: skip
    elif sent > workers:
        log.warning(
            "%d workers send %d partial sums a step instead of %d, because their ranges of %d shards are no "
            "whole branches of the addition tree; without waste are %s workers",
            workers, sent, workers, shards, _listed(useful_workers(shards)),
        )  # fmt: skip


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _place(executor: Any) -> str:
    """Return the name of a BlockManagerId's executor as a task's preferred place."""
    return f"executor_{executor.host()}_{executor.executorId()}"


_waits_lock = threading.Lock()
_waits_of: dict[str, tuple[int, dict[str, str | None]]] = {}
"""By application: how many runs go on in it, and what it had set before the first."""


@contextmanager
def _no_locality_wait(spark: Any) -> Iterator[None]:
    """Let the scheduler, which asks its session at every job, place tasks at once.

    Args:
        spark: the JVM's SparkContext.
    """
    conf, application = spark.conf(), str(spark.applicationId())
    with _waits_lock:
        runs, before = _waits_of.get(application, (0, {}))
        if not runs:
            before = {key: conf.get(key, None) for key in _WAITS}
            for key, value in before.items():
                if value not in (None, "0", "0s"):
                    log.warning("%s is %s, but 0s until this run ends: its tasks start together", key, value)
            for key in _WAITS:
                conf.set(key, "0s")
        _waits_of[application] = runs + 1, before
    try:
        yield
    finally:
        with _waits_lock, cleanup():
            runs, before = _waits_of.pop(application)
            if runs > 1:
                _waits_of[application] = runs - 1, before
            else:
                for key, value in before.items():
                    conf.remove(key) if value is None else conf.set(key, value)


def _task_sets(pool: Any) -> Iterator[Any]:
    """Yield every set of tasks in a pool of Spark's scheduler, and in the pools within."""
    for member in pool.schedulableQueue().toArray():
        if member.schedulableQueue() is None:
            yield member
        else:
            yield from _task_sets(member)


def is_elastic(conf: SparkConf) -> bool:
    """Return whether executors come as tasks wait for them."""
    return str(conf.get("spark.dynamicAllocation.enabled", "false")).lower() == "true"


def refuse_connect(session: Any) -> None:
    """Raise ClusterError for a session of Spark Connect."""
    if type(session).__module__.startswith("pyspark.sql.connect"):
        raise ClusterError(
            "this session is Spark Connect, which has no RDDs, and sparksgd needs them: on "
            "Databricks use dedicated compute (standard and serverless are Connect); elsewhere start "
            "a classic session, without --remote"
        )


@dataclass
class Watched:
    """A job that is watched."""

    needed: int
    """Slots that it needs to start."""

    limit_s: float | None
    """How long its tasks may run; None for ever."""

    since_s: float = field(default_factory=time.monotonic)
    say_again_s: float = 0.0
    running_since_s: float | None = None

    expired: bool = False
    """Whether it was cancelled, because its tasks ran too long."""

    starving_since_s: float | None = None
    """Since when it has waited without there being any slot."""

    starved: str | None = None
    """Why it was cancelled, if it starved."""


class JobWatch:
    """Says aloud what Spark does not, that a job waits for slots; cancels one that gets none, or hangs.

    Args:
        cluster: asked while a job takes long.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._watched: Watched | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, needed: int, limit_s: float | None = None) -> Iterator[Watched]:
        """Watch the job that the block runs.

        Args:
            needed: how many slots it needs to start.
            limit_s: how long its tasks may run, waiting for slots not counted.

        Raises:
            NotEnoughSlots: the cluster had none for engine.slots_timeout_s.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="sparksgd-watch", daemon=True)
            self._thread.start()
        around, watched = self._watched, Watched(needed, limit_s)
        self._watched = watched
        try:
            yield watched
        except Exception as error:
            if watched.starved is None or (
                isinstance(error, SparkSGDError) and not isinstance(error, Cancelled)
            ):
                raise
            raise NotEnoughSlots(watched.starved) from error
        finally:
            if around is not None:
                around.starving_since_s = None
            self._watched = around

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            watched = self._watched
            if watched is not None and time.monotonic() - watched.since_s >= _SILENCE_S:
                with cleanup():
                    self._look_at(watched)
                with cleanup():
                    self._cluster.lost_executors.look()

    def _starves(self, watched: Watched, now_s: float) -> bool:
        """Cancel a job for which no slot comes; return whether it was."""
        since_s = watched.starving_since_s = watched.starving_since_s or now_s
        timeout_s = self._cluster.slots_timeout_s
        if now_s - since_s < timeout_s or self._watched is not watched:
            return False
        watched.starved = (
            f"{watched.needed} slots are needed, but for {now_s - since_s:.0f} s there was none: executors "
            f"were taken away, or cannot start. Ask the cluster why, or wait longer "
            f"(engine.slots_timeout_s={2 * max(timeout_s, 30):.0f})"
        )
        cancel_jobs(self._cluster.context, self._cluster.run_id)
        return True

    def _look_at(self, watched: Watched) -> None:
        slots, (ours, others) = self._cluster.slots(), self._cluster.running_tasks()
        now_s = time.monotonic()
        if slots or not self._cluster.has_tasks():
            watched.starving_since_s = None
        elif self._starves(watched, now_s):
            return
        if ours:
            watched.running_since_s = watched.running_since_s or now_s
            ran_s = now_s - watched.running_since_s
            if watched.limit_s is not None and ran_s > watched.limit_s and self._watched is watched:
                watched.expired = True
                cancel_jobs(self._cluster.context, self._cluster.run_id)
        elif slots - others < watched.needed and now_s >= watched.say_again_s:
            watched.say_again_s = now_s + _SAID_EVERY_S
            log.warning(
                "waiting for slots: %d needed, %d free (%d in all, other jobs hold %d)",
                watched.needed,
                max(0, slots - others),
                slots,
                others,
            )
