"""The inline engine: it computes all shards in this process, one after the other.

It is the reference: all other engines must give the same bits.  Use it to debug a module.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.data.shard import Descriptor
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Computer, Plan
from sparksgd.engines.gossip_turns import GossipTurns, TurnMade
from sparksgd.engines.kinds import INLINE
from sparksgd.engines.memory import RunSizes, require_here
from sparksgd.engines.protocol import (
    Recovery,
    SegmentReport,
    ShardStates,
    StepReport,
    StepTiming,
    VirtualCost,
    step_report,
    take_step,
)
from sparksgd.engines.replies import Evaluation, Reply
from sparksgd.errors import ConfigError, ShardMissing
from sparksgd.solvers.gossip import GossipSolver
from sparksgd.solvers.protocol import (
    Answer,
    CentralSolver,
    Gradient,
    Need,
    RoundSolver,
    WorkerHalf,
    total_weight,
)

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
        self._gossip_turns: GossipTurns | None = None
        self._is_cut_off = False

    @staticmethod
    def check_code(*parts: object, replica: object = None) -> None:
        """Refuse nothing: this process has imported all parts."""

    @staticmethod
    def check_memory(sizes: RunSizes, num_shards: int) -> None:
        """Refuse a run that takes more memory than this machine has."""
        require_here(sizes, num_shards)

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

    def shard_states(self) -> ShardStates | None:
        """Return what shards keep; None: a step was cut off, and they are of no version."""
        if not self._plan.halves.keep_state:
            return {}
        if self._is_cut_off:
            return None
        halves = self._computer.halves if self._gossip_turns is None else self._gossip_turns.halves
        return {shard: half.state() for shard, half in halves.items()}

    def go_on(self, solver: CentralSolver, turns: Mapping[int, int], shards: ShardStates) -> None:
        """Let each shard go on from what it kept."""
        for shard, state in shards.items():
            if Need.GOSSIP in solver.needs:
                self._turns_of(cast(GossipSolver, solver)).halves[shard].load_state(state)
            else:
                self._computer.half(shard).load_state(state)

    def contact(self) -> list[Numerics]:
        """Return this process's numerics."""
        return [self._computer.numerics]

    def advance(self, solver: CentralSolver, steps: int) -> SegmentReport:
        """Make steps."""
        self._is_cut_off = True
        if Need.GOSSIP in solver.needs:
            report = SegmentReport(steps=[self._gossip(cast(GossipSolver, solver)) for _ in range(steps)])
        else:
            report = self._rounds_of(cast(RoundSolver, solver), steps)
        self._is_cut_off = False
        return report

    def _gossip(self, solver: GossipSolver) -> StepReport:
        """Let all shards make a turn."""
        started = time.perf_counter()
        made = self._turns_of(solver).next()
        return self._gossip_report(solver, made, StepTiming(total=time.perf_counter() - started))

    def _turn(self, shard: Descriptor, turn: int, half: WorkerHalf[Any], answer: Answer) -> Gradient | None:
        """Let a shard make a turn; see `MakeTurn`."""
        try:
            return self._computer.turn(shard, turn, half, answer)
        except ShardMissing as error:
            raise _not_rewritten(error) from error

    def _turns_of(self, solver: GossipSolver) -> GossipTurns:
        if self._gossip_turns is None:
            self._gossip_turns = GossipTurns(self._computer, self._turn, self._shards.table, solver)
        return self._gossip_turns

    def _gossip_report(
        self, solver: GossipSolver, made: TurnMade, timing: StepTiming, virtual: VirtualCost | None = None
    ) -> StepReport:
        total = made.total
        return step_report(
            self._plan,
            version=solver.version - 1,
            turn=solver.turns,
            rows=total.rows,
            weight=total_weight(total),
            loss=total.loss / total_weight(total),
            lr=made.outcome.lr,
            timing=timing,
            workers=(),
            took_part=tuple(range(len(self._shards.table))),
            shards=made.shards,
            virtual=virtual,
        )

    def _rounds_of(self, solver: RoundSolver, steps: int) -> SegmentReport:
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
        raise _not_rewritten(failure)
    if failure is not None:
        raise failure


def _not_rewritten(missing: ShardMissing) -> ShardMissing:
    return ShardMissing(
        f"{missing}. The inline engine writes no shard again: run again, and test this disk if it "
        f"happens again",
        missing.shards,
    )
