"""The jobs of the server's workers, without Spark: what is tried again, and what ends the run."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from told_jobs import DYING, Job, jobs_of

from sparksgd.errors import ClusterError, OutOfMemory, PeerLost, ShardChanged, ShardMissing
from sparksgd.spark.engines import server_jobs
from sparksgd.spark.engines.base import SparkEngine
from sparksgd.spark.engines.server import ServerEngine
from sparksgd.spark.engines.server_jobs import ServerJobs

AN_EXECUTOR_DIED = RuntimeError("ExecutorLostFailure (executor 2 exited)")


def looked(jobs: ServerJobs) -> None:
    """Look until nothing is mended any more."""
    for _ in range(1000):
        jobs.look()
        if not jobs._mending:
            return
        time.sleep(0.001)  # for the thread
    raise AssertionError("it is never mended")


class Mends:
    """Writes shards again, after some failures."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.asked = list(failures), []

    def __call__(self, missing: tuple[int, ...]) -> Any:
        self.asked.append(missing)
        if self.failures:
            raise self.failures.pop(0)
        yield


def test_a_mend_that_fails_because_another_executor_died_is_tried_again() -> None:
    submitted: list[Job] = []
    mends = Mends(AN_EXECUTOR_DIED, RuntimeError(DYING), ShardMissing("shard 3 is gone", shards=(3,)))
    jobs = jobs_of(submitted, mends)
    jobs.ask([0])
    submitted[0].ends(ShardMissing("shard 1 is gone", shards=(1,)))
    with pytest.raises(ClusterError, match=r"worker 0 failed 4 times without a turn.*\n.*shard 3 is gone"):
        looked(jobs)
    assert mends.asked == [(1,), (1,), (1,)]
    jobs.close()


@pytest.mark.parametrize("way", [looked, ServerJobs.end_mending])
def test_then_its_worker_is_asked_again(way: Any) -> None:
    submitted: list[Job] = []
    jobs = jobs_of(submitted, mends := Mends(AN_EXECUTOR_DIED, AN_EXECUTOR_DIED))
    jobs.ask([0, 1])
    submitted[0].ends(AN_EXECUTOR_DIED)
    jobs.look()
    way(jobs)
    assert mends.asked == [()] * 3
    assert [job.worker for job in submitted] == [0, 1, 0][: 3 if way is looked else 2]
    assert jobs._recovery.retries == 3
    jobs.progressed(0)
    jobs.close()


def test_a_mend_that_can_never_succeed_ends_the_run_in_our_words() -> None:
    jobs = jobs_of(submitted := [], Mends(ShardChanged("shard 1 holds other rows")))
    jobs.ask([0])
    submitted[0].ends(AN_EXECUTOR_DIED)
    with pytest.raises(ShardChanged, match="shard 1 holds other rows"):
        looked(jobs)
    jobs.close()


def test_a_task_that_goes_on_without_its_connection_is_given_up_in_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = jobs_of(submitted := [], running_of=lambda jobs: sum(job.worker != 3 for job in jobs))
    jobs.ask([0, 1, 2, 3])
    jobs.left(0, 1, "it broke")
    jobs.left(1, 1, "it broke")  # which was another one's connection
    jobs.left(2, 3, "it broke")
    jobs.joined(2)  # Spark has started its task once more
    jobs.left(3, 4, "it broke")  # its task waits for a slot
    now_s = [time.monotonic() + 61]
    monkeypatch.setattr(server_jobs.time, "monotonic", lambda: now_s[0])
    jobs.look()
    assert not [job.worker for job in submitted if job.is_cancelled], "they may have begun just now"
    now_s[0] += 61
    jobs.look()
    assert [job.worker for job in submitted if job.is_cancelled] == [0]
    jobs.left(0, 1, "it was dropped")  # does not hide why
    looked(jobs)
    assert [job.worker for job in submitted] == [0, 1, 2, 3, 0]
    assert "the others go on: its task goes on, although its connection ended: it broke" in caplog.text
    jobs.close()


def test_a_container_killed_for_its_memory_ends_the_run_with_the_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_jobs, "advice_of", lambda _: "its container used 2 GB of the 1 GB that it may")
    lost = SimpleNamespace(look=lambda: None, killed_for_memory=1)  # one before this run began
    is_said = threading.Event()
    jobs = jobs_of(submitted := [], lambda _: [is_said.wait(5)], lost_executors=lost)
    jobs.ask([0, 1])
    submitted[0].ends(AN_EXECUTOR_DIED)
    jobs.look()
    lost.killed_for_memory = 2  # Spark says it some time later
    is_said.set()
    with pytest.raises(OutOfMemory, match="because its container used 2 GB of the 1 GB"):
        looked(jobs)
    assert [job.worker for job in submitted] == [0, 1]
    jobs.close()


def test_who_lost_its_connection_alone_is_asked_again_at_once() -> None:
    jobs = jobs_of(submitted := [], mends := Mends())
    jobs.ask([0])
    submitted[0].ends(PeerLost("the driver cannot be reached"))
    jobs.look()
    assert [job.worker for job in submitted] == [0, 0]
    assert mends.asked == []
    jobs.close()


def test_the_end_waits_for_no_mend_and_lets_none_begin() -> None:
    began, cancelled, mended = threading.Event(), threading.Event(), []

    def mend(missing: tuple[int, ...]) -> Any:
        began.set()
        cancelled.wait(5)  # its job is cancelled, and nobody says so
        yield
        mended.append("the next")

    jobs = jobs_of(submitted := [], mend)
    jobs._cluster.context.cancelJobGroup = lambda _: cancelled.set()
    jobs.ask([0, 1])
    for job in submitted:
        job.ends(AN_EXECUTOR_DIED)
    jobs.look()
    assert began.wait(5)
    jobs.close()
    assert mended == []


def test_a_mend_that_sleeps_is_waked_by_the_end() -> None:
    jobs = jobs_of(submitted := [], mends := Mends())
    jobs._dying_s = 60.0
    jobs.ask([0])
    submitted[0].ends(RuntimeError(DYING))
    jobs.look()
    began_s = time.monotonic()
    jobs.close()
    assert time.monotonic() - began_s < 5
    assert mends.asked == []


def test_ctrl_c_while_workers_leave_skips_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    engine = object.__new__(ServerEngine)

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    def fails() -> None:
        done.append("jobs")
        raise RuntimeError("the session is gone")

    monkeypatch.setattr(ServerEngine, "_release", interrupted)
    monkeypatch.setattr(ServerEngine, "_note_dropped", lambda _: done.append("dropped"))
    monkeypatch.setattr(SparkEngine, "close", lambda _: done.append("base"))
    engine._jobs = SimpleNamespace(close=fails)
    engine._desk = SimpleNamespace(close=lambda: done.append("desk"))
    engine._strangers = SimpleNamespace(say=lambda is_last: done.append("strangers"))
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert done == ["jobs", "desk", "dropped", "strangers", "base"]
