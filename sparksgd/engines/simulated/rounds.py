"""Rounds in virtual time: of all shards, or of the first ones that arrive.

tree         a Spark job for each step: its cost, the weights down, computing, sums up to the driver
allreduce    computing, then a sum between the workers
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from sparksgd.data.sampling import Sampling
from sparksgd.engines.gathering.rounds import (
    Arrived,
    Ask,
    Began,
    Fail,
    Finish,
    Placed,
    RoundGathering,
    Slots,
    Take,
)
from sparksgd.engines.protocol import Arrival, StepTiming
from sparksgd.engines.simulated.costs import Costs, Link, refuse_endless_losses, sums_at_driver
from sparksgd.engines.trace import TraceEvent
from sparksgd.solvers.protocol import Quorum, RoundSolver

__all__ = ["VirtualRound", "VirtualRounds"]


@dataclass(frozen=True, kw_only=True)
class VirtualRound:
    """A round that is over in virtual time; nothing of it was computed yet."""

    workers: tuple[int, ...]
    """Whose messages it uses, in the order of arrival."""

    late: tuple[int, ...]
    arrivals: tuple[Arrival, ...]
    trace: tuple[TraceEvent, ...]
    timing: StepTiming


class VirtualRounds:
    """Runs rounds in virtual time.

    Args:
        costs: of the cluster.
        owned: the shards of each worker.
        sampling: which rows take part in which turn.
    """

    def __init__(self, costs: Costs, owned: Mapping[int, tuple[int, ...]], sampling: Sampling) -> None:
        self._costs, self._owned, self.sampling = costs, owned, sampling
        self._sums_at_driver = costs.config.rounds == "tree"
        self._gathering = RoundGathering()
        self.now_s = 0.0
        self.losses = 0
        """How many workers were lost."""

        self.sent_bytes = 0
        """Bytes of vectors, up and down, or between the workers."""

        self._up = Link()
        self._lives = dict.fromkeys(owned, 0)
        self._lost_at_s = {worker: costs.until_loss_s(worker, 0) for worker in owned}
        self._asked_at_s: dict[int, float] = {}
        self._replies: list[tuple[float, bool, int, int]] = []
        """When; whether it is at the driver, or only computed; of which request, of which worker."""

        places = {worker: str(worker) for worker in owned}
        self._gathering.handle(Slots(count=len(owned), executors=frozenset(places.values())))
        self._gathering.handle(Placed(owned=owned, place_of=places))

    def next(self, solver: RoundSolver) -> VirtualRound:
        """Let time pass until enough messages of the next round have arrived."""
        began_s, quorum = self.now_s, solver.quorum()
        turns = range(solver.turns, solver.turns + solver.turns_at(solver.turns))
        self._asked_at_s[solver.version] = began_s
        waits_for_all, workers = quorum.enough == len(quorum.shards), len(self._owned)
        share = sums_at_driver(workers) / workers if waits_for_all else 1.0
        arrivals: list[Arrival] = []
        taken: list[int] = []
        told = self._gathering.handle(Began(version=solver.version, turn=turns.start, quorum=quorum))
        while True:
            for one in told:
                if isinstance(one, Ask):
                    self._ask(one, quorum, turns, 1 + len(solver.answer().vectors))
                elif isinstance(one, Take):
                    taken.append(one.worker)
                elif isinstance(one, Fail):
                    raise one.error
                elif isinstance(one, Finish):
                    return self._over(solver.halves.vectors, began_s, taken, one.late, arrivals)
            time_s, request, worker = self._next_reply(solver.halves.vectors, share)
            self.now_s = max(self.now_s, time_s)
            version = self._gathering.version_of(request)
            assert version is not None  # requests are never given up here
            since_s = time_s - self._asked_at_s[version]
            arrivals.append(Arrival(worker=worker, host="simulated", version=version, arrived_s=since_s))
            shards = self._asked_of(worker, quorum)
            rows = self.sampling.rows_of_round(turns, shards)
            told = self._gathering.handle(Arrived(request=request, worker=worker, shards=shards, rows=rows))

    def _asked_of(self, worker: int, quorum: Quorum) -> tuple[int, ...]:
        return tuple(shard for shard in self._owned[worker] if shard in quorum.shards)

    def _next_reply(self, vectors: int, share: float) -> tuple[float, int, int]:
        """Return when the next reply is there, of which request, and of which worker.

        Args:
            vectors: in each.
            share: what part of it reaches the driver, on average.
        """
        while True:
            time_s, is_there, request, worker = heapq.heappop(self._replies)
            if is_there:
                return time_s, request, worker
            if self._sums_at_driver:
                first_s = time_s + self._costs.config.latency_s
                through_s = self._up.carry(first_s, share * self._costs.at_server_s(vectors))
                time_s = max(through_s, first_s + self._costs.vectors_s(vectors))
                self.sent_bytes += vectors * self._costs.vector_bytes
            heapq.heappush(self._replies, (time_s, True, request, worker))

    def _ask(self, ask: Ask, quorum: Quorum, turns: range, vectors: int) -> None:
        """Plan the replies of some workers."""
        begins_s, costs = self.now_s, self._costs
        if self._sums_at_driver:
            begins_s += costs.config.job_s + costs.config.latency_s + costs.vectors_s(vectors)
            self.sent_bytes += len(ask.workers) * vectors * costs.vector_bytes
        for worker in ask.workers:
            computed_s = self.computed_s(worker, begins_s, quorum, turns)
            heapq.heappush(self._replies, (computed_s, False, ask.request, worker))

    def computed_s(self, worker: int, begins_s: float, quorum: Quorum, turns: range) -> float:
        """Return when a worker has made its turns; if it is lost meanwhile, another one makes them again."""
        shards, config = self._asked_of(worker, quorum), self._costs.config
        takes_s = sum(
            self._costs.turn_s(worker, shard, turn, self.sampling.piece_rows(shard, turn))
            for shard in shards
            for turn in turns
        )
        losses = self.losses
        while self._lost_at_s[worker] < begins_s + takes_s:
            refuse_endless_losses(config, self.losses - losses, 1)
            begins_s = max(begins_s, self._lost_at_s[worker] + config.worker_back_s)
            self.losses += 1
            self._lives[worker] += 1
            self._lost_at_s[worker] = (
                self._lost_at_s[worker]
                + config.worker_back_s
                + self._costs.until_loss_s(worker, self._lives[worker])
            )
        return begins_s + takes_s

    def _over(
        self, vectors: int, began_s: float, taken: list[int], late: tuple[int, ...], arrivals: list[Arrival]
    ) -> VirtualRound:
        computed_s = self.now_s
        if not self._sums_at_driver:
            workers = len(self._owned)
            self.now_s += self._costs.all_reduce_s(vectors, workers)
            self.sent_bytes += 2 * (workers - 1) * vectors * self._costs.vector_bytes
        self._forget_versions()
        timing = StepTiming(
            total=self.now_s - began_s, compute=computed_s - began_s, aggregate=self.now_s - computed_s
        )
        return VirtualRound(
            workers=tuple(taken),
            late=late,
            arrivals=tuple(arrivals),
            trace=self._gathering.trace.take(),
            timing=timing,
        )

    def _forget_versions(self) -> None:
        """Forget when versions were asked for that nobody computes any more."""
        awaited = self._gathering.versions
        self._asked_at_s = {v: at_s for v, at_s in self._asked_at_s.items() if v in awaited}
