"""Gathering of rounds: a step uses the first shards of a quorum that arrive.

A straggler keeps its slot until it is done.  It is not asked again before that, and its late reply, which its
request identifies, is dropped.  Up to b workers may be lost for good, where b is the number of shards that
the quorum does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from sparksgd.engines.trace import Trace
from sparksgd.errors import NotFinite, PeerLost, ShardMissing, SparkSGDError
from sparksgd.solvers.protocol import Quorum

__all__ = [
    "Arrived",
    "Ask",
    "Began",
    "Ended",
    "Fail",
    "Finish",
    "Note",
    "Placed",
    "RoundGathering",
    "Slots",
    "Take",
]


# Events


@dataclass(frozen=True, kw_only=True)
class Began:
    """A step begins."""

    version: int
    """The version of the weights that it is computed from."""

    turn: int
    """The first turn of its round."""

    quorum: Quorum
    """The shards whose messages it needs."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A worker's reply came."""

    request: int
    worker: int

    shards: tuple[int, ...]
    """Of whom it has messages."""

    rows: int
    failure: SparkSGDError | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The job of a request has ended; workers that have not replied never will."""

    request: int
    error: Exception | None = None

    is_final: bool = False
    """Whether the error ends the run, whichever step it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How many tasks can run at once, and on which executors."""

    count: int
    executors: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Which worker has which shards, and where; sent again after shards were rebuilt or dealt again."""

    owned: Mapping[int, tuple[int, ...]]
    place_of: Mapping[int, str | None]


RoundEvent = Began | Arrived | Ended | Slots | Placed


# Instructions


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask these workers for their messages of the step."""

    request: int
    workers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Take:
    """The reply of a worker that has just arrived is part of the step."""

    worker: int


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Enough messages have arrived: make the step."""

    late: tuple[int, ...]
    """Workers whose messages it does without: they were asked, are busy with an earlier step, or are lost."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Tell a person."""

    text: str
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The step cannot be made; replies to its requests are useless."""

    error: Exception


RoundInstruction = Ask | Take | Finish | Note | Fail


@dataclass(kw_only=True)
class _Request:
    version: int
    turn: int

    missing: set[int]
    """Workers that have not replied."""


@dataclass(kw_only=True)
class _Step:
    version: int
    turn: int
    quorum: Quorum

    pending: set[int] = field(default_factory=set)
    """Workers that were asked for it, and have not replied."""

    fresh: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The shards that it uses so far, by worker."""

    rows: int = 0

    @property
    def shards(self) -> int:
        return sum(map(len, self.fresh.values()))

    @property
    def is_complete(self) -> bool:
        """Return whether enough messages have arrived, and some of them have rows."""
        return self.shards >= self.quorum.enough and self.rows > 0


