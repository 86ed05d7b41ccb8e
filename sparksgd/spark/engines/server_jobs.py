"""The Spark jobs of the server engine: one for each worker, asked again when it ends too early.

A worker that is lost is a worker that is silent: the others go on.  Its shards are written again behind them,
in the slot that became free.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from pyspark.serializers import CPickleSerializer

from sparksgd.engines.protocol import Recovery
from sparksgd.errors import ClusterError, ModelError, OutOfMemory, ShardMissing, SparkSGDError
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.failures import final_error, gist
from sparksgd.spark.cluster.jobs import cancel_jobs, cleanup
from sparksgd.spark.cluster.lost_executors import advice_of

__all__ = ["ServerJobs"]

log = logging.getLogger("sparksgd")

_CANCEL_S = 0.5
_SECOND_LOOK_S = 60.0  # a task that has begun is connected by then


@dataclass(kw_only=True)
class _Asked:
    """A worker's job."""

    request: int
    job: Any
    """The JVM's JavaFutureAction."""

    is_hung: bool = False
    """Whether it was cancelled, because it took too long."""

    makes_room: bool = False
    """Whether it was cancelled, because its slot was needed."""

    why: str = "its connection ended"
    """What is known of its end."""

    look_at_s: float | None = None
    """When its task is looked at next; None: it is connected, or given up."""

    runs_on: bool = False
    """Whether its task ran at the look before; it may have begun just then."""


@dataclass(frozen=True, kw_only=True)
class _Mending:
    """What is written again for a worker, before it is asked."""

    missing: tuple[int, ...]
    done: Future[None]


