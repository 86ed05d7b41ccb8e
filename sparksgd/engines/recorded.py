"""A run of arrivals again, in the order of its trace: the same messages meet the same weights."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.protocol import SegmentReport, StepTiming, arrival_reports
from sparksgd.engines.shard_work import ShardWork
from sparksgd.engines.trace import TraceEvent
from sparksgd.errors import DataError
from sparksgd.solvers.arrivals import ArrivalSolver, ArrivalStep
from sparksgd.solvers.protocol import Answer

__all__ = ["RecordedArrivals"]


class RecordedArrivals(InlineEngine):
    """Computes in this process what a trace of arrivals says.

    Args:
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
        events: of the trace.
    """

    def __init__(self, plan: Plan, shards: Shards, test: Shards | None, events: Sequence[TraceEvent]) -> None:
        super().__init__(plan, shards, test)
        self._events = deque(enumerate(events))
        self._begun: set[int] = set()
        self._answers: dict[int, Answer] = {}
        self._turns: dict[int, int] = {}  # that each shard has started, and not made yet

    def open(self) -> None:
        """Make the computer."""
        super().open()
        self._work = ShardWork(self._computer, self._shards.table)

    def advance(self, solver: ArrivalSolver, steps: int) -> SegmentReport:  # type: ignore[override]  # the trace is of arrivals, and so is the solver
        """Make steps; fewer, if the trace ends before."""
        report = SegmentReport()
        while len(report.steps) < steps and self._events:
            began, turns_before, trace = time.perf_counter(), solver.turns, list[TraceEvent]()
            made: Sequence[ArrivalStep] = ()
            while self._events and not made:
                number, event = self._events.popleft()
                made = self._happens(solver, number, event)
                trace.append(event)
            timing = StepTiming(total=time.perf_counter() - began)
            report.steps += arrival_reports(solver, self._plan, made, turns_before, timing, (), trace)
        return report

    def _happens(self, solver: ArrivalSolver, number: int, event: TraceEvent) -> Sequence[ArrivalStep]:
        shard = event.shard
        if shard is None or shard not in range(len(self._shards.table)):
            raise _unfit(number, event, f"there are {len(self._shards.table)} shards")
        if event.kind == "start":
            if shard in self._turns and self._work.turn(shard, self._turns[shard]) is not None:
                raise _unfit(number, event, "the shard has sent a message before, which is not there")
            if shard not in self._begun:
                raise _unfit(number, event, "the shard has taken no weights")
            self._turns[shard] = event.turn
        elif event.kind == "push":
            return self._push(solver, number, event, shard)
        elif event.kind == "pull":
            if shard not in self._begun:
                self._begun.add(shard)
                self._answers[shard] = solver.begin(shard)
            answer = self._answers.pop(shard, None)
            if answer is None or answer.weights.version != event.version:
                now = "nothing" if answer is None else f"version {answer.weights.version}"
                raise _unfit(number, event, f"the centre's answer is {now}")
            self._work.take(shard, answer)
        elif event.kind == "lost":
            self._begun.discard(shard)
            self._turns.pop(shard, None)
            self._answers.pop(shard, None)
            self._work.forget(shard)
            verdict = solver.lost(shard)
            self._answers |= verdict.answers
            return verdict.steps
        return ()

    def _push(
        self, solver: ArrivalSolver, number: int, event: TraceEvent, shard: int
    ) -> Sequence[ArrivalStep]:
        if self._turns.pop(shard, None) != event.turn:
            raise _unfit(number, event, "the shard has not started that turn")
        message = self._work.turn(shard, event.turn)
        if message is None:
            raise _unfit(number, event, "the shard sends nothing after that turn")
        verdict = solver.arrived(shard, message, event.version)
        self._answers |= verdict.answers
        return verdict.steps


def _unfit(number: int, event: TraceEvent, why: str) -> DataError:
    return DataError(
        f"the trace does not fit this run: event {number} is {event.kind} of turn {event.turn} of shard "
        f"{event.shard}, version {event.version}, but {why}. It is damaged, or of another run"
    )
