"""Arm: sparksgd's all-reduce engine, a training of every size in turn, in one session."""

from __future__ import annotations

import time
from dataclasses import replace

from measuring import MODELS, Block, Task, answer
from product import session_of, train_lenet
from pyspark.sql import SparkSession
from turns import Turns

from sparksgd.engines.protocol import StepReport
from sparksgd.training.state import Observer, Training

_ROUNDS_OF_SHARDS = 2


class Clock(Observer):
    """Observer that times blocks; a block is a segment, and has all that the driver does around it.

    Args:
        what: name of the blocks.
        rows_per_step: of all workers.
        block_steps: steps of a block.
        turns: the arm's.
    """

    def __init__(self, what: str, rows_per_step: int, block_steps: int, turns: Turns) -> None:
        self.blocks: list[Block] = []
        self._what = what
        self._rows_per_step = rows_per_step
        self._block_steps = block_steps
        self._turns = turns
        self._step_s: list[float] = []
        self._compute_s: list[float] = []

    def stepped(self, training: Training, report: StepReport) -> None:
        """Note the step, and end the block after its last."""
        self._step_s.append(report.timing.total)
        self._compute_s.append(report.timing.compute)
        if len(self._step_s) < self._block_steps:
            return
        assert report.step % self._block_steps == 0, "a block is one segment"
        if report.step > self._block_steps:
            self._step_s[0] += time.perf_counter() - self._began - sum(self._step_s)
            self.blocks.append(
                Block(
                    what=self._what,
                    rows_per_step=self._rows_per_step,
                    step_s=tuple(self._step_s),
                    compute_s=tuple(self._compute_s),
                    sent_share=_sent_share(training),
                )
            )
        self._step_s, self._compute_s = [], []
        self._turns.next()
        self._began = time.perf_counter()

    def ended(self, training: Training) -> None:
        """Refuse numbers in which a segment was made twice."""
        assert not training.recovery.retries, f"{training.recovery.retries} segments were tried again"


def _sent_share(training: Training) -> float:
    workers, vector_bytes = len(training.numerics) - 1, training.flat.parameters.nbytes
    return training.sent_bytes_per_worker_step / (2 * (workers - 1) / workers * vector_bytes)


def timed(
    session: SparkSession, task: Task, size: tuple[str, int, int], turns: Turns, shards: int, finer: str = ""
) -> list[Block]:
    """Train at a size; return the blocks after the first."""
    name, rows, block_steps = size
    task = replace(task, rows_per_step=rows * task.num_workers)
    arm = "sparksgd all-reduce" if task.overlap == "auto" else f"overlap {task.overlap}"
    clock = Clock(f"{arm}, {name}, {rows} rows{finer}", task.rows_per_step, block_steps, turns)
    train_lenet(
        session,
        task,
        steps=(1 + task.blocks) * block_steps,
        shards_per_worker=shards,
        observers=[clock],
        model=MODELS[name],
        engine="allreduce",
        segment_steps=block_steps,
        overlap=task.overlap,
    )
    return clock.blocks


def measure(task: Task) -> list[Block]:
    """Train at every size, then with more shards at the second."""
    turns = Turns()
    session = session_of(task)
    blocks = []
    for size in task.sizes:
        blocks += timed(session, task, size, turns, 1)
    for _ in range(_ROUNDS_OF_SHARDS):
        for shards in task.shards_per_worker:
            finer = f", {shards} {'shard' if shards == 1 else 'shards'} per worker"
            blocks += timed(session, replace(task, blocks=2), task.sizes[1], turns, shards, finer)
    session.stop()
    return blocks


if __name__ == "__main__":
    answer(measure)
