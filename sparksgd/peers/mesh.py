"""A full mesh of a run's processes, which find each other through the driver.

    process ──── hello: meeting, worker, its address, the mesh that it has ───> rendezvous
    process <─── all workers and addresses by rank, and whether that mesh is kept ── rendezvous
    rank i ── connects to each rank j < i; each rank j > i connects to it

A meeting is one attempt at a segment.  If every process still has the connections of the last meeting, they
are kept; else all are made anew.  A process keeps its rank as long as the mesh is kept.  But it may be
another worker in every meeting, because Spark gives a task to any process.  The connection to the driver is a
process's lifeline.  When it ends, because the run or the driver has ended, the mesh closes.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sparksgd.errors import PeerLost, PeerSilent
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.wire import Connection, Header, Listener, Transfer, address_towards, connect, exchange

__all__ = ["Meeting", "Mesh", "Rendezvous"]

log = logging.getLogger("sparksgd")

_HELLO = struct.Struct(">QIQI16sH")
_ENTRY = struct.Struct(">I16sH")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What a worker must know to find the others."""

    run: bytes
    """Which run, 8 bytes."""

    number: int
    """Which meeting of the run, from 1."""

    num_workers: int
    """W, how many meet."""

    address: tuple[str, int]
    """The rendezvous's."""

    credentials: Credentials
    """The run's."""

    ports: range | None
    """Ports that a worker may listen on; None: any."""

    timeout_s: float
    """How long a process waits for another one."""


@dataclass(frozen=True, kw_only=True)
class _Hello:
    """How a process names itself, to the driver or to another process of the mesh."""

    meeting: int
    worker: int
    mesh: int = 0
    rank: int = 0
    host: str = "::"
    port: int = 0

    def pack(self) -> bytes:
        return _HELLO.pack(
            self.meeting, self.worker, self.mesh, self.rank, _packed_host(self.host), self.port
        )

    @classmethod
    def unpack(cls, hello: bytes) -> _Hello:
        meeting, worker, mesh, rank, host, port = _HELLO.unpack_from(hello)
        return cls(
            meeting=meeting,
            worker=worker,
            mesh=mesh,
            rank=rank,
            host=_unpacked_host(host),
            port=port,
        )


class Rendezvous:
    """The driver's end: tells the workers of a meeting where the others are.

    Args:
        run: which run, 8 bytes.
        num_workers: how many workers meet.
        credentials: the run's.
        host: name or address by which workers reach the driver.
        listen_on: address to listen on.
        ports: ports to try; None: any.
        timeout_s: how long a process waits for another one.
    """

    def __init__(
        self,
        *,
        run: bytes,
        num_workers: int,
        credentials: Credentials,
        host: str,
        listen_on: str,
        ports: range | None,
        timeout_s: float,
    ) -> None:
        self._host = host
        self._run = run
        self._num_workers = num_workers
        self._credentials = credentials
        self._ports = ports
        self._timeout_s = timeout_s
        self._listener = Listener(credentials, listen_on, ports, num_workers, self._welcome)
        self._lock = threading.Lock()
        self._number = 0
        self._arrived: dict[int, tuple[_Hello, Connection]] = {}
        self._last: list[tuple[_Hello, Connection]] = []

    def take_dropped(self) -> Counter[str]:
        """Return who was not let in since the last call, by the reason."""
        return self._listener.take_dropped()

    def start(self) -> None:
        """Listen."""
        self._listener.start()

    def call(self) -> Meeting:
        """Begin the next meeting; a worker that comes late to an earlier one is turned away."""
        with self._lock:
            self._number += 1
            before_last, self._last, self._arrived = self._last, list(self._arrived.values()), {}
        for _, lifeline in before_last:  # the workers of the last meeting have a new one now
            lifeline.close()
        return Meeting(
            run=self._run,
            number=self._number,
            num_workers=self._num_workers,
            address=(self._host, self._listener.address[1]),
            credentials=self._credentials,
            ports=self._ports,
            timeout_s=self._timeout_s,
        )

    def close(self) -> None:
        """End the run's lifelines."""
        self._listener.close()
        with self._lock:
            self._number += 1
            lifelines = [*self._last, *self._arrived.values()]
        for _, lifeline in lifelines:
            lifeline.close()

    def _welcome(self, connection: Connection) -> None:
        hello = _Hello.unpack(connection.hello)
        with self._lock:
            if hello.meeting != self._number or hello.worker in self._arrived:
                log.debug("worker %d came to meeting %d, which is over", hello.worker, hello.meeting)
                connection.close()
                return
            self._arrived[hello.worker] = hello, connection
            arrived = dict(self._arrived) if len(self._arrived) == self._num_workers else None
        if arrived is not None:
            self._tell(arrived)

    def _tell(self, arrived: Mapping[int, tuple[_Hello, Connection]]) -> None:
        hellos = [hello for _, (hello, _) in sorted(arrived.items())]
        stands = hellos[0].mesh != 0 and len({hello.mesh for hello in hellos}) == 1
        if stands:
            hellos.sort(key=lambda hello: hello.rank)
        table = b"".join(_ENTRY.pack(hello.worker, _packed_host(hello.host), hello.port) for hello in hellos)
        message = memoryview(bytes([stands]) + table)
        transfers = [
            Transfer(connection=connection, name=f"worker {worker}", sends=[message])
            for worker, (_, connection) in arrived.items()
        ]
        try:
            exchange(_meeting_header(self._run, hellos[0].meeting), transfers, self._timeout_s)
        except PeerLost as error:
            log.debug("a worker left before the meeting: %s", error)  # its task reports why


