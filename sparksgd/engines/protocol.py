"""The interface of engines: an engine advances a solver by steps, and evaluates weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.kinds import EngineKind
from sparksgd.engines.memory import RunSizes
from sparksgd.engines.replies import Evaluation, Reply, WorkerReport
from sparksgd.engines.trace import TraceEvent
from sparksgd.solvers.arrivals import ArrivalSolver, ArrivalStep
from sparksgd.solvers.protocol import CentralSolver, HalfState, Message, RoundSolver, total_weight

__all__ = [
    "Arrival",
    "Engine",
    "MakeEngine",
    "Recovery",
    "SegmentReport",
    "ServerUse",
    "ShardStates",
    "StepReport",
    "StepTiming",
    "VirtualCost",
    "arrival_reports",
    "step_report",
    "take_step",
]


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """How the seconds of one step were spent."""

    total: float
    """The whole step."""

    broadcast: float = 0.0
    """Broadcasting the weights (all-reduce: the strips, to all workers)."""

    launch: float = 0.0
    """From submitting the job to the start of the last worker; with many steps in a job, the job's start and
    end."""

    compute: float = 0.0
    """The work of the slowest worker."""

    aggregate: float = 0.0
    """From the end of the last worker to the sum."""

    update: float = 0.0
    """The solver."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An answer that reached the driver by itself, in time or too late."""

    worker: int
    host: str

    version: int
    """The version of the weights that it was computed from."""

    arrived_s: float
    """Seconds from the beginning of that version's step."""


@dataclass(frozen=True, kw_only=True)
class VirtualCost:
    """What a step took on a cluster in virtual time."""

    ends_s: float
    """When it was made, in virtual seconds from the run's start."""

    sent_bytes: int
    """Bytes of vectors on all links since the last step."""

    lost_workers: int = 0
    """How many workers were lost since the last step."""


@dataclass(frozen=True, kw_only=True)
class ServerUse:
    """What the server and its workers did since the last step."""

    busy_s: float
    """Seconds in which the server's thread did not wait for workers."""

    waited_s: float
    """Seconds for which workers, that had made a turn, waited for the next one; the sum of all."""

    computed_s: float
    """Seconds in which workers made turns; the sum of all."""

    lost_workers: int = 0
    """How many connections of workers ended."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step: first what is exact, then what was measured."""

    step: int
    """Its number, from 1: the version that it made."""

    turn: int
    """How many turns every shard had made after it; in synchronous SGD this is the step's number."""

    epoch: int
    """The epoch of its last turn, from 1."""

    version: int
    """The version of the weights that its messages were computed from."""

    rows: int
    """How many rows took part."""

    weight: float
    """Their weight; if rows have none, how many they are."""

    shards: int
    """How many shards took part."""

    loss: float
    """Mean loss of the rows, by weight."""

    lr: float
    """Learning rate."""

    timing: StepTiming
    """Seconds."""

    workers: tuple[WorkerReport, ...]
    """Which workers computed, and when."""

    took_part: tuple[int, ...]
    """The shards whose messages it uses."""

    deal: int = 0
    """How often the rows had been dealt again."""

    late: tuple[int, ...] = ()
    """Workers that had been asked, but had not answered when it ended."""

    trace: tuple[TraceEvent, ...] = ()
    """What chance decided since the last step; empty if nothing is chance."""

    arrivals: tuple[Arrival, ...] = ()
    """Answers since the last step, with late ones of earlier steps; empty if answers arrive as a sum."""

    staleness: tuple[int, ...] = ()
    """Of each message, in the order of `took_part`, where shards make turns at their own pace."""

    ignored: int = 0
    """How many messages were too old to be used, since the last step."""

    virtual: VirtualCost | None = None
    """What it took in virtual time; None if its times are real."""

    server: ServerUse | None = None
    """What the server did; None if there is none."""

    @property
    def virtual_s(self) -> float | None:
        """Return when it was made, in virtual seconds."""
        return None if self.virtual is None else self.virtual.ends_s


