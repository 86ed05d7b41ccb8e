"""Arm: sparksgd's all-reduce engine, a training of every size in turn, in one session."""

from __future__ import annotations

from dataclasses import replace

from measuring import MODELS, Block, Task, answer
from product import session_of, train_lenet

from sparksgd.engines.allreduce import AllReduceEngine
from sparksgd.engines.protocol import StepReport
from sparksgd.training import EvaluationReport, Training


class Clock:
    """Observer that keeps what each step took, the start and end of its Spark job included."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.compute_s: list[float] = []

    def started(self, training: Training) -> None:
        """Do nothing."""

    def stepped(self, training: Training, report: StepReport) -> None:
        """Note the step."""
        self.step_s.append(report.timing.total)
        self.compute_s.append(report.timing.compute)

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """Do nothing: nothing is evaluated."""

    def ended(self, training: Training) -> None:
        """Refuse numbers in which a segment was made twice."""
        assert not training.recovery.retries, f"{training.recovery.retries} segments were tried again"


def measure(task: Task) -> list[Block]:
    """Train at every size; return the blocks after the warm-up."""
    session = session_of(task)
    blocks = []
    for shards in task.shards_per_worker:
        for name, rows in task.sizes:
            clock = Clock()
            train_lenet(
                session,
                replace(task, rows_per_step=rows * task.num_workers),
                steps=task.warmup_steps + task.blocks * task.block_steps,
                shards_per_worker=shards,
                observers=[clock],
                model=MODELS[name],
                engine=AllReduceEngine,
            )
            finer = "" if shards == 1 else f", {shards} shards per worker"
            for first in range(task.warmup_steps, len(clock.step_s), task.block_steps):
                part = slice(first, first + task.block_steps)
                blocks.append(
                    Block(
                        what=f"sparksgd all-reduce, {name}, {rows} rows{finer}",
                        rows_per_step=rows * task.num_workers,
                        step_s=tuple(clock.step_s[part]),
                        compute_s=tuple(clock.compute_s[part]),
                    )
                )
    session.stop()
    return blocks


if __name__ == "__main__":
    answer(measure)
