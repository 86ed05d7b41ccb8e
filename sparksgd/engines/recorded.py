"""A run of arrivals again, in the order of its trace: the same messages meet the same weights."""

from __future__ import annotations

import copy
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
        most_steps: how many steps are made; the run may have undone its last one.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Shards,
        test: Shards | None,
        events: Sequence[TraceEvent],
        most_steps: int,
    ) -> None:
        super().__init__(plan, shards, test)
        self._events, self._most_steps = deque(enumerate(events)), most_steps
        self._ignored = 0
        self._begun: set[int] = set()
        self._answers: dict[int, Answer] = {}
        self._turns: dict[int, int] = {}  # that each shard has started, and not made yet
        self._due: dict[int, range] = {}  # which turns may be the next one of each shard
        self._versions: dict[int, int] = {}  # that each shard has taken
        self._pushed: dict[int, int] = {}  # the turn of each shard's last push

    def open(self) -> None:
        """Make the computer."""
        super().open()
        self._work = ShardWork(self._computer, self._shards.table, self._turn)

    def advance(self, solver: ArrivalSolver, steps: int) -> SegmentReport:  # type: ignore[override]  # the trace is of arrivals, and so is the solver
        """Make steps; fewer, if the trace ends before."""
        report = SegmentReport()
        while len(report.steps) < steps and self._events and solver.version < self._most_steps:
            began, turns_before, trace = time.perf_counter(), solver.turns, list[TraceEvent]()
            made: Sequence[ArrivalStep] = ()
            ignored_before = self._ignored
            while self._events and not made:
                number, event = self._events.popleft()
                made = self._happens(solver, number, event)
                trace.append(event)
            report.steps += arrival_reports(
                solver,
                self._plan,
                made,
                turns_before=turns_before,
                timing=StepTiming(total=time.perf_counter() - began),
                trace=trace,
                ignored=self._ignored - ignored_before,
            )
        return report

    def _happens(self, solver: ArrivalSolver, number: int, event: TraceEvent) -> Sequence[ArrivalStep]:
        if event.kind == "anew":
            self._begin_anew(solver, number, event)
            return ()
        shard = event.shard
        if shard is None or shard not in range(len(self._shards.table)):
            raise _unfit(number, event, f"there are {len(self._shards.table)} shards")
        if event.kind in ("start", "push") and self._versions.get(shard) != event.version:
            raise _unfit(number, event, f"the shard has taken version {self._versions.get(shard)}")
        if event.kind == "start":
            due = self._due.get(shard, range(1))
            if event.turn not in due:
                raise _unfit(number, event, f"its next turn is {due.start}")
            if shard in self._turns and self._work.turn(shard, self._turns[shard]) is not None:
                raise _unfit(number, event, "the shard has sent a message before, which is not there")
            self._turns[shard], self._due[shard] = event.turn, range(event.turn + 1, event.turn + 2)
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
            self._versions[shard] = event.version
        elif event.kind == "lost":
            if shard not in self._begun:
                raise _unfit(number, event, "the shard is lost already")
            self._begun.discard(shard)
            self._versions.pop(shard, None)
            started = self._turns.pop(shard, None)
            if started is not None:  # nobody noted whether that turn was made
                self._due[shard] = range(started, started + 2)
            self._answers.pop(shard, None)
            self._work.forget(shard)
            verdict = solver.lost(shard)
            self._answers |= verdict.answers
            return verdict.steps
        return ()

    def _begin_anew(self, solver: ArrivalSolver, number: int, event: TraceEvent) -> None:
        """Let all shards begin anew, as the run did when it went on from a checkpoint."""
        if event.version != solver.version:
            raise _unfit(number, event, f"the centre is at version {solver.version}")
        solver.load_state(copy.deepcopy(solver.state()))
        for known in (self._begun, self._answers, self._turns, self._versions):
            known.clear()
        for shard in range(len(self._shards.table)):
            self._work.forget(shard)
            after = self._pushed.get(shard, -1) + 1
            self._due[shard] = range(after, after + 1)

    def _push(
        self, solver: ArrivalSolver, number: int, event: TraceEvent, shard: int
    ) -> Sequence[ArrivalStep]:
        if self._turns.pop(shard, None) != event.turn:
            raise _unfit(number, event, "the shard has not started that turn")
        message = self._work.turn(shard, event.turn)
        if message is None:
            raise _unfit(number, event, "the shard sends nothing after that turn")
        self._pushed[shard] = event.turn
        verdict = solver.arrived(shard, message, event.version)
        self._ignored += verdict.is_ignored
        self._answers |= verdict.answers
        return verdict.steps


def _unfit(number: int, event: TraceEvent, why: str) -> DataError:
    return DataError(
        f"the trace does not fit this run: event {number} is {event.kind} of turn {event.turn} of shard "
        f"{event.shard}, version {event.version}, but {why}. It is damaged, or of another run"
    )
