"""Spark jobs of a run: naming, cancelling, when their tasks start, and watching."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pyspark import SparkContext

from sparksgd.errors import Cancelled, ClusterError, NotEnoughSlots, OutOfMemory, SparkSGDError
from sparksgd.spark.cluster.failures import advice_of_disk, final_error, gist

__all__ = [
    "HoldsSlots",
    "JobWatch",
    "RunTasks",
    "Watched",
    "cancel_jobs",
    "cleanup",
    "keep_names",
    "no_locality_wait",
    "spark_job",
]

log = logging.getLogger("sparksgd")

_SILENCE_S = 3.0
_SAID_EVERY_S = 15.0
_STUCK_S = 15.0
_WAITS = tuple(f"spark.locality.wait.{level}" for level in ("process", "node", "rack"))
_GETTER = re.compile(r"task-result-getter-(\d+)\b")
_NAMES = ("PythonRDD", "PythonUtils", "SimplePythonFunction")


def keep_names(jvm: Any) -> None:
    """Let py4j remember where it found the classes that every job uses.

    PySpark names them without their packages.  So py4j would search every jar for every package that they
    could be in, five times for each job.
    """
    for name in _NAMES:
        setattr(jvm, name, getattr(jvm, name))


@contextmanager
def spark_job(context: SparkContext, doing: str) -> Iterator[None]:
    """Name the jobs of the block, and turn an exception of Spark in it into an error of ours."""
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
            final = ClusterError(f"{doing} failed: {gist(str(error))}{advice_of_disk(str(error))}\n{error}")
        elif isinstance(final, OutOfMemory):
            final = OutOfMemory(f"{doing} failed: {final}")
        raise final from error
    finally:
        with cleanup():
            context.setLocalProperty("spark.job.description", before)  # type: ignore[arg-type]  # None unsets it


def cancel_jobs(context: SparkContext, group: str | None) -> None:
    """Cancel the jobs of a group; after Ctrl-C they would go on, and keep their slots."""
    with cleanup():
        if group is not None:
            context.cancelJobGroup(group)


@contextmanager
def cleanup() -> Iterator[None]:
    """Ignore errors of a clean-up: a session that was stopped has nothing left to clean."""
    try:
        yield
    except Exception as error:
        log.debug("clean-up failed: %s", error)


_waits_lock = threading.Lock()
_waits_of: dict[str, tuple[int, dict[str, str | None]]] = {}
"""For each application: how many runs are going on, and the setting before the first of them."""


@contextmanager
def no_locality_wait(spark: Any) -> Iterator[None]:
    """Make the scheduler start tasks at once, without waiting for preferred places.

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


class RunTasks:
    """The tasks of a run, from the scheduler itself; Spark's status tracker may be seconds late.

    Args:
        context: the session's.
        run_id: the group of the run's jobs.
    """

    def __init__(self, context: SparkContext, run_id: str) -> None:
        self._context = context
        self._run_id = run_id

    def exist(self) -> bool:
        """Return whether some of the tasks run, or wait."""
        return any(self._is_ours(task_set) for task_set in self._task_sets())

    def running(self) -> tuple[int, int]:
        """Return how many tasks run now: of this run, and of other jobs."""
        ours = others = 0
        for task_set in self._task_sets():
            if self._is_ours(task_set):
                ours += task_set.runningTasks()
            else:
                others += task_set.runningTasks()
        return ours, others

    def running_of(self, jobs: Iterable[Any]) -> int:
        """Return how many tasks of these jobs run now; the other ones wait, or have ended.

        Args:
            jobs: the JVM's JavaFutureActions.
        """
        numbers = {number for job in jobs for number in job.jobIds()}
        return sum(
            task_set.runningTasks()
            for task_set in self._task_sets()
            if task_set.taskSet().priority() in numbers
        )

    def ended_getters(self) -> int:
        """Return how many of Spark's threads that receive results at the driver have ended.

        One that finds no memory ends without a word, and the job of its result would never end.  A pool of
        so many threads has replaced it by one of a higher number.
        """
        size = int(self._context.getConf().get("spark.resultGetter.threads", "4"))
        jvm: Any = self._context._jvm
        threads = str(jvm.java.lang.Thread.getAllStackTraces().keySet().toString())
        return max(0, 1 + max((int(number) for number in _GETTER.findall(threads)), default=-1) - size)

    def cancel(self) -> None:
        """End the run's jobs."""
        cancel_jobs(self._context, self._run_id)

    def _task_sets(self) -> Iterator[Any]:
        return _task_sets(self._context._jsc.sc().taskScheduler().rootPool())

    def _is_ours(self, task_set: Any) -> bool:
        properties = task_set.taskSet().properties()
        return bool(properties) and properties.getProperty("spark.jobGroup.id") == self._run_id


def _task_sets(pool: Any) -> Iterator[Any]:
    """Yield every set of tasks in a pool of Spark's scheduler, and in the pools inside it."""
    for member in pool.schedulableQueue().toArray():
        if member.schedulableQueue() is None:
            yield member
        else:
            yield from _task_sets(member)


@dataclass(frozen=True, kw_only=True)
class HoldsSlots:
    """Jobs of the same run that give their slots to the watched one, if it gets none."""

    running: Callable[[], int]
    """How many tasks of theirs run now."""

    end: Callable[[], None]
    """Called by the watch's thread."""