class RoundGathering:
    """Gathers the messages of one step after the other."""

    def __init__(self) -> None:
        self.trace = Trace()
        self._owned: Mapping[int, tuple[int, ...]] = {}
        self._place_of: Mapping[int, str | None] = {}
        self._requests: dict[int, _Request] = {}
        self._next_request = 1
        self._step: _Step | None = None
        self._backups = 0  # how many shards the newest step can do without
        self._lost: dict[int, ShardMissing] = {}
        self._stale: set[int] = set()  # requests made before shards were written again
        self._steps_of: dict[int, int] = {}
        self._slots = 1
        self._executors: frozenset[str] = frozenset()

    @property
    def running(self) -> dict[int, frozenset[int]]:
        """Return the workers that have not replied, by request."""
        return {number: frozenset(of.missing) for number, of in self._requests.items() if of.missing}

    @property
    def versions(self) -> set[int]:
        """Return the versions of weights that a worker computes from, or may be asked to."""
        current = set() if self._step is None else {self._step.version}
        return current | {of.version for of in self._requests.values() if of.missing}

    @property
    def lost(self) -> Mapping[int, ShardMissing]:
        """Return the workers whose shards are lost."""
        return self._lost

    def version_of(self, request: int) -> int | None:
        """Return the version that a request was for; None if the request is over."""
        found = self._requests.get(request)
        return None if found is None else found.version

    def forget(self) -> None:
        """Give up the step and all requests; later replies to them are ignored."""
        self._requests.clear()
        self._step = None

    def handle(self, event: RoundEvent) -> list[RoundInstruction]:
        """Take an event; return the instructions, in their order."""
        told: list[RoundInstruction] = []
        if isinstance(event, Began):
            for kind in ("start", "push"):  # of an attempt that was given up
                self.trace.withdraw(kind, event.version)
            self._step = _Step(version=event.version, turn=event.turn, quorum=event.quorum)
            self._backups = len(event.quorum.shards) - event.quorum.enough
        elif isinstance(event, Arrived):
            told += self._arrived(event)
        elif isinstance(event, Ended):
            told += self._ended(event)
        elif isinstance(event, Slots):
            self._slots, self._executors = event.count, event.executors
        else:
            self._owned, self._place_of = event.owned, event.place_of
            self._stale = set(self._requests)
            self._lost.clear()
        if not any(isinstance(one, Fail) for one in told):
            told += self._go_on()
        return told

    def _arrived(self, event: Arrived) -> list[RoundInstruction]:
        request = self._requests.get(event.request)
        if request is None or event.worker not in request.missing:
            return []  # of an attempt that was given up, or the same reply again
        request.missing.remove(event.worker)
        if not request.missing:
            del self._requests[event.request]
        step = self._step
        is_fresh = step is not None and request.version == step.version
        if is_fresh and step is not None:
            step.pending.discard(event.worker)
        failure = event.failure
        if isinstance(failure, ShardMissing):
            return [] if event.request in self._stale else self._lose(event.worker, failure, request)
        if failure is not None:
            return [Fail(error=failure)] if is_fresh or not isinstance(failure, NotFinite) else []
        if not is_fresh or step is None:
            return []
        step.fresh[event.worker] = event.shards
        step.rows += event.rows
        return [Take(worker=event.worker)]

    def _ended(self, event: Ended) -> list[RoundInstruction]:
        request = self._requests.pop(event.request, None)
        if request is None or not request.missing:
            return []
        is_fresh = self._step is not None and request.version == self._step.version
        if event.error is not None:
            if is_fresh or event.is_final:
                return [Fail(error=event.error)]
            return [Note(text=f"a late task of step {request.version + 1} failed", error=event.error)]
        if is_fresh:
            missing = sorted(request.missing)
            return [Fail(error=PeerLost(f"a job ended, but the answers of workers {missing} never came"))]
        return []

    def _lose(self, worker: int, failure: ShardMissing, request: _Request) -> list[RoundInstruction]:
        """Stop asking a worker whose shards are lost."""
        self._lost[worker] = failure
        for shard in self._owned.get(worker, ()):
            self.trace.note("lost", turn=request.turn, version=request.version, shard=shard, worker=worker)
        if len(self._lost) <= self._backups:
            return [Note(text=f"worker {worker} is lost, and training goes on without it: {failure}")]
        return []

    def _go_on(self) -> list[RoundInstruction]:
        """Decide what the step needs next."""
        step = self._step
        if step is None:
            return []
        wanted = {worker for worker, shards in self._owned.items() if step.quorum.shards.intersection(shards)}
        if step.is_complete:
            return [self._finish(step, wanted)]
        if len(self._lost) > self._backups:
            return [Fail(error=reduce(add, self._lost.values()))]
        coming = sum(len(step.quorum.shards.intersection(self._owned[worker])) for worker in step.pending)
        if step.pending and step.shards + coming >= step.quorum.enough:
            return []
        idle = self._idle(wanted - step.fresh.keys())
        if idle:
            return [self._ask(step, idle)]
        if self._lost and not self._requests:
            return [Fail(error=reduce(add, self._lost.values()))]  # only their shards have rows for the step
        return []

    def _ask(self, step: _Step, workers: set[int]) -> Ask:
        number = self._next_request
        self._next_request += 1
        self._requests[number] = _Request(version=step.version, turn=step.turn, missing=set(workers))
        step.pending |= workers
        for worker in sorted(workers):
            for shard in sorted(step.quorum.shards.intersection(self._owned[worker])):
                self.trace.note("start", turn=step.turn, version=step.version, shard=shard, worker=worker)
        return Ask(request=number, workers=tuple(sorted(workers)))

    def _finish(self, step: _Step, wanted: set[int]) -> Finish:
        for worker, shards in step.fresh.items():
            self._steps_of[worker] = self._steps_of.get(worker, 0) + 1
            for shard in shards:
                self.trace.note("push", turn=step.turn, version=step.version, shard=shard, worker=worker)
        self._step = None
        return Finish(late=tuple(sorted(wanted - step.fresh.keys())))

    def _idle(self, wanted: set[int]) -> set[int]:
        """Return which of some workers have a free slot where their shards are; rarely used ones first.

        If the place of a task has no free slot, Spark starts the task elsewhere, where its shards' files are
        missing.  If there is no free slot at all, the task would begin when its step is over.
        """
        busy = {worker for request in self._requests.values() for worker in request.missing}
        free = self._slots - len(busy)
        each = max(1, self._slots // max(1, len(self._executors)))
        free_at: dict[str | None, int] = dict.fromkeys(self._executors, each)
        for worker in busy:
            if self._place_of.get(worker) in free_at:
                free_at[self._place_of[worker]] -= 1
        chosen = set()
        for worker in sorted(
            wanted - busy - self._lost.keys(), key=lambda one: (self._steps_of.get(one, 0), one)
        ):
            place = self._place_of.get(worker)
            if free <= 0 or free_at.get(place, 1) <= 0:
                continue
            chosen.add(worker)
            free -= 1
            if place in free_at:
                free_at[place] -= 1
        return chosen
