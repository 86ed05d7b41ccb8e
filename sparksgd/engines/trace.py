"""The trace: what chance decided, one event on each line.  A run can be replayed from it, bit by bit.

    {"trace": 1, "family": "rounds"}
    {"order": 0, "kind": "start", "worker": 2, "shard": 2, "turn": 0, "version": 0}
    {"order": 1, "kind": "push", "worker": 2, "shard": 2, "turn": 0, "version": 0}

The first line has the format's version, and the solver's family.  Kinds of events:

    start   a shard begins a turn, from the weights of a version
    push    its message is used: in a round's step, by the centre, or by its peers
    pull    it gets the centre's answer, of a version
    hold    it must wait for its answer
    lost    no worker has it any more; its next event is how it begins again
    deal    all rows are dealt again; `turn` is the first turn of the new deal
    anew    all shards begin anew, each with the turn after its last push: the run went on from a checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sparksgd.errors import DataError
from sparksgd.imports import shortened, shown
from sparksgd.storage.json_text import parsed

__all__ = [
    "FORMAT",
    "MOST_LINE_BYTES",
    "EventKind",
    "Trace",
    "TraceEvent",
    "event_line",
    "first_line",
    "read_trace",
    "took_part_of",
]

FORMAT = 1
MOST_LINE_BYTES = 4096
"""An event has 200 at most."""

EventKind = Literal["start", "push", "pull", "hold", "lost", "deal", "anew"]
_KINDS = get_args(EventKind)


@dataclass(frozen=True, kw_only=True)
class TraceEvent:
    """One event."""

    kind: EventKind

    turn: int
    """The turn of the shard, from 0."""

    version: int
    """The version of the weights that the shard read; in a pull, of the answer."""

    worker: int | None = None
    """The worker that had the shard; a replay ignores it."""

    shard: int | None = None
    """None if it is of all shards."""

    strip: int | None = None
    """The strip of the vector, if the centre has several."""


class Trace:
    """Events, in the order in which they are noted."""

    def __init__(self) -> None:
        self._events: list[TraceEvent] = []

    def note(
        self, kind: EventKind, *, turn: int, version: int, shard: int | None = None, worker: int | None = None
    ) -> None:
        """Add an event."""
        self._events.append(TraceEvent(kind=kind, worker=worker, shard=shard, turn=turn, version=version))

    def withdraw(self, kind: EventKind, version: int) -> None:
        """Forget events of a kind and a version that were not taken yet, because they had no effect."""
        self._events = [event for event in self._events if (event.kind, event.version) != (kind, version)]

    def take(self) -> tuple[TraceEvent, ...]:
        """Return the events since the last call, and forget them."""
        events, self._events = self._events, []
        return tuple(events)


def first_line(family: str) -> str:
    """Return the line that a trace begins with."""
    return json.dumps({"trace": FORMAT, "family": family})


def event_line(order: int, event: TraceEvent) -> str:
    """Return the line of an event; `order` is its number in the run, from 0."""
    known = {name: value for name, value in asdict(event).items() if value is not None}
    return json.dumps({"order": order} | known)


def read_trace(lines: Iterable[bytes], where: str) -> tuple[str, list[TraceEvent]]:
    """Return the family and the events of a trace.

    Args:
        lines: the whole ones, as `read_lines` gives them.
        where: the name of the file, for errors.

    Raises:
        DataError: it is no trace of this version, or lines are missing.
    """
    try:
        found = (parsed(line) for line in lines)
        about = next(found, None)
        if about is None:
            raise ValueError("it has no whole line")
        if about["trace"] != FORMAT:
            given = shown(about["trace"])
            raise DataError(f"{where} is a trace of format {given}, but this version reads {FORMAT}")
        if not isinstance(about["family"], str):
            raise TypeError(f"its family is {shown(about['family'])}")
        return about["family"], [_event(number, values, where) for number, values in enumerate(found)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is no trace: {type(error).__name__}: {shortened(str(error))}") from error


def _event(number: int, values: Any, where: str) -> TraceEvent:
    """Return the event of a line, which must be of this number."""
    order = values.pop("order")
    if type(order) is not int or order != number:
        raise DataError(
            f"{where} is not whole: the orders of its events are not 0, 1, 2, ...: {shown(order)} stands in "
            f"place {number}"
        )
    event = TraceEvent(**values)
    if event.kind not in _KINDS:
        raise DataError(f"{where} has an event of kind {shown(event.kind)}, which this version does not know")
    _require_counts(event)
    return event


def _require_counts(event: TraceEvent) -> None:
    """Raise TypeError if something else than a whole number stands where there must be one."""
    for name in ("turn", "version", "worker", "shard", "strip"):
        value = getattr(event, name)
        if type(value) is not int and (value is not None or name in ("turn", "version")):
            raise TypeError(f"{name} is {shown(value)}, but must be a whole number")


def took_part_of(events: Iterable[TraceEvent]) -> tuple[list[frozenset[int]], list[int]]:
    """Return for each step of a trace of rounds: the shards that took part, and the number of the deal.

    Raises:
        DataError: the steps are not in order.
    """
    took_part: list[set[int]] = []
    deals: list[int] = []
    deal = 0
    for event in events:
        if event.kind == "deal":
            deal += 1
        elif event.kind == "push":
            if event.version == len(took_part):
                took_part.append(set())
                deals.append(deal)
            if event.version != len(took_part) - 1 or event.shard is None:
                raise DataError(f"the trace is out of order at step {event.version + 1}")
            took_part[-1].add(event.shard)
    return [frozenset(shards) for shards in took_part], deals
