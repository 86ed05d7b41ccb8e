"""The inline engine: it computes all shards in this process, one after the other.

It is the reference: all other engines must give the same bits.  Use it to debug a module.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Computer, Plan
from sparksgd.engines.kinds import INLINE
from sparksgd.engines.memory import RunSizes, require_here
from sparksgd.engines.protocol import Recovery, SegmentReport, StepTiming, take_step
from sparksgd.engines.replies import Evaluation, Reply
from sparksgd.errors import ConfigError, ShardMissing
from sparksgd.solvers.protocol import CentralSolver, RoundSolver

__all__ = ["InlineEngine", "raise_failure"]


class InlineEngine:
    """Computes in this process.

    Args:
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    kinds = (INLINE,)
    name = INLINE.name
    mode = INLINE.mode
    segment_steps = 1

    def __init__(self, plan: Plan, shards: Shards, test: Shards | None) -> None:
        self._plan = plan
        self._shards = shards
        self._test = test
        self.recovery = Recovery()

    @staticmethod
    def check_memory(sizes: RunSizes, num_shards: int) -> None:
        """Refuse a run that takes more memory than this machine has."""
        require_here(sizes)

    def open(self) -> None:
        """Make the computer.

        Raises:
            ConfigError: train.threads is larger than the number of cores.
        """
        cores = os.cpu_count() or 1
        if self._plan.threads > cores:
            raise ConfigError(
                f"train.threads is {self._plan.threads}, but this machine has {cores} cores: set "
                f"train.threads={cores} or less"
            )
        self._computer = Computer(self._plan)

    def contact(self) -> list[Numerics]:
        """Return this process's numerics."""
        return [self._computer.numerics]

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        """Make steps."""
        report = SegmentReport()
        for _ in range(steps):
            started = time.perf_counter()
            asked = solver.quorum().shards
            reply = self._computer.round(0, self._shards.table, solver.answer(), asked)
            raise_failure(reply)
            computed = time.perf_counter()

            def timing(started: float = started, computed: float = computed) -> StepTiming:
                ended = time.perf_counter()
                return StepTiming(total=ended - started, compute=computed - started, update=ended - computed)

            report.steps.append(take_step(solver, self._plan, reply, timing))
        return report

    def evaluate(self, solver: CentralSolver) -> Evaluation:
        """Evaluate the solver's weights on the test rows."""
        assert self._test is not None
        reply = self._computer.evaluations(0, self._test.table, solver.readout())
        raise_failure(reply)
        total = reply.total()
        assert isinstance(total, Evaluation)
        return total

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Continue with the same rows in other shards."""
        self._plan, self._shards = deal()
        self._computer = Computer(self._plan)

    def close(self) -> None:
        """Hold nothing."""


def raise_failure(reply: Reply) -> None:
    """Raise what failed; here nobody writes a shard again."""
    failure = reply.failure
    if isinstance(failure, ShardMissing):
        raise ShardMissing(
            f"{failure}. The inline engine writes no shard again: run again, and test this disk if it "
            f"happens again",
            failure.shards,
        )
    if failure is not None:
        raise failure