@dataclass(kw_only=True)
class SegmentReport:
    """The steps between two returns to the training loop."""

    steps: list[StepReport] = field(default_factory=list)
    """The steps that were made."""

    sent_bytes: int = 0
    """Bytes of vectors that workers sent to each other."""


@dataclass(kw_only=True)
class Recovery:
    """The failures that a run recovered from."""

    retries: int = 0
    """Jobs that were tried again because an executor or a shard's file was lost."""

    rebuilt_shards: int = 0
    """Shards that were written again."""

    strangers: int = 0
    """Connections that were dropped because they did not prove to belong to the run."""


ShardStates = Mapping[int, HalfState]
"""What the halves of shards keep, by the numbers of the shards."""


class Engine(Protocol):
    """Advances a solver."""

    name: str
    """The value of engine.name."""

    mode: str
    """How its steps run."""

    segment_steps: int
    """How many steps it makes between two returns to the loop, if it may."""

    recovery: Recovery
    """The failures that it recovered from so far."""

    def open(self) -> None:
        """Refuse what cannot work, and get what the engine needs until `close`."""
        ...

    def shard_states(self) -> ShardStates | None:
        """Return what shards keep between steps, if a checkpoint must hold it; the arrays may be views.

        Returns:
            The state of each shard's half; nothing where halves keep none, or begin anew when a run goes on.
            None: a step was cut off, and the states are of no version.
        """
        ...

    def go_on(self, solver: Any, turns: Mapping[int, int], shards: ShardStates) -> None:
        """Take note, before the first step, that the run goes on from a checkpoint.

        Args:
            solver: as it goes on.
            turns: where shards make turns at their own pace, the turn that each makes next.
            shards: what `shard_states` returned.
        """
        ...

    def contact(self) -> list[Numerics]:
        """Reach every worker once, and return their numerics."""
        ...

    def advance(self, solver: Any, steps: int) -> SegmentReport:
        """Make steps; if this raises, the solver is as after the last complete step.

        The solver is one of a family that the engine carries: `kinds.refuse_uncarried` has seen to that.
        """
        ...

    def evaluate(self, solver: CentralSolver) -> Evaluation:
        """Evaluate the solver's weights on the test rows."""
        ...

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Continue with the same rows in other shards; `deal` is called while no worker computes."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class MakeEngine(Protocol):
    """Makes the engine of a run; the class of `inline` is one of these."""

    @property
    def kinds(self) -> Sequence[EngineKind]:
        """Return the possible engines."""
        ...

    def check_code(self, *parts: object, replica: object = None) -> None:
        """Refuse parts whose modules workers cannot import, before the rows are dealt.

        Args:
            parts: what every worker gets.
            replica: what workers get only if they update by themselves.

        Raises:
            ModelError: with the module, the host, and how to bring it.
        """
        ...

    def check_memory(self, sizes: RunSizes, num_shards: int, /) -> None:
        """Refuse a run that takes more memory than there is, before its rows are dealt.

        Raises:
            OutOfMemory: with the arithmetic, and what would do.
        """
        ...

    def __call__(self, plan: Plan, shards: Shards, test: Shards | None, /) -> Engine:
        """Return the engine, not opened yet."""
        ...


def take_step(
    solver: RoundSolver,
    plan: Plan,
    reply: Reply,
    timing: Callable[[], StepTiming],
    late: Sequence[int] = (),
    arrivals: Sequence[Arrival] = (),
    trace: Sequence[TraceEvent] = (),
    virtual: VirtualCost | None = None,
) -> StepReport:
    """Give a round's sum to the solver and report it.

    Args:
        solver: advanced by one step.
        plan: of the run.
        reply: of all shards that take part.
        timing: returns the timing; called after the update.
        late: workers that did not answer in time.
        arrivals: which workers answered, and when.
        trace: what chance decided.
        virtual: what it took in virtual time.

    Raises:
        TrainingError: no shard sent a message.
    """
    total = reply.total()
    assert isinstance(total, Message)
    version, first, turns = solver.version, solver.turns, solver.turns_at(solver.turns)
    took_part = tuple(sorted(reply.shards))
    expected = plan.sampling.rows_of_round(range(first, first + turns), took_part)
    assert total.rows == expected, f"{total.rows} rows arrived for a step of {expected}"
    outcome = solver.receive(total)
    return step_report(
        plan,
        version=version,
        turn=first + turns,
        rows=total.rows,
        weight=total_weight(total),
        loss=total.loss / total_weight(total),
        lr=outcome.lr,
        timing=timing(),
        workers=reply.workers,
        took_part=took_part,
        shards=total.shards,
        late=late,
        arrivals=arrivals,
        trace=trace,
        virtual=virtual,
    )


