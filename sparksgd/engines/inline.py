"""The inline engine: every shard computed in this process, one after the other.

The reference that all other engines must equal, bit for bit; and the one to debug a module with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from sparksgd.compute import Computer, Evaluation, Plan
from sparksgd.engines.protocol import Recovery, SegmentReport, Shards, StepTiming, take_step
from sparksgd.errors import ConfigError
from sparksgd.numerics import Numerics
from sparksgd.solvers.protocol import Solver

__all__ = ["InlineEngine"]


class InlineEngine:
    """Computes in this process.

    Args:
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = "inline"
    mode = "in one process"
    segment_steps = 1

    def __init__(self, plan: Plan, shards: Shards, test: Shards | None) -> None:
        cores = os.cpu_count() or 1
        if plan.threads > cores:
            raise ConfigError(
                f"train.threads is {plan.threads}, but this machine has {cores} cores: set "
                f"train.threads={cores} or less"
            )
        self._plan = plan
        self._shards = shards
        self._test = test
        self._computer = Computer(plan)
        self.recovery = Recovery()

    def contact(self) -> list[Numerics]:
        """Return this process's numerics."""
        return [self._computer.numerics]

    def advance(self, solver: Solver, steps: int) -> SegmentReport:
        """Make steps."""
        report = SegmentReport()
        for _ in range(steps):
            started = time.perf_counter()
            asked = solver.quorum().shards
            answer = self._computer.gradients(0, self._shards.table, solver.weights(), solver.step, asked)
            if answer.failure is not None:
                raise answer.failure
            computed = time.perf_counter()

            def timing(started: float = started, computed: float = computed) -> StepTiming:
                ended = time.perf_counter()
                return StepTiming(total=ended - started, compute=computed - started, update=ended - computed)

            report.steps.append(take_step(solver, self._plan, answer, timing))
        return report

    def evaluate(self, solver: Solver) -> Evaluation:
        """Evaluate the solver's weights on the test rows."""
        assert self._test is not None
        answer = self._computer.evaluations(0, self._test.table, solver.weights())
        if answer.failure is not None:
            raise answer.failure
        total = answer.total()
        assert isinstance(total, Evaluation)
        return total

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Go on with the same rows in other shards."""
        self._plan, self._shards = deal()
        self._computer = Computer(self._plan)

    def close(self) -> None:
        """Hold nothing."""
