"""Shards that make turns at their own pace, in virtual time: a queue of events drives the gathering.

begin ── answer down ── computing ── message up, one at a time at the server ── arrived ── decided
            ^                                                                              │
            └──────────────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparksgd.engines.arrival_exchange import ArrivalExchange, all_are_held
from sparksgd.engines.shard_work import ShardWork
from sparksgd.engines.simulated.costs import Costs, Link, refuse_endless_losses
from sparksgd.engines.trace import TraceEvent
from sparksgd.solvers.arrivals import ArrivalSolver, ArrivalStep
from sparksgd.solvers.protocol import Answer, Message

__all__ = ["VirtualArrivals"]


@dataclass(frozen=True, order=True)
class _Event:
    """What happens at a time; events of one time happen in the order in which they were made."""

    time_s: float
    number: int
    kind: str
    worker: int
    life: int = 0
    """Of the worker: an event of a worker that was lost meanwhile does not happen."""

    shard: int = -1


class VirtualArrivals:
    """Runs a solver of arrivals in virtual time.

    Args:
        solver: the central half.
        work: of the shards.
        costs: of the cluster.
        worker_of: the worker of each shard that has rows.
        rows_of: returns the rows of a shard's turn.
    """

    def __init__(
        self,
        solver: ArrivalSolver,
        work: ShardWork,
        costs: Costs,
        worker_of: Mapping[int, int],
        rows_of: Callable[[int, int], int],
    ) -> None:
        self._work, self._costs, self._rows_of = work, costs, rows_of
        self._worker_of = dict(worker_of)
        self._exchange = ArrivalExchange(solver, worker_of, self)
        self._up, self._down, self._served = Link(), Link(), Link()
        self._to_worker = {worker: Link() for worker in set(worker_of.values())}
        self.now_s = 0.0
        self.losses = 0
        """How many workers were lost."""

        self.sent_bytes = 0
        """Bytes of vectors, up and down."""

        self._events: list[_Event] = []
        self._numbers = 0
        self._lives = dict.fromkeys(sorted(set(worker_of.values())), 0)
        self._turns: dict[int, int] = {}
        self._free_s = dict.fromkeys(self._lives, 0.0)  # when each worker ended a turn
        self._there_s: dict[int, float] = {}
        self._sent: dict[int, Message] = {}
        self._has_sent: set[int] = set()  # of the shards that are there
        for worker in self._lives:
            self._plan_loss(worker)
        self._exchange.begin()

    @property
    def ignored(self) -> int:
        """Return how many messages were too old."""
        return self._exchange.ignored

    def step(self) -> tuple[list[ArrivalStep], tuple[TraceEvent, ...]]:
        """Let time pass until a step is made; return the steps, and what chance decided.

        Raises:
            ClusterError: no step will ever be made, because all workers wait.
        """
        losses = self.losses
        while not self._exchange.has_steps:
            refuse_endless_losses(self._costs.config, self.losses - losses, len(self._lives))
            if not any(event.kind != "lost" for event in self._events):
                raise all_are_held(f"{self.now_s:g} virtual seconds")
            self._happens(heapq.heappop(self._events))
        return self._exchange.take_steps()

    def _happens(self, event: _Event) -> None:
        if event.life != self._lives[event.worker]:
            return
        self.now_s = event.time_s
        if event.kind == "computed":
            self._computed(event)
        elif event.kind == "arrived":
            self._exchange.pushed(event.shard, self._sent.pop(event.shard))
        elif event.kind == "lost":
            self._lose(event.worker)
        else:
            for shard in self._shards_of(event.worker):
                self._exchange.back(shard)
            self._plan_loss(event.worker)

    def _computed(self, event: _Event) -> None:
        """Let a turn be made, and send what the half sends."""
        self._free_s[event.worker] = self.now_s
        message = self._work.turn(event.shard, self._turns[event.shard])
        if message is None:
            self._exchange.turned(event.shard)
            return
        self._sent[event.shard] = message
        self._has_sent.add(event.shard)
        vectors, config = len(message.vectors), self._costs.config
        first_s, busy_s = self.now_s + config.latency_s, self._costs.at_server_s(vectors)
        received_s = max(self._up.carry(first_s, busy_s), first_s + self._costs.vectors_s(vectors))
        self.sent_bytes += vectors * self._costs.vector_bytes
        self._at(self._served.carry(received_s, config.server_s), "arrived", event.worker, event.shard)

    def take(self, shard: int, answer: Answer) -> None:
        """Give a shard the centre's answer, and note when it is there."""
        self._work.take(shard, answer)
        vectors = 1 + len(answer.vectors)
        sent_s = self._down.carry(self.now_s, self._costs.at_server_s(vectors))
        to_worker = self._to_worker[self._worker_of[shard]]
        received_s = max(sent_s, to_worker.carry(self.now_s, self._costs.vectors_s(vectors)))
        self._there_s[shard] = received_s + self._costs.config.latency_s
        self.sent_bytes += vectors * self._costs.vector_bytes

    def forget(self, shard: int) -> None:
        """Let a shard that is lost begin anew when it is back."""
        self._work.forget(shard)
        self._has_sent.discard(shard)

    def start(self, shard: int, turn: int) -> None:
        """Begin a turn, when the answer that it begins from is there.

        With a lag it has begun before, as soon as the worker was free; it ends when the answer is there.
        """
        worker, self._turns[shard] = self._worker_of[shard], turn
        takes_s = self._costs.turn_s(worker, shard, turn, self._rows_of(shard, turn))
        if shard in self._has_sent and self._work.may_compute_ahead(shard):
            ends_s = max(self._free_s[worker] + takes_s, self._there_s[shard], self.now_s)
        else:
            ends_s = max(self.now_s, self._there_s[shard]) + takes_s
        self._at(ends_s, "computed", worker, shard)

    def _plan_loss(self, worker: int) -> None:
        lives_s = self._costs.until_loss_s(worker, self._lives[worker])
        if lives_s < math.inf:
            self._at(self.now_s + lives_s, "lost", worker)

    def _lose(self, worker: int) -> None:
        """Lose a worker with all its shards; another one takes its place after a while."""
        self.losses += 1
        for shard in self._shards_of(worker):
            self._sent.pop(shard, None)
            self._exchange.lost(shard)
        self._lives[worker] += 1  # at last: a shard that begins between two of these losses is lost, too
        self._at(self.now_s + self._costs.config.worker_back_s, "back", worker)

    def _shards_of(self, worker: int) -> list[int]:
        return [shard for shard, of in self._worker_of.items() if of == worker]

    def _at(self, time_s: float, kind: str, worker: int, shard: int = -1) -> None:
        self._numbers += 1
        heapq.heappush(self._events, _Event(time_s, self._numbers, kind, worker, self._lives[worker], shard))
