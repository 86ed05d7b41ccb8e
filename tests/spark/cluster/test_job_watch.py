"""The watch over jobs: which one is looked at, and what it does for one that gets no slot."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sparksgd.errors import OutOfMemory
from sparksgd.spark.cluster import jobs
from sparksgd.spark.cluster.jobs import HoldsSlots, JobWatch, RunTasks


class Tasks:
    """The tasks of a run, as told."""

    def __init__(self) -> None:
        self.ours = self.others = self.cancelled = self.getters = 0

    def ended_getters(self) -> int:
        return self.getters

    def exist(self) -> bool:
        return True

    def running(self) -> tuple[int, int]:
        return self.ours, self.others

    def cancel(self) -> None:
        self.cancelled += 1


def watch(tasks: Any, slots: int = 4) -> JobWatch:
    return JobWatch(tasks, lambda: slots, 300, lambda: None)


def test_jobs_of_two_threads_end_in_any_order() -> None:
    jobs = watch(Tasks())
    step, mend = jobs.over(1), jobs.over(1)
    of_step, of_mend = step.__enter__(), mend.__enter__()
    assert jobs._watched is of_mend
    step.__exit__(None, None, None)
    assert jobs._watched is of_mend
    mend.__exit__(None, None, None)
    assert jobs._watched is None
    assert of_step is not of_mend
    jobs.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_job_whose_result_found_no_memory_at_the_driver_ends(workers: int) -> None:
    """Beside it, the workers of the server go on."""
    tasks = Tasks()
    watch_it = watch(tasks)
    beside = HoldsSlots(running=lambda: workers, end=lambda: None)

    def struck() -> None:
        tasks.ours = workers
        with watch_it.over(1, beside=beside) as job:
            while watch_it._ended_getters is None:  # its thread looks once, when it begins
                time.sleep(0.001)
            watch_it._look_at(job)
            assert tasks.cancelled == 0, "it waits for a slot"
            tasks.ours, tasks.getters = workers + 1, 1
            watch_it._look_at(job)
            assert tasks.cancelled == 0, "its task runs"
            tasks.ours = workers
            watch_it._look_at(job)
            assert tasks.cancelled == 1
            raise RuntimeError("Job 3 cancelled")

    with pytest.raises(OutOfMemory, match=r"heap of the driver is too small.*larger --driver-memory"):
        struck()
    with watch_it.over(1) as job:  # the thread was replaced
        watch_it._look_at(job)
    assert tasks.cancelled == 1
    watch_it.close()


@pytest.mark.session("local[2]")
def test_a_thread_that_receives_results_and_ended_is_counted(spark: Any) -> None:
    tasks = RunTasks(spark.sparkContext, "run")
    assert tasks.ended_getters() == 0
    jvm = spark.sparkContext._jvm
    pool = jvm.org.apache.spark.util.ThreadUtils.newDaemonSingleThreadExecutor("task-result-getter-5")
    pool.execute(jvm.java.lang.Thread())  # so that the thread begins
    assert tasks.ended_getters() == 2, "of 0 to 3, two were replaced"
    pool.shutdown()


def test_jobs_beside_one_that_gets_no_slot_end_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, ended, now, workers = Tasks(), [], [100.0], [3]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    watch_it = watch(tasks, slots=3)
    beside = HoldsSlots(running=lambda: workers[0], end=lambda: ended.append(now[0]))
    with watch_it.over(1, beside=beside), watch_it.over(1) as inner:
        for now[0], tasks.ours, workers[0], tasks.others in (
            (200, 3, 3, 0), (214, 3, 3, 0),  # a slot is lost, and the workers have the others
            (215, 2, 2, 0), (216, 3, 3, 0), (230, 3, 3, 0),  # one is free between
            (231, 3, 2, 0), (232, 3, 3, 0), (246, 3, 3, 0),  # it runs between, in a slot that a worker left
            (247, 2, 2, 1), (260, 2, 2, 1),
        ):  # fmt: skip
            watch_it._look_at(inner)
            assert ended == [247.0] * (now[0] >= 247)
    assert tasks.cancelled == 0
    watch_it.close()
