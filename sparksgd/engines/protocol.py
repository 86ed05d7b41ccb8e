"""What an engine is: it advances a solver by steps, and evaluates weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sparksgd.compute import Answer, Evaluation, Plan, WorkerReport
from sparksgd.numerics import Numerics
from sparksgd.shard import Descriptor
from sparksgd.solvers.protocol import GradientSum, Solver

__all__ = [
    "Arrival",
    "Engine",
    "MakeEngine",
    "Recovery",
    "SegmentReport",
    "Shards",
    "StepReport",
    "StepTiming",
    "take_step",
]


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Where the seconds of one step went."""

    total: float
    """The whole step."""

    broadcast: float = 0.0
    """Handing the weights to Spark, or the strips to all workers."""

    launch: float = 0.0
    """From submitting the job to the last worker's start; of a job of many steps, its start and end."""

    compute: float = 0.0
    """The slowest worker's own work."""

    aggregate: float = 0.0
    """From the last worker's end to the sum."""

    update: float = 0.0
    """The solver."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An answer that reached the driver by itself, in time or late."""

    worker: int
    host: str

    version: int
    """The version of the weights that it was computed from."""

    arrived_s: float
    """Seconds from the beginning of that version's step."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step: what is exact first, then what the clock said."""

    step: int
    """Its number, from 1."""

    epoch: int
    """Its epoch, from 1."""

    version: int
    """The version of the weights that its gradients were computed from."""

    rows: int
    """Rows that took part."""

    shards: int
    """Shards that took part."""

    loss: float
    """Mean loss of the rows."""

    lr: float
    """Learning rate."""

    timing: StepTiming
    """Seconds."""

    workers: tuple[WorkerReport, ...]
    """Who worked, and when."""

    took_part: tuple[int, ...]
    """The shards whose gradients it is made of."""

    deal: int = 0
    """How often the rows had been dealt anew."""

    late: tuple[int, ...] = ()
    """Workers that were asked, and had not answered when it ended."""

    arrivals: tuple[Arrival, ...] = ()
    """Answers since the step before, late ones of earlier steps, too; empty where they come summed."""


@dataclass(kw_only=True)
class SegmentReport:
    """The steps between two returns to the training loop."""

    steps: list[StepReport] = field(default_factory=list)
    """Steps made."""

    sent_bytes: int = 0
    """Bytes of vectors that workers sent to each other."""


@dataclass(kw_only=True)
class Recovery:
    """What went wrong during a run, and was mended."""

    retries: int = 0
    """Jobs tried again because an executor or a shard's file was lost."""

    rebuilt_shards: int = 0
    """Shards written again."""

    strangers: int = 0
    """Connections dropped because they did not prove that they belong to the run."""


class Shards(Protocol):
    """Dealt rows."""

    @property
    def table(self) -> Sequence[Descriptor]:
        """Every shard's descriptor, in order."""
        ...

    def close(self) -> None:
        """Remove the files."""
        ...


class Engine(Protocol):
    """Advances a solver."""

    name: str
    """What engine.name calls it."""

    mode: str
    """How its steps run."""

    segment_steps: int
    """How many steps it likes to make between two returns."""

    recovery: Recovery
    """What it had to mend so far."""

    def contact(self) -> list[Numerics]:
        """Reach every worker once, and return their numerics."""
        ...

    def advance(self, solver: Solver, steps: int) -> SegmentReport:
        """Make steps; a call that raises leaves the solver as the last whole step made it."""
        ...

    def evaluate(self, solver: Solver) -> Evaluation:
        """Evaluate the solver's weights on the test rows."""
        ...

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Go on with the same rows in other shards, dealt while no worker computes."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


MakeEngine = Callable[[Plan, Shards, Shards | None], Engine]


def take_step(
    solver: Solver,
    plan: Plan,
    answer: Answer,
    timing: Callable[[], StepTiming],
    late: Sequence[int] = (),
    arrivals: Sequence[Arrival] = (),
) -> StepReport:
    """Give a step's sum to the solver and report it.

    Args:
        solver: advanced by one step.
        plan: the run's.
        answer: of all shards that take part.
        timing: called after the update.
        late: workers that did not answer in time.
        arrivals: who answered, and when.
    """
    arrived = answer.total()
    assert isinstance(arrived, GradientSum)
    version, took_part = solver.step, tuple(sorted(answer.shards))
    expected = plan.sampling.rows_of_step(version, took_part)
    assert arrived.rows == expected, f"{arrived.rows} rows arrived for a step of {expected}"
    outcome = solver.receive(arrived)
    return StepReport(
        step=version + 1,
        epoch=plan.sampling.epoch_of(version) + 1,
        version=version,
        rows=arrived.rows,
        shards=arrived.shards,
        loss=arrived.loss / arrived.rows,
        lr=outcome.lr,
        timing=timing(),
        workers=tuple(answer.workers),
        took_part=took_part,
        deal=plan.deal,
        late=tuple(late),
        arrivals=tuple(arrivals),
    )
