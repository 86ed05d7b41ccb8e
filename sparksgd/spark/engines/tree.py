"""The tree engine: one barrier-mode Spark job per step.

    driver ── broadcast(answer) ───> workers: mapPartitions over their shards, in barrier mode
    driver <── treeAggregate ─────── {node of the addition tree: sum of messages}
    driver: solver.receive(sum)

Spark's aggregation adds in its own order.  So it merges partial sums by node of our tree, and only siblings
are added.

A step is a transaction.  If it fails (an executor is lost, or the file of a shard), the solver does not
change, and the step is tried again.
"""

from __future__ import annotations

import time
from functools import partial

from sparksgd.engines.kinds import TREE
from sparksgd.engines.protocol import SegmentReport, take_step
from sparksgd.solvers.protocol import RoundSolver
from sparksgd.spark.engines.base import SparkEngine
from sparksgd.spark.tasks import step_tasks

__all__ = ["TreeEngine"]


class TreeEngine(SparkEngine):
    """Runs each step as one Spark job.

    Args:
        cluster: where the workers are.
        config: how often a step is tried.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = TREE.name
    mode = TREE.mode
    segment_steps = 1

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        """Make steps."""
        report = SegmentReport()
        sampling, workers = self._plan.sampling, self._cluster.num_workers
        for _ in range(steps):
            started = time.perf_counter()
            answer, asked = solver.answer(), solver.quorum().shards
            rows = sampling.rows_of_round(range(answer.turn, answer.turn + answer.turns))
            exchange = self._ask(
                self._shards,
                step_tasks.Round(answer=answer, asked=asked),
                step_tasks.make_round,
                f"step {solver.version + 1} (epoch {sampling.epoch_of(answer.turn) + 1}): gradients of "
                f"{rows} rows on {workers} workers",
                limit_s=self._step_timeout_s * answer.turns,
            )
            timing = partial(exchange.timing, started, time.perf_counter())
            report.steps.append(take_step(solver, self._plan, exchange.reply, timing))
        return report