def arrival_reports(
    solver: ArrivalSolver,
    plan: Plan,
    steps: Sequence[ArrivalStep],
    *,
    turns_before: int,
    timing: StepTiming,
    trace: Sequence[TraceEvent],
    ignored: int,
    virtual: VirtualCost | None = None,
    workers: Sequence[WorkerReport] = (),
    server: ServerUse | None = None,
) -> list[StepReport]:
    """Report the steps that the centre of an arrivals solver made after one message.

    Args:
        solver: after them.
        plan: of the run.
        steps: as the centre told them.
        turns_before: the solver's turns before them.
        timing: of the first; the others took no time.
        trace: what chance decided.
        ignored: how many messages were too old.
        virtual: what the first one took in virtual time.
        workers: whose turns ended since the last step.
        server: what the server did.
    """
    first = solver.version - len(steps)
    nothing_more = None if virtual is None else replace(virtual, sent_bytes=0, lost_workers=0)
    return [
        step_report(
            plan,
            version=first + number,
            turn=solver.turns,
            epoch=plan.sampling.epoch_of(turns_before) + 1,
            rows=step.rows,
            weight=step.weight,
            loss=step.loss,
            lr=step.outcome.lr,
            timing=timing if number == 0 else StepTiming(total=0.0),
            workers=workers if number == 0 else (),
            took_part=step.shards,
            shards=len(step.shards),
            trace=trace if number == 0 else (),
            staleness=step.staleness,
            ignored=ignored if number == 0 else 0,
            virtual=virtual if number == 0 else nothing_more,
            server=server if number == 0 else None,
        )
        for number, step in enumerate(steps)
    ]


def step_report(
    plan: Plan,
    *,
    version: int,
    turn: int,
    rows: int,
    weight: float,
    loss: float,
    lr: float,
    timing: StepTiming,
    workers: Iterable[WorkerReport],
    took_part: tuple[int, ...],
    shards: int,
    late: Sequence[int] = (),
    arrivals: Sequence[Arrival] = (),
    trace: Sequence[TraceEvent] = (),
    staleness: Sequence[int] = (),
    ignored: int = 0,
    virtual: VirtualCost | None = None,
    server: ServerUse | None = None,
    epoch: int | None = None,
) -> StepReport:
    """Assemble the report of a step; all engines use this.

    Args:
        plan: of the run.
        version: of the weights that the step began with.
        turn: how many turns every shard had made after it.
        rows: how many rows took part.
        weight: of these rows.
        loss: the mean of their losses, by weight.
        lr: the learning rate.
        timing: seconds.
        workers: the reports of the workers.
        took_part: the shards.
        shards: how many of them had rows.
        late: workers that did not answer in time.
        arrivals: which workers answered, and when.
        trace: what chance decided.
        staleness: of each message, where shards make turns at their own pace.
        ignored: how many messages were too old.
        virtual: what it took in virtual time.
        server: what the server did.
        epoch: of its last turn, from 1; None: that of the turn.
    """
    return StepReport(
        step=version + 1,
        turn=turn,
        epoch=plan.sampling.epoch_of(turn - 1) + 1 if epoch is None else epoch,
        version=version,
        rows=rows,
        weight=weight,
        shards=shards,
        loss=loss,
        lr=lr,
        timing=timing,
        workers=tuple(workers),
        took_part=took_part,
        deal=plan.deal,
        late=tuple(late),
        arrivals=tuple(arrivals),
        trace=tuple(trace),
        staleness=tuple(staleness),
        ignored=ignored,
        virtual=virtual,
        server=server,
    )
