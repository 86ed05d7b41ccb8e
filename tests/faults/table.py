"""The rows of the table of faults: what was struck, what came of it, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

__all__ = ["ENGINES", "Fault", "NotHere", "Outcome", "Place", "Row", "markdown"]

ENGINES = ("tree", "allreduce")


class NotHere(Exception):
    """A place cannot be had on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run that was struck."""

    result: str
    """Whether it ended at the bits of an undisturbed run; or the words of its refusal."""

    is_right: bool
    """Whether that is what should have come of it."""

    lost_s: float | None = None
    """Its wall time less the median of undisturbed runs; None where it did not come to an end."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and how to strike a run with it."""

    name: str
    killed: str
    """What exactly is struck, and when."""

    strike: Callable[[Any, str], Outcome]
    """Runs a training in a place by an engine, and strikes it."""

    engines: Sequence[str] = ENGINES


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where faults strike: what is started once for several of them."""

    name: str
    opened: Callable[[], AbstractContextManager[Any]]
    faults: Sequence[Fault]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    fault: Fault
    engine: str
    outcome: Outcome

    def __str__(self) -> str:
        lost = "-" if self.outcome.lost_s is None else f"{self.outcome.lost_s:.1f}"
        cells = (self.fault.name, self.engine, self.fault.killed, self.outcome.result, lost)
        return f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |"


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| fault | engine | what was struck | result | seconds lost |"
    yield "|---|---|---|---|---|"
    yield from map(str, rows)
