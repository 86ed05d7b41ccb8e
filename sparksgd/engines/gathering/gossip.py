"""Gathering of gossip: a shard goes on when the messages of its peers are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sparksgd.engines.gathering.shards import Back, Deliver, Lost, Pushed, ShardState, Start
from sparksgd.engines.trace import EventKind, Trace

__all__ = ["GossipGathering", "Graph"]


class Graph(Protocol):
    """Who sends to whom: the central half of a gossip solver."""

    def peers(self, turn: int, shard: int) -> Sequence[int]:
        """Return the shards that a shard's message of a turn is sent to."""
        ...


class GossipGathering:
    """Lets each shard go on when it has sent its message of a turn, and has received those of its peers.

    Nothing here is chance, because slow and lost shards are waited for.  The trace only shows these waits.

    Args:
        worker_of: the worker that has each shard.
        graph: says who sends to whom.
        turns: how many turns each shard makes.
    """

    def __init__(self, worker_of: Mapping[int, int], graph: Graph, turns: int) -> None:
        self.trace = Trace()
        self._graph, self._turns = graph, turns
        self._shards = {shard: ShardState(worker=worker) for shard, worker in sorted(worker_of.items())}
        self._sent: dict[int, set[int]] = {}

    def begin(self) -> list[Start | Deliver]:
        """Return the first instructions: every shard makes its first turn."""
        return [self._start(shard) for shard in self._shards]

    def handle(self, event: Pushed | Lost | Back) -> list[Start | Deliver]:
        """Take an event; return the instructions: messages come first, because a turn needs them."""
        shard = self._shards[event.shard]
        if not isinstance(event, Pushed) and isinstance(event, Lost) == shard.is_lost:
            return []  # known already
        if isinstance(event, Lost):
            shard.is_lost, shard.is_computing = True, False
            self._note("lost", event.shard)
            return []
        if isinstance(event, Back):
            shard.is_lost = False
            return [self._start(event.shard)] if self._may_start(event.shard) else []
        if shard.is_lost or not shard.is_computing:
            return []
        shard.is_computing = False
        self._note("push", event.shard)
        self._sent.setdefault(shard.turn, set()).add(event.shard)
        peers = self._graph.peers(shard.turn, event.shard)
        told: list[Start | Deliver] = [
            Deliver(shard=event.shard, version=shard.turn, to=peer) for peer in peers
        ]
        shard.turn += 1
        self._sent.pop(min(other.turn for other in self._shards.values()) - 2, None)  # all have taken those
        waiting = dict.fromkeys([event.shard, *peers])
        ready = [number for number in waiting if self._may_start(number)]
        if event.shard not in ready and shard.turn < self._turns:
            self._note("hold", event.shard)
        return told + [self._start(number) for number in ready]

    def _may_start(self, number: int) -> bool:
        """Return whether a shard has all messages that its next turn needs."""
        shard = self._shards[number]
        if shard.is_lost or shard.is_computing or shard.turn >= self._turns:
            return False
        return shard.turn == 0 or self._senders(number, shard.turn - 1) <= self._sent.get(
            shard.turn - 1, set()
        )

    def _senders(self, number: int, turn: int) -> set[int]:
        """Return whose messages of a turn go to a shard."""
        return {other for other in self._shards if number in self._graph.peers(turn, other)}

    def _start(self, number: int) -> Start:
        shard = self._shards[number]
        shard.is_computing = True
        self._note("start", number)
        return Start(shard=number, turn=shard.turn, version=shard.turn)

    def _note(self, kind: EventKind, number: int) -> None:
        shard = self._shards[number]
        self.trace.note(kind, turn=shard.turn, version=shard.turn, shard=number, worker=shard.worker)
