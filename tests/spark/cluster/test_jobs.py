"""The watch over jobs: which one is looked at, and what it does for one that gets no slot."""

from __future__ import annotations

from typing import Any

from sparksgd.spark.cluster.jobs import JobWatch


class Tasks:
    """The tasks of a run, as told."""

    def __init__(self) -> None:
        self.ours = self.others = self.cancelled = 0

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