class Mesh:
    """The end of one process: a connection to every other one, for as long as the process keeps it."""

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        self._changed = threading.Condition()
        self._listener: Listener | None = None
        self._lifeline: Connection | None = None
        self._accepted: dict[tuple[int, int], Connection] = {}
        self._peers: dict[int, Connection] = {}
        self._formed = 0
        self._meeting: Meeting | None = None
        self.rank = 0
        self.workers: list[int] = []
        self.sent_bytes = 0
        self._dropped: Counter[str] = Counter()

    @property
    def number(self) -> int:
        """Return which meeting its connections are of; 0 if there are none."""
        return self._formed

    def take_dropped(self) -> Counter[str]:
        """Return who was not let in since the last call, by the reason."""
        with self._changed:
            dropped, self._dropped = self._dropped, Counter()
            if self._listener is not None:
                dropped += self._listener.take_dropped()
        return dropped

    def meet(self, meeting: Meeting, worker: int) -> bool:
        """Find the others of a meeting, and connect to all of them; sets `rank` and `workers`.

        Returns:
            Whether every worker still has the connections of the last meeting.

        Raises:
            PeerLost: a worker did not come in time, or cannot be reached.
        """
        with self._using():
            stands, addresses = self._ask(meeting, worker)
            self.rank = self.workers.index(worker)
            if not stands:
                self._connect(meeting, addresses, time.monotonic() + meeting.timeout_s)
            self._meeting, self._formed = meeting, meeting.number
            return stands

    def exchange(
        self,
        meeting: int,
        step: int,
        phase: int,
        sends: Mapping[int, Sequence[memoryview]],
        receives: Mapping[int, Sequence[memoryview]],
    ) -> None:
        """Send to and receive from every other process at once.

        Args:
            meeting: the meeting that the exchange belongs to; it fails if a later one has begun.
            step: which step, from 0.
            phase: which exchange of the step.
            sends: what goes to each rank.
            receives: where to put what comes from each rank.

        Raises:
            PeerLost: a process has ended, or the driver has; call `leave` then.
            PeerSilent: a process was silent for too long.
        """
        with self._in_use:
            if not self._formed or self._formed != meeting:
                raise PeerLost("the driver has ended, or is out of reach, and the mesh closed with it")
            assert self._meeting is not None
            header = Header(run=self._meeting.run, meeting=meeting, step=step, phase=phase)
            transfers = [
                Transfer(
                    connection=connection,
                    name=f"worker {self.workers[peer]}",
                    sends=sends[peer],
                    receives=receives[peer],
                )
                for peer, connection in self._peers.items()
            ]
            exchange(header, transfers, self._meeting.timeout_s)
            self.sent_bytes += sum(view.nbytes for peer in self._peers for view in sends[peer])

    def leave(self) -> list[int]:
        """Close all connections when every other process has noticed; return the workers that did not."""
        deadline = time.monotonic() + (self._meeting.timeout_s if self._meeting else 0)
        self._end_exchange(socket.SHUT_WR)
        with self._in_use:
            silent = [
                self.workers[peer]
                for peer, connection in self._peers.items()
                if not connection.ends(max(0.0, deadline - time.monotonic()))
            ]
            self._close()
            return silent

    def close(self) -> None:
        """Close all connections; the peers notice at once."""
        self._end_exchange()
        with self._in_use:
            self._close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Let no other thread close the sockets during the block; close all of them if it fails."""
        with self._in_use:
            try:
                yield
            except BaseException:
                self._close()
                raise

    def _close(self) -> None:
        with self._changed:
            connections = [*self._peers.values(), *self._accepted.values()]
            listener, self._listener = self._listener, None
            self._peers, self._accepted = {}, {}
            self._formed = 0
            self._let_go()
        for connection in connections:
            connection.close()
        if listener is not None:
            listener.close()
            with self._changed:
                self._dropped += listener.take_dropped()

    def _ask(self, meeting: Meeting, worker: int) -> tuple[bool, list[tuple[str, int]]]:
        """Say hello at the rendezvous; return whether the old mesh is kept, and all addresses by rank."""
        with self._changed:
            self._let_go()
        if self._listener is None:
            host = address_towards(*meeting.address)
            listener = Listener(meeting.credentials, host, meeting.ports, meeting.num_workers, self._welcome)
            listener.start()
            self._listener = listener
        host, port = self._listener.address
        hello = _Hello(
            meeting=meeting.number,
            worker=worker,
            mesh=self._formed,
            rank=self.rank,
            host=host,
            port=port,
        )
        lifeline = connect(
            meeting.credentials, meeting.address, hello.pack(), "the driver", meeting.timeout_s
        )
        table = bytearray(1 + meeting.num_workers * _ENTRY.size)
        try:
            exchange(
                _meeting_header(meeting.run, meeting.number),
                [Transfer(connection=lifeline, name="the driver", receives=[memoryview(table)])],
                meeting.timeout_s,
            )
        except PeerSilent as error:
            lifeline.close()
            raise PeerSilent(
                f"not all {meeting.num_workers} workers came within {meeting.timeout_s:g} s "
                f"(engine.peer_timeout_s)"
            ) from error
        except BaseException:
            lifeline.close()
            raise
        with self._changed:
            self._lifeline = lifeline
        threading.Thread(target=self._hold, args=(lifeline,), name="sparksgd-lifeline", daemon=True).start()
        entries = list(_ENTRY.iter_unpack(bytes(table[1:])))
        self.workers = [worker for worker, _, _ in entries]
        return bool(table[0]), [(_unpacked_host(host), port) for _, host, port in entries]

    def _end_exchange(self, how: int = socket.SHUT_RDWR) -> None:
        """End an exchange that is under way, in whatever thread."""
        with self._changed:
            for connection in self._peers.values():
                connection.shut_down(how)

    def _let_go(self) -> None:
        """End the lifeline.

        Its own thread closes the socket.  If it were closed here, another file could get its number before
        that thread wakes, and the thread would wait for that file for ever.
        """
        if self._lifeline is not None:
            self._lifeline.shut_down()
            self._lifeline = None

    def _hold(self, lifeline: Connection) -> None:
        """Wait for the end of a lifeline, and close the mesh if it still has this lifeline."""
        lifeline.ends()
        lifeline.close()
        with self._changed:
            if self._lifeline is not lifeline:
                return
            self._end_exchange()
        with self._in_use:
            if self._lifeline is lifeline:
                self._close()

    def _connect(self, meeting: Meeting, addresses: list[tuple[str, int]], deadline: float) -> None:
        """Make all connections anew."""
        with self._changed:
            old, self._peers = self._peers, {}
            stale = [key for key in self._accepted if key[0] != meeting.number]
            for connection in [*old.values(), *(self._accepted.pop(key) for key in stale)]:
                connection.close()
        hello = _Hello(meeting=meeting.number, worker=self.workers[self.rank], rank=self.rank).pack()
        for peer in range(self.rank):
            name, left_s = f"worker {self.workers[peer]}", deadline - time.monotonic()
            connection = connect(meeting.credentials, addresses[peer], hello, name, left_s)
            with self._changed:
                self._peers[peer] = connection
        for peer in range(self.rank + 1, meeting.num_workers):
            with self._changed:
                key = (meeting.number, peer)
                while key not in self._accepted:
                    if not self._changed.wait(deadline - time.monotonic()):
                        raise PeerSilent(
                            f"worker {self.workers[peer]} did not connect within {meeting.timeout_s:g} s"
                        )
                self._peers[peer] = self._accepted.pop(key)

    def _welcome(self, connection: Connection) -> None:
        hello = _Hello.unpack(connection.hello)
        with self._changed:
            superseded = self._accepted.pop((hello.meeting, hello.rank), None)
            if self._listener is None:
                superseded = connection  # the mesh closed meanwhile
            else:
                self._accepted[hello.meeting, hello.rank] = connection
                self._changed.notify_all()
        if superseded is not None:
            superseded.close()


def _meeting_header(run: bytes, number: int) -> Header:
    return Header(run=run, meeting=number, step=0, phase=0)


def _packed_host(host: str) -> bytes:
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        address = ipaddress.IPv6Address(f"::ffff:{address}")
    return address.packed


def _unpacked_host(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
