"""What the tests of rounds say in short: a machine, events in, instructions out.

Unless a test says otherwise: four workers, worker w with shard w, a slot for each on any executor; requests
count from 1, and the step of version v is the one that makes version v + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sparksgd.engines.gathering.rounds import Arrived, Ask, Began, Finish, Placed, RoundGathering, Slots, Take
from sparksgd.engines.trace import TraceEvent
from sparksgd.errors import ShardMissing, SparkSGDError
from sparksgd.solvers.protocol import Quorum


def gathering(
    owned: Mapping[int, Iterable[int]] | int = 4,
    *,
    slots: int | None = None,
    places: Mapping[int, str | None] | None = None,
    executors: Iterable[str] = (),
) -> RoundGathering:
    """Return a machine that knows its slots and who has which shards; of so many workers, one shard each."""
    found = RoundGathering()
    workers = {w: (w,) for w in range(owned)} if isinstance(owned, int) else owned
    count = len(workers) if slots is None else slots
    assert found.handle(Slots(count=count, executors=frozenset(executors))) == []
    assert found.handle(placed(workers, places)) == []
    return found


def placed(owned: Mapping[int, Iterable[int]], places: Mapping[int, str | None] | None = None) -> Placed:
    return Placed(
        owned={worker: tuple(shards) for worker, shards in owned.items()},
        place_of=places or dict.fromkeys(owned),
    )


def began(version: int, shards: Iterable[int] = range(4), *, backups: int = 0) -> Began:
    asked = frozenset(shards)
    return Began(version=version, turn=version, quorum=Quorum(shards=asked, enough=len(asked) - backups))


def reply(request: int, worker: int, *, shards: tuple[int, ...] | None = None, rows: int = 5) -> Arrived:
    """Return a worker's reply, of its one shard unless some are named."""
    return Arrived(request=request, worker=worker, shards=(worker,) if shards is None else shards, rows=rows)


def failed(request: int, worker: int, failure: SparkSGDError) -> Arrived:
    return Arrived(request=request, worker=worker, shards=(worker,), rows=0, failure=failure)


def missing(worker: int) -> ShardMissing:
    return ShardMissing(f"shard {worker} is gone", (worker,))


def ask(request: int, *workers: int) -> Ask:
    return Ask(request=request, workers=workers)


def take(worker: int) -> Take:
    return Take(worker=worker)


def finish(*late: int) -> Finish:
    return Finish(late=late)


def kinds(events: Iterable[TraceEvent]) -> list[tuple[str, int | None, int]]:
    return [(event.kind, event.shard, event.version) for event in events]
