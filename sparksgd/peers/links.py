"""How fast the connections of a mesh are: round trips and bytes per second, one pair at a time, both ways.

Every pair is measured once.  In each round a process has at most one partner, as players of a tournament do:
so no process measures two connections at the same moment, and n processes need n rounds at most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median

from sparksgd.peers.mesh import Meeting, Mesh

__all__ = ["Link", "measured_links", "partner"]

_TRIPS = 17  # the first one is not counted
_FEW = 1 << 18
_MANY = 1 << 23
_SLOW_S = 0.05  # for the few bytes; then they are enough to know


@dataclass(frozen=True, kw_only=True)
class Link:
    """One way of a connection."""

    sender: int
    """Number of the worker that sends."""

    receiver: int
    """Number of the worker that receives."""

    round_trip_s: float
    """Median time until a byte has come back."""

    bytes_per_s: float
    """Speed of a large message, until it is confirmed."""


def partner(rank: int, number: int, players: int) -> int | None:
    """Return whom a process meets in a round; None: nobody.

    Args:
        rank: the process's, from 0.
        number: the round's, from 0; as many as players, or one less if these are even.
        players: how many there are.

    >>> [partner(0, number, 4) for number in range(3)]
    [3, 1, 2]
    """
    seats = players + players % 2  # who meets the last seat of an odd number rests
    last = seats - 1
    if rank == last:
        other = number * seats // 2 % last
    else:
        other = (number - rank) % last
        other = last if other == rank else other
    return other if other < players else None


def measured_links(meeting: Meeting, worker: int) -> list[Link]:
    """Meet the others, and measure the connections to them in the direction away from this process.

    Args:
        meeting: of all that are measured; they call this at the same time.
        worker: this process's number among them.

    Raises:
        ClusterError: the others did not come, cannot be reached, or were silent.
    """
    mesh = Mesh()
    try:
        mesh.meet(meeting, worker)
        players = meeting.num_workers
        met = [partner(mesh.rank, number, players) for number in range(players)]
        return [_Pair(mesh, peer).measured() for peer in dict.fromkeys(met) if peer is not None]
    finally:
        mesh.close()


class _Pair:
    """Two processes of a mesh that take turns in sending; both of them go through the same exchanges.

    Args:
        mesh: of this process.
        peer: rank of the other one.
    """

    def __init__(self, mesh: Mesh, peer: int) -> None:
        self._mesh, self._peer = mesh, peer
        self._is_first = mesh.rank < peer
        self._phases = count()
        self._byte = memoryview(bytearray(1))

    def measured(self) -> Link:
        """Measure both directions; return this process's own."""
        trips_s = [self._trip_s() for _ in range(_TRIPS)][1:]
        speeds = [self._speed(sends) for sends in (self._is_first, not self._is_first)]
        own = next(speed for speed in speeds if speed is not None)
        workers = self._mesh.workers
        return Link(
            sender=workers[self._mesh.rank],
            receiver=workers[self._peer],
            round_trip_s=median(trips_s),
            bytes_per_s=own,
        )

    def _trip_s(self) -> float:
        """Send a byte there and back; the time is the first one's, or of the other's wait."""
        return self._message(self._byte, sends=self._is_first)

    def _speed(self, sends: bool) -> float | None:
        """Let one of the two send few bytes, then many; return its speed, None for the other."""
        few, many = memoryview(bytearray(_FEW)), memoryview(bytearray(_MANY))
        took_s, size = self._message(few, sends=sends), _FEW
        is_slow = memoryview(bytearray([took_s > _SLOW_S]))
        self._one_way(is_slow, sends=sends)  # the sender decides
        if not is_slow[0]:
            took_s, size = self._message(many, sends=sends), _MANY
        return size / took_s if sends else None

    def _message(self, message: memoryview, *, sends: bool) -> float:
        """Send or receive a message, then its confirmation; return how long both took."""
        started = time.perf_counter()
        self._one_way(message, sends=sends)
        self._one_way(self._byte, sends=not sends)
        return time.perf_counter() - started

    def _one_way(self, message: memoryview, *, sends: bool) -> None:
        nothing: dict[int, Sequence[memoryview]] = {
            rank: [] for rank in range(len(self._mesh.workers)) if rank != self._mesh.rank
        }
        moved = {**nothing, self._peer: [message]}
        out, into = (moved, nothing) if sends else (nothing, moved)
        self._mesh.exchange(self._mesh.number, 0, next(self._phases), out, into)