class ServerJobs:
    """Asks workers, and asks those again whose jobs end.

    Args:
        cluster: where they are.
        recovery: is told of jobs that are tried again.
        max_attempts: how often a worker is asked, without a turn of it between, before the run fails.
        submit: submits the job of a worker and a request; returns the JVM's JavaFutureAction.
        mend: writes the shards again that are lost, and these, between which it yields; called in a thread of
            its own.
        is_dying: whether a failure may be that of an executor that is about to be lost, for some seconds.
        dying_s: how long that takes.
        hung_s: how long a task may go on after its connection has ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        recovery: Recovery,
        max_attempts: int,
        *,
        submit: Callable[[int, int], Any],
        mend: Callable[[tuple[int, ...]], Iterable[object]],
        is_dying: Callable[[Exception], bool],
        dying_s: float,
        hung_s: float,
    ) -> None:
        self._cluster, self._recovery, self._max_attempts = cluster, recovery, max_attempts
        self._submit, self._mend, self._is_dying, self._dying_s = submit, mend, is_dying, dying_s
        self._hung_s = hung_s
        self._asked: dict[int, _Asked] = {}
        self._mending: dict[int, _Mending] = {}
        self._failures: dict[int, int] = {}
        self._requests = 0
        self._killed = 0
        self._ends = threading.Event()
        self._thread = ThreadPoolExecutor(1, "sparksgd-mend")

    def ask(self, workers: Iterable[int]) -> None:
        """Submit a job for each of these workers."""
        if not self._requests:
            self._killed = self._cluster.lost_executors.killed_for_memory
        for worker in workers:
            self._requests += 1
            job = self._submit(worker, self._requests)
            self._asked[worker] = _Asked(request=self._requests, job=job)

    def progressed(self, worker: int) -> None:
        """Note that a worker has made a turn: failures before do not count any more."""
        self._failures.pop(worker, None)

    def left(self, worker: int, request: int, why: str) -> None:
        """Note why the connection of a worker's job ended."""
        asked = self._asked.get(worker)
        if asked is not None and asked.request == request and not asked.is_hung:
            asked.why, asked.look_at_s = f"its connection ended: {why}", time.monotonic() + self._hung_s

    def joined(self, worker: int) -> None:
        """Note that a worker is connected; it may be a task that Spark has started once more."""
        if worker in self._asked:
            self._asked[worker].look_at_s, self._asked[worker].runs_on = None, False

    def give_up(self, worker: int, why: str) -> None:
        """Cancel the job of a worker that hangs; it is asked again."""
        asked = self._asked.get(worker)
        if asked is not None:
            asked.is_hung, asked.why, asked.look_at_s = True, f"{why} (engine.step_timeout_s)", None
            log.warning("worker %d is given up: %s", worker, asked.why)
            with cleanup():
                asked.job.cancel(True)

    @property
    def asked(self) -> int:
        """Return how many workers' jobs go on, or wait for their slots."""
        return len(self._asked)

    def running(self) -> int:
        """Return how many workers' tasks run now; called by any thread."""
        return self._cluster.running_of([asked.job for asked in list(self._asked.values())])

    def make_room(self) -> None:
        """Cancel the jobs of all workers, which are asked again at the next look; called by any thread."""
        for asked in list(self._asked.values()):
            asked.makes_room = True
            with cleanup():
                asked.job.cancel(True)

    def look(self) -> None:
        """Find jobs that ended, and ask their workers again, once what they lost is mended.

        Raises:
            SparkSGDError: what no retry can help, or what happens again and again.
        """
        for worker, asked in list(self._asked.items()):
            if asked.job.isDone():
                del self._asked[worker]
                if asked.makes_room:
                    self._mending[worker] = _Mending(missing=(), done=_nothing())
                else:
                    self._ended(worker, asked)
            elif asked.look_at_s is not None and time.monotonic() > asked.look_at_s:
                ran, asked.runs_on = asked.runs_on, self._cluster.running_of([asked.job]) > 0
                asked.look_at_s += min(self._hung_s, _SECOND_LOOK_S)
                if ran and asked.runs_on:  # else Spark has yet to start it once more, or has just done so
                    self.give_up(worker, f"its task goes on, although {asked.why}")
        if not self.mends:  # else shards are about to move
            mendings = list(self._mending.items())
            if mendings:  # before they are asked where another one may be killed
                self._refuse_killed()
            are_mended = [self._is_mended(worker, mending) for worker, mending in mendings]
            if all(are_mended):
                mended, self._mending = self._mending, {}
                self.ask(mended)

    @property
    def are_out(self) -> bool:
        """Return whether workers are asked, or will be."""
        return bool(self._asked or self._mending)

    def end(self, patience_s: float, meanwhile: Callable[[], object]) -> None:
        """Wait until all workers' jobs have ended; cancel those that take too long.

        Args:
            patience_s: for how long they may go on.
            meanwhile: called again and again.
        """
        deadline = time.monotonic() + patience_s
        while not all(asked.job.isDone() for asked in self._asked.values()):
            if time.monotonic() > deadline:
                for asked in self._asked.values():
                    with cleanup():
                        asked.job.cancel(True)
                break
            meanwhile()
        self._asked.clear()

    def end_mending(self) -> None:
        """Wait until what is lost is written again.

        Raises:
            SparkSGDError: it cannot be.
        """
        while self._mending:
            worker, mending = next(iter(self._mending.items()))
            wait([mending.done])
            del self._mending[worker]
            self._is_mended(worker, mending)

    @property
    def mends(self) -> bool:
        """Return whether shards are being written again."""
        return not all(mending.done.done() for mending in self._mending.values())

    def close(self) -> None:
        """Let no worker be asked again; what is being written for them is not needed any more."""
        self._ends.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        while self.mends:  # each may submit another job just after
            cancel_jobs(self._cluster.context, self._cluster.run_id)
            wait([mending.done for mending in self._mending.values() if not mending.done.done()], _CANCEL_S)
        self._mending.clear()

    def _ended(self, worker: int, asked: _Asked) -> None:
        """Let a worker be asked again, after its shards are mended if they may be lost."""
        try:
            failure = _result(asked.job)
        except Exception as error:
            if asked.is_hung:
                self._failed(worker, asked.why, ())
            else:
                self._failed_in_spark(worker, error, ())
        else:
            if isinstance(failure, ModelError):
                raise failure
            missing = failure.shards if isinstance(failure, ShardMissing) else None
            self._failed(worker, str(failure or asked.why), missing)

    def _is_mended(self, worker: int, mending: _Mending) -> bool:
        """Return whether what a worker lost is written again; if not, that is tried again."""
        try:
            mending.done.result()
        except ShardMissing as error:
            self._failed(worker, str(error), error.shards)
        except SparkSGDError:
            raise
        except Exception as error:
            self._failed_in_spark(worker, error, mending.missing)
        else:
            return True
        return False

    def _failed_in_spark(self, worker: int, error: Exception, missing: tuple[int, ...]) -> None:
        """Count a failure of a worker, unless no retry can help."""
        is_dying, final = self._is_dying(error), final_error(error, self._cluster.context)
        if is_dying and self._failures.get(worker, 0) + 1 < self._max_attempts:
            final = None
        if final is not None:
            raise final from error
        self._failed(worker, gist(str(error)), missing, self._dying_s if is_dying else 0.0)

    def _failed(self, worker: int, why: str, missing: tuple[int, ...] | None, wait_s: float = 0.0) -> None:
        """Count a failure of a worker; after a while, mend what is lost.

        Args:
            worker: its number.
            why: for the log, or the error.
            missing: shards whose files are gone; None: nothing can be lost.
            wait_s: for how long.
        """
        self._refuse_killed()
        failures = self._failures[worker] = self._failures.get(worker, 0) + 1
        if failures >= self._max_attempts:
            advice = advice_of(self._cluster.context)
            raise ClusterError(
                f"worker {worker} failed {failures} times without a turn between, as often as "
                f"engine.max_attempts allows{f', because {advice}' if advice else ''}. The last "
                f"failure:\n{why}"
            )
        log.warning("worker %d failed and is asked again, the others go on: %s", worker, why)
        self._recovery.retries += 1
        done = _nothing() if missing is None else self._thread.submit(self._mended, missing, wait_s)
        self._mending[worker] = _Mending(missing=missing or (), done=done)

    def _refuse_killed(self) -> None:
        """Raise OutOfMemory if a container was killed for its memory: its successor would be, too."""
        with cleanup():
            self._cluster.lost_executors.look()
        if self._cluster.lost_executors.killed_for_memory > self._killed:
            raise OutOfMemory(f"workers of the server failed, because {advice_of(self._cluster.context)}")

    def _mended(self, missing: tuple[int, ...], wait_s: float) -> None:
        """In the thread: write again what is lost, unless the run ends."""
        if self._ends.wait(wait_s):
            return
        context = self._cluster.context
        context.setJobGroup(self._cluster.run_id, "sparksgd")  # it is the thread's
        for _ in self._mend(missing):
            if self._ends.is_set():
                return


def _nothing() -> Future[None]:
    """Return what is done."""
    done: Future[None] = Future()
    done.set_result(None)
    return done


def _result(job: Any) -> SparkSGDError | None:
    """Return what the one task of a job yielded."""
    serializer: Any = CPickleSerializer()
    (found,) = [one for batch in job.get() for one in serializer.loads(bytes(batch))]
    failure: SparkSGDError | None = found
    return failure