@dataclass(eq=False)
class Watched:
    """A job that is watched."""

    needed: int
    """How many slots it needs to start."""

    limit_s: float | None
    """How long its tasks may run; None: without a limit."""

    beside: HoldsSlots | None = None
    since_s: float = field(default_factory=time.monotonic)
    say_again_s: float = 0.0
    running_since_s: float | None = None

    expired: bool = False
    """Whether it was cancelled because its tasks ran too long."""

    starving_since_s: float | None = None
    """Since when it has waited while there was no slot."""

    stuck_since_s: float | None = None
    """Since when the jobs beside it have had all slots."""

    refusal: SparkSGDError | None = None
    """Why it was cancelled, if there were no slots, or its results were lost."""


class JobWatch:
    """Logs that a job waits for slots, and cancels a job that gets none or hangs; Spark does neither.

    Args:
        tasks: the run's.
        slots: returns how many slots the cluster has.
        slots_timeout_s: how long a job may wait while there are none.
        meanwhile: also called while a job takes long.
    """

    def __init__(
        self,
        tasks: RunTasks,
        slots: Callable[[], int],
        slots_timeout_s: float,
        meanwhile: Callable[[], None],
    ) -> None:
        self._tasks = tasks
        self._slots = slots
        self._slots_timeout_s = slots_timeout_s
        self._meanwhile = meanwhile
        self._watching: list[Watched] = []  # by any thread; the last one is looked at
        self._ended_getters: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(
        self, needed: int, limit_s: float | None = None, beside: HoldsSlots | None = None
    ) -> Iterator[Watched]:
        """Watch the job that the block runs.

        Args:
            needed: how many slots it needs to start.
            limit_s: how long its tasks may run; waiting for slots does not count.
            beside: which jobs of the run make room for it; None: those that do so for the job around it.

        Raises:
            NotEnoughSlots: the cluster had no slot for engine.slots_timeout_s.
            OutOfMemory: the driver had no memory to receive a result.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="sparksgd-watch", daemon=True)
            self._thread.start()
        around = self._watched
        if beside is None and around is not None:
            beside = around.beside
        watched = Watched(needed, limit_s, beside)
        self._watching.append(watched)
        try:
            yield watched
        except Exception as error:
            if watched.refusal is None or (
                isinstance(error, SparkSGDError) and not isinstance(error, Cancelled)
            ):
                raise
            raise watched.refusal from error
        finally:
            self._watching.remove(watched)
            if (around := self._watched) is not None:
                around.starving_since_s = None

    @property
    def _watched(self) -> Watched | None:
        return next(reversed(self._watching), None)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        with cleanup():
            self._ended_getters = self._tasks.ended_getters()
        while not self._stop.wait(1.0):
            watched = self._watched
            if watched is not None and time.monotonic() - watched.since_s >= _SILENCE_S:
                with cleanup():
                    self._look_at(watched)
                with cleanup():
                    self._meanwhile()

    def _starves(self, watched: Watched, now_s: float) -> bool:
        """Cancel a job that gets no slot; return whether it was cancelled."""
        since_s = watched.starving_since_s = watched.starving_since_s or now_s
        timeout_s = self._slots_timeout_s
        if now_s - since_s < timeout_s or self._watched is not watched:
            return False
        watched.refusal = NotEnoughSlots(
            f"{watched.needed} slots are needed, but for {now_s - since_s:.0f} s there was none: executors "
            f"were taken away, or cannot start. Ask the cluster why, or wait longer "
            f"(engine.slots_timeout_s={2 * max(timeout_s, 30):.0f})"
        )
        self._tasks.cancel()
        return True

    def _loses_results(self, watched: Watched) -> bool:
        """Cancel a job whose result can never arrive; return whether it was cancelled."""
        ended = self._tasks.ended_getters()
        before, self._ended_getters = self._ended_getters, ended
        if before is None or ended <= before or self._watched is not watched:
            return False
        watched.refusal = OutOfMemory(
            "the heap of the driver is too small: the thread that received a result found no memory for it; "
            "submit with a larger --driver-memory"
        )
        self._tasks.cancel()
        return True

    def _make_room(self, watched: Watched, beside: HoldsSlots, runs: int, free: int, now_s: float) -> None:
        """End the jobs beside one that gets no slot, because they have all."""
        if free > 0 or runs:
            watched.stuck_since_s = None
            return
        since_s = watched.stuck_since_s = watched.stuck_since_s or now_s
        if now_s - since_s >= _STUCK_S and self._watched is watched:
            log.warning("there was no free slot for %.0f s: the workers leave theirs", now_s - since_s)
            watched.beside = None
            beside.end()

    def _look_at(self, watched: Watched) -> None:
        slots, (ours, others), exist = self._slots(), self._tasks.running(), self._tasks.exist()
        now_s = time.monotonic()
        if slots or not exist:
            watched.starving_since_s = None
        elif self._starves(watched, now_s):
            return
        beside, free = watched.beside, slots - ours - others
        runs = ours if beside is None else max(0, ours - beside.running())  # of its own tasks
        # A task whose result was lost has left its slot; one that waits for a slot has no result yet.
        if exist and not runs and free > 0 and self._loses_results(watched):
            return
        if beside is not None:
            self._make_room(watched, beside, runs, free, now_s)
        if ours:
            watched.running_since_s = watched.running_since_s or now_s
            ran_s = now_s - watched.running_since_s
            if watched.limit_s is not None and ran_s > watched.limit_s and self._watched is watched:
                watched.expired = True
                self._tasks.cancel()
        elif slots - others < watched.needed and now_s >= watched.say_again_s:
            watched.say_again_s = now_s + _SAID_EVERY_S
            log.warning(
                "waiting for slots: %d needed, %d free (%d in all, other jobs hold %d)",
                watched.needed,
                max(0, slots - others),
                slots,
                others,
            )
