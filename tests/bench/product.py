"""Arm: sparksgd itself, the tree engine; between its blocks of steps, blocks of empty barrier jobs.

The empty job is the floor under any loop of one job per step: two tasks start, send a few bytes and
end.  It runs in the same session, in turns with the steps: on Python workers as Spark makes them, and on
sparksgd's own, which start a task sooner, because nothing of theirs is left for Python's garbage collector.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import EMPTY_JOB, LEARNING_RATE, LENET, MOMENTUM, OWN_EMPTY_JOB, Block, Task, answer
from pyspark import RDD
from pyspark.sql import SparkSession

from sparksgd.config import Config
from sparksgd.engines.protocol import StepReport
from sparksgd.spark.frame_rows import read_parquet
from sparksgd.spark.session import start_session
from sparksgd.spark.train import train
from sparksgd.training.state import Observer, Training


class EmptyJobs:
    """Empty barrier jobs, as plain as PySpark has them.

    Args:
        session: where they run.
        num_workers: how many tasks each has.
        environment: variables of the Python workers; Spark has a pool of workers for each set of them.
    """

    def __init__(self, session: SparkSession, num_workers: int, environment: Mapping[str, str]) -> None:
        self._context = session.sparkContext
        self._rows: RDD[int] = self._context.parallelize(range(num_workers), num_workers).cache()
        self._environment = environment

    def block(self, what: str, count: int) -> Block:
        """Run and time so many."""
        before = dict(self._context.environment)
        self._context.environment.update(self._environment)
        try:
            return self._block(what, count)
        finally:
            self._context.environment = before

    def _block(self, what: str, count: int) -> Block:
        job_s = []
        for _ in range(count):
            started = time.perf_counter()
            self._rows.barrier().mapPartitions(list).collect()
            job_s.append(time.perf_counter() - started)
        return Block(what=what, rows_per_step=0, step_s=tuple(job_s))


class Stopwatch(Observer):
    """Observer that times blocks of steps, with a block of each kind of empty jobs after each.

    Args:
        task: how many steps.
        what: name of the blocks of steps.
        empty_jobs: by the name of their kind.
    """

    def __init__(self, task: Task, what: str, empty_jobs: Mapping[str, EmptyJobs] | None = None) -> None:
        self.blocks: list[Block] = []
        self._task = task
        self._what = what
        self._empty_jobs = empty_jobs or {}
        self._reset()

    def _reset(self) -> None:
        self._step_s: list[float] = []
        self._compute_s: list[float] = []
        self._last = time.perf_counter()

    def started(self, training: Training) -> None:
        """Start the clock."""
        self._reset()

    def stepped(self, training: Training, report: StepReport) -> None:
        """Note the step's wall-clock, and end the warm-up or a block."""
        now = time.perf_counter()
        self._step_s.append(now - self._last)
        self._compute_s.append(report.timing.compute)
        self._last = now
        warm = report.step > self._task.warmup_steps
        if len(self._step_s) == (self._task.block_steps if warm else self._task.warmup_steps):
            self._end_block(warm)

    def _end_block(self, warm: bool) -> None:
        block = Block(
            what=self._what,
            rows_per_step=self._task.rows_per_step,
            step_s=tuple(self._step_s),
            compute_s=tuple(self._compute_s),
        )
        blocks = [block]
        for kind, jobs in self._empty_jobs.items():
            blocks.append(jobs.block(f"{self._what}: {kind}", self._task.block_steps))
        if warm:
            self.blocks += blocks
        self._reset()

    def ended(self, training: Training) -> None:
        """Refuse numbers in which a step was made twice."""
        assert not training.recovery.retries, f"{training.recovery.retries} steps were tried again"


def session_of(task: Task) -> SparkSession:
    """Return a session with sparksgd's settings, or one as a user brings it."""
    if task.plain_session:
        return SparkSession.builder.getOrCreate()
    return start_session("sparksgd benchmark", Config().train)


def train_lenet(
    session: SparkSession,
    task: Task,
    *,
    steps: int,
    shards_per_worker: int,
    observers: Sequence[Observer],
    model: Mapping[str, Any] = LENET,
    engine: str = "tree",
    segment_steps: int | None = None,
    overlap: str = "auto",
) -> None:
    """Train LeNet for so many steps."""
    config = Config.from_dict(
        {
            "data": {"features": "image", "label": "label"},
            "model": model,
            "optimizer": {"lr": LEARNING_RATE, "momentum": MOMENTUM},
            "engine": {
                "name": engine,
                "num_workers": task.num_workers,
                "segment_steps": segment_steps,
                "overlap": overlap,
            },
            "train": {
                "epochs": steps,
                "steps": steps,
                "rows_per_step": task.rows_per_step,
                "num_shards": task.num_workers * shards_per_worker,
            },
        }
    )
    train(session, config, read_parquet(session, task.data), observers=observers)


def measure(task: Task) -> list[Block]:
    """Make the steps, and time those after the warm-up."""
    session = session_of(task)
    blocks = _one_shard(session, task) if task.shards_per_worker == (1,) else _more_shards(session, task)
    session.stop()
    return blocks


def _one_shard(session: SparkSession, task: Task) -> list[Block]:
    """One training, its blocks in turns with empty jobs."""
    what = "plain session" if task.plain_session else "product"
    watch = Stopwatch(
        task,
        what,
        {
            EMPTY_JOB: EmptyJobs(
                session, task.num_workers, {"SPARKSGD_BENCH": "workers as Spark makes them"}
            ),
            OWN_EMPTY_JOB: EmptyJobs(session, task.num_workers, {}),
        },
    )
    steps = task.warmup_steps + task.blocks * task.block_steps
    train_lenet(session, task, steps=steps, shards_per_worker=1, observers=[watch])
    return watch.blocks


def _more_shards(session: SparkSession, task: Task) -> list[Block]:
    """A training of each number of shards, in turns; the first one only warms the session."""
    train_lenet(session, task, steps=task.warmup_steps, shards_per_worker=1, observers=[])
    watches = [
        Stopwatch(task, f"{count} {'shard' if count == 1 else 'shards'} per worker")
        for _ in range(task.blocks)
        for count in task.shards_per_worker
    ]
    for index, watch in enumerate(watches):
        train_lenet(
            session,
            task,
            steps=task.warmup_steps + task.block_steps,
            shards_per_worker=task.shards_per_worker[index % len(task.shards_per_worker)],
            observers=[watch],
        )
    return [block for watch in watches for block in watch.blocks]


if __name__ == "__main__":
    answer(measure)
