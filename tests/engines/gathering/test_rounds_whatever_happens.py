"""Gathering of rounds in virtual time: whatever is late or lost, the steps are whole."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from round_events import failed, missing

from sparksgd.engines.gathering.rounds import (
    Arrived,
    Ask,
    Began,
    Ended,
    Fail,
    Finish,
    Placed,
    RoundEvent,
    RoundGathering,
    RoundInstruction,
    Slots,
    Take,
)
from sparksgd.engines.trace import TraceEvent, took_part_of
from sparksgd.errors import NotFinite, PeerLost, ShardMissing
from sparksgd.solvers.protocol import Quorum


@dataclass(kw_only=True)
class Cluster:
    """Workers in virtual time, and the engine that does what the machine says; it checks each instruction."""

    chance: random.Random
    shards_of: dict[int, tuple[int, ...]]
    rows_of: dict[int, int]
    executors: list[str]
    slots: int

    machine: RoundGathering = field(default_factory=RoundGathering)
    now: float = 0.0
    queue: list[tuple[float, int, Any]] = field(default_factory=list)
    events: int = 0
    place_of: dict[int, str] = field(default_factory=dict)
    asked: dict[int, tuple[int, set[int]]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    """Workers whose files are gone, as nobody knows yet."""

    asked_for: dict[int, tuple[int, int]] = field(default_factory=dict)
    """What each request was for: the version, and which attempt."""

    quorum: Quorum | None = None
    version: int = 0
    attempts: int = 0
    taken: dict[int, Arrived] = field(default_factory=dict)
    steps: list[frozenset[int]] = field(default_factory=list)
    trace: list[TraceEvent] = field(default_factory=list)

    def place(self) -> None:
        """Write lost shards again; they may lie elsewhere then."""
        self.gone.clear()
        for worker in self.shards_of:
            if self.place_of.get(worker) not in self.executors:
                self.place_of[worker] = self.chance.choice(self.executors)
        self.feed(Slots(count=self.slots, executors=frozenset(self.executors)))
        self.feed(Placed(owned=self.shards_of, place_of=dict(self.place_of)))

    def later(self, event: Any, at_most: float = 5.0) -> None:
        self.events += 1
        heappush(self.queue, (self.now + self.chance.uniform(0.1, at_most), self.events, event))

    @property
    def busy(self) -> set[int]:
        return {worker for _, workers in self.asked.values() for worker in workers}

    def step(self, quorum: Quorum) -> None:
        """Make a step, again where it failed."""
        self.quorum = quorum
        if self.machine.lost and self.chance.random() < 0.3:
            self.place()
        while True:
            self.taken, before = {}, len(self.steps)
            try:
                self.feed(Began(version=self.version, turn=self.version, quorum=quorum))
                while len(self.steps) == before:
                    assert self.queue, "nothing is on its way, and the step waits for ever"
                    self.now, _, event = heappop(self.queue)
                    self.happens(event)
                if self.chance.random() < 0.1:
                    raise PeerLost("what has nothing to do with the machine")
                break
            except (ShardMissing, PeerLost):
                del self.steps[before:]
                self.attempts += 1
                self.machine.forget()
                self.asked.clear()
                self.place()
        self.version += 1
        self.trace += self.machine.trace.take()

    def happens(self, event: Any) -> None:
        """Let a reply, the end of a job or a change of the cluster reach the machine."""
        if isinstance(event, Slots):
            self.slots = event.count
            self.executors = sorted(event.executors)
            self.feed(event)
            return
        version, workers = self.asked.get(event.request, (None, set()))
        if isinstance(event, Ended):
            self.asked.pop(event.request, None)
            self.feed(event)
            return
        if event.worker in self.gone:
            event = failed(event.request, event.worker, missing(event.worker))
        elif version not in (None, self.version) and self.chance.random() < 0.2:
            event = failed(event.request, event.worker, NotFinite("late, and NaN"))
        workers.discard(event.worker)
        if version is not None and not workers:
            del self.asked[event.request]
        self.feed(event)
        if self.chance.random() < 0.1:
            self.feed(event)  # the same reply again

    def feed(self, event: RoundEvent) -> None:
        for told in self.machine.handle(event):
            self.do(told, event)

    def do(self, told: RoundInstruction, event: RoundEvent) -> None:
        quorum = self.quorum
        if isinstance(told, Ask):
            assert quorum is not None
            self.check_asked(told)
            self.asked[told.request] = (self.version, set(told.workers))
            for worker in told.workers:
                shards = tuple(shard for shard in self.shards_of[worker] if shard in quorum.shards)
                rows = sum(self.rows_of[shard] for shard in shards)
                self.later(Arrived(request=told.request, worker=worker, shards=shards, rows=rows))
                if self.chance.random() < 0.05:
                    self.gone.add(self.chance.choice(list(self.shards_of)))
            if self.chance.random() < 0.1:
                self.later(Ended(request=told.request, error=self.chance.choice([None, PeerLost("killed")])))
            if self.chance.random() < 0.2:
                executors = self.chance.sample("abc", self.chance.randint(1, 3))
                slots = self.chance.randint(1, len(self.shards_of))
                self.later(Slots(count=slots, executors=frozenset(executors)))
        elif isinstance(told, Take):
            assert isinstance(event, Arrived)
            assert event.failure is None
            assert told.worker == event.worker
            assert told.worker not in self.taken, "a worker counts twice"
            assert self.asked_for[event.request] == (self.version, self.attempts), "asked for another version"
            self.taken[told.worker] = event
        elif isinstance(told, Finish):
            assert quorum is not None
            shards = [shard for reply in self.taken.values() for shard in reply.shards]
            assert len(shards) == len(set(shards)), "a shard counts twice"
            assert quorum.enough <= len(shards)
            assert quorum.shards.issuperset(shards)
            assert sum(reply.rows for reply in self.taken.values()) > 0
            wanted = {worker for worker, own in self.shards_of.items() if quorum.shards.intersection(own)}
            assert told.late == tuple(sorted(wanted - self.taken.keys()))
            self.steps.append(frozenset(shards))
        elif isinstance(told, Fail):
            raise told.error

    def check_asked(self, told: Ask) -> None:
        workers = set(told.workers)
        assert workers
        assert len(workers) == len(told.workers)
        assert not workers & self.busy, "a worker is asked that has not replied"
        assert not workers & self.taken.keys(), "a worker is asked that is in the step"
        assert not workers & self.machine.lost.keys(), "a worker is asked whose shards are gone"
        now_busy = self.busy | workers
        assert len(now_busy) <= self.slots, "more workers are busy than there are slots"
        for executor in self.executors:
            there = [worker for worker in now_busy if self.place_of[worker] == executor]
            if any(worker in workers for worker in there):
                assert len(there) <= max(1, self.slots // len(self.executors))
        self.asked_for[told.request] = (self.version, self.attempts)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    steps=st.integers(1, 12),
    one_each=st.booleans(),
)
def test_whatever_is_late_or_lost_the_steps_are_whole_and_the_trace_tells_them(
    seed: int, sizes: list[int], steps: int, one_each: bool
) -> None:
    chance = random.Random(seed)
    sizes = [1] * len(sizes) if one_each else sizes
    firsts = [sum(sizes[:worker]) for worker in range(len(sizes))]
    shards = range(sum(sizes))
    cluster = Cluster(
        chance=chance,
        shards_of={
            worker: tuple(range(first, first + size))
            for worker, (first, size) in enumerate(zip(firsts, sizes, strict=True))
        },
        rows_of={shard: chance.choice([0, 1, 4]) for shard in shards} | {chance.choice(shards): 3},
        executors=["a", "b"][: chance.randint(1, 2)],
        slots=chance.randint(1, len(sizes)),
    )
    cluster.place()
    with_rows = frozenset(shard for shard, rows in cluster.rows_of.items() if rows)
    backups = chance.randint(0, len(sizes) - 1) if one_each else 0
    first = Quorum(shards=frozenset(shards), enough=len(shards) - backups)
    for _ in range(steps):
        quorum = first
        if not backups and chance.random() < 0.5:  # as a replay asks
            some = frozenset(chance.sample(shards, chance.randint(1, len(shards)))) | {min(with_rows)}
            quorum = Quorum(shards=some, enough=len(some))
        cluster.step(quorum)
    took_part, deals = took_part_of(cluster.trace)
    assert took_part == cluster.steps
    assert deals == [0] * steps
    lost: set[int | None] = set()
    for event in cluster.trace:
        assert event.kind in ("start", "push", "lost")
        assert event.kind != "push" or event.shard not in lost, "a lost shard pushes before it starts again"
        if event.kind == "lost":
            lost.add(event.shard)
        elif event.kind == "start":
            lost.discard(event.shard)
