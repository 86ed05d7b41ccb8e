"""Gathering of arrivals: shards make turns at their own pace, as the centre releases them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from sparksgd.engines.gathering.shards import (
    Back,
    Begin,
    Decided,
    Deliver,
    Drop,
    Lost,
    Pushed,
    ShardState,
    Start,
    Turned,
)
from sparksgd.engines.trace import EventKind, Trace

__all__ = ["ArrivalGathering"]


class ArrivalGathering:
    """Lets shards make turns at their own pace, as the centre releases them.

    A worker makes the turns of its shards one at a time, in the order in which they were released.

    Args:
        worker_of: the worker that has each shard.
        turns: the turn that each shard makes first; none where it is 0.
    """

    def __init__(self, worker_of: Mapping[int, int], turns: Mapping[int, int] | None = None) -> None:
        self.trace = Trace()
        self._shards = {
            shard: ShardState(worker=worker, turn=(turns or {}).get(shard, 0), is_lost=True)
            for shard, worker in sorted(worker_of.items())
        }
        self._busy: set[int] = set()
        self._ready: dict[int, deque[int]] = {worker: deque() for worker in sorted(set(worker_of.values()))}

    def begin(self) -> list[Begin]:
        """Return the first instructions where all shards have a worker: every one begins.

        Else each begins when it is `Back`: none is lost that was not there.
        """
        for shard in self._shards.values():
            shard.is_lost = False
        return [Begin(shard=shard) for shard in self._shards]

    def handle(self, event: Pushed | Turned | Decided | Lost | Back) -> list[Start | Deliver | Drop | Begin]:
        """Take an event; return the instructions, in their order."""
        if isinstance(event, Pushed):
            return self._pushed(event.shard)
        if isinstance(event, Turned):
            return self._turned(event.shard)
        if isinstance(event, Decided):
            return self._decided(event)
        shard = self._shards[event.shard]
        if isinstance(event, Lost) == shard.is_lost:
            return []  # known already
        if isinstance(event, Lost):
            shard.is_lost = True
            self._stop(shard)
            if event.shard in self._ready[shard.worker]:
                self._ready[shard.worker].remove(event.shard)
            self._note("lost", event.shard)
            return [Drop(shard=event.shard), *self._start_next(shard.worker)]
        shard.is_lost = False
        return [Begin(shard=event.shard)]

    def _pushed(self, number: int) -> list[Start | Deliver | Drop | Begin]:
        shard = self._shards[number]
        if shard.is_lost or not shard.is_computing:
            return []  # of a shard that was given up meanwhile
        self._stop(shard)
        self._note("push", number)
        shard.turn += 1
        return [Deliver(shard=number, version=shard.version), *self._start_next(shard.worker)]

    def _turned(self, number: int) -> list[Start | Deliver | Drop | Begin]:
        shard = self._shards[number]
        if shard.is_lost or not shard.is_computing:
            return []
        self._stop(shard)
        shard.turn += 1
        self._ready[shard.worker].append(number)
        return [*self._start_next(shard.worker)]

    def _decided(self, event: Decided) -> list[Start | Deliver | Drop | Begin]:
        sender = event.sender
        if sender is not None and sender not in event.answers and not self._shards[sender].is_lost:
            self._note("hold", sender)
        workers = []
        for number, version in sorted(event.answers.items()):
            shard = self._shards[number]
            if shard.is_lost:
                continue
            is_waiting = not shard.is_computing and number not in self._ready[shard.worker]
            assert is_waiting, f"shard {number} is answered twice"
            shard.version = version
            self._note("pull", number)
            self._ready[shard.worker].append(number)
            workers.append(shard.worker)
        return [start for worker in dict.fromkeys(workers) for start in self._start_next(worker)]

    def _stop(self, shard: ShardState) -> None:
        if shard.is_computing:
            shard.is_computing = False
            self._busy.discard(shard.worker)

    def _start_next(self, worker: int) -> list[Start]:
        """Start the next shard of a worker that has nothing to do."""
        if worker in self._busy or not self._ready[worker]:
            return []
        number = self._ready[worker].popleft()
        shard = self._shards[number]
        shard.is_computing = True
        self._busy.add(worker)
        self._note("start", number)
        return [Start(shard=number, turn=shard.turn, version=shard.version)]

    def _note(self, kind: EventKind, number: int) -> None:
        shard = self._shards[number]
        self.trace.note(kind, turn=shard.turn, version=shard.version, shard=number, worker=shard.worker)
