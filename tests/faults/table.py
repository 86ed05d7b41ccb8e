"""The rows of the table of faults: what was struck, what came of it, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "BACKUP", "ENGINES", "HEAD", "RECORDED", "SERVER", "Fault", "NotHere", "Outcome", "Place", "Row",
    "updated", "wanted",
]  # fmt: skip

ENGINES = ("tree", "allreduce")
SERVER, BACKUP = "server", "tree, 1 backup worker"
RECORDED = (SERVER, BACKUP)
"""Those whose bits are decided by what arrives first, which the run records."""

HEAD = """\
# What faults cost

`make faults` strikes trainings of a small net, and writes this table: 24 steps of two workers on 1,003
rows, unless a row says otherwise. Each run is struck at a step. It must end at the bits of a run that
nobody struck, or be refused in the words that stand here. On `server`, and with a backup worker, what
arrives first decides the bits: there the run must end at those of a replay of its record on `inline`, and
a step of `server` (`async_sgd`) is one message of a shard, of which there are 192. The seconds lost are its
wall time less the median of undisturbed runs of the same session.

| fault | engine | what was struck | result | seconds lost | written on, of version |
|---|---|---|---|---|---|
""".splitlines()


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
    when: str
    """The date, and the version of the product."""

    @property
    def begins_with(self) -> str:
        """What no other row begins with."""
        return _cells(self.fault.name, self.engine, self.fault.killed)

    def __str__(self) -> str:
        lost = "-" if self.outcome.lost_s is None else f"{self.outcome.lost_s:.1f}"
        return self.begins_with + _cells(self.outcome.result, lost, self.when) + "|"


def updated(text: str, row: Row) -> str:
    """Return a page whose table has this row, in the place of an earlier one of the same fault."""
    lines = text.splitlines()
    if HEAD[-1] not in lines:
        lines += HEAD
    for number, line in enumerate(lines):
        if line.startswith(row.begins_with):
            lines[number] = str(row)
            break
    else:
        lines.append(str(row))
    return "\n".join([*lines, ""])


def wanted(faults: Sequence[Fault], words: Sequence[str], engines: Sequence[str]) -> list[Fault]:
    """Return the faults in whose first columns one of the words stands, each at such engines only."""
    found = (
        replace(fault, engines=[name for name in fault.engines if any(word in name for word in engines)])
        for fault in faults
        if any(word in f"{fault.name}, {fault.killed}" for word in words)
    )
    return [fault for fault in found if fault.engines]


def _cells(*texts: str) -> str:
    return "".join(f"| {text.replace('|', ' ').replace(chr(10), ' ')} " for text in texts)
