"""The driver's end of the server engine: one loop that sends to and receives from all workers.

Only a worker that is expected is let in: its task's request is the last one that was made for it.  If another
task of the same request connects, because Spark runs it again, the newer one takes the place of the older.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from sparksgd.arithmetic.reused import ReusedArrays
from sparksgd.errors import PeerLost
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.frames import Frame, FrameReader, FrameWriter
from sparksgd.peers.server_worker import HELLO, ServerAddress
from sparksgd.peers.wire import Connection, Listener

__all__ = ["Came", "Joined", "Left", "ServerDesk"]

_MOST_FRAMES = 16
"""At once, of one worker: it answers orders, and says that it is here, or why it failed."""

log = logging.getLogger("sparksgd")


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A worker has connected."""

    worker: int
    seat: int
    """Which of all connections this is."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """The connection of a worker is gone."""

    worker: int
    seat: int
    request: int
    """Which of the requests for it its task was of."""

    why: str


@dataclass(frozen=True, kw_only=True)
class Came:
    """A frame of a worker came."""

    worker: int
    seat: int
    frame: Frame


class _Seat:
    """A connected worker."""

    def __init__(
        self,
        connection: Connection,
        run: bytes,
        worker: int,
        number: int,
        request: int,
        most_bytes: int,
        arrays: ReusedArrays,
    ) -> None:
        self.connection, self.worker, self.number, self.request = connection, worker, number, request
        self.reader = FrameReader(connection, run, f"worker {worker}", most_bytes, arrays)
        self.writer = FrameWriter(connection, run)
        self.waits_to_write = False


class ServerDesk:
    """Sends frames to workers, and receives theirs, in the order in which they are whole.

    Args:
        run: which run, 8 bytes.
        credentials: the run's.
        host: name or address by which workers reach the driver.
        listen_on: address to listen on.
        ports: ports to try; None: any.
        num_workers: how many workers there are.
        timeout_s: how long a worker tries to connect.
    """

    def __init__(
        self,
        *,
        run: bytes,
        credentials: Credentials,
        host: str,
        listen_on: str,
        ports: range | None,
        num_workers: int,
        timeout_s: float,
    ) -> None:
        self._run, self._credentials, self._host, self._timeout_s = run, credentials, host, timeout_s
        self._listener = Listener(credentials, listen_on, ports, num_workers, self._welcome)
        self._lock = threading.Lock()
        self._at_the_door: deque[Connection] = deque()
        self._is_closed = False
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self._most_bytes = 0
        self._arrays = ReusedArrays()
        self._expected: dict[int, int] = {}
        self._seats: dict[int, _Seat] = {}
        self._numbers = 0
        self._by_file: dict[int, _Seat] = {}
        self._events: deque[Joined | Left | Came] = deque()
        self.idle_s = 0.0
        """Seconds in which it waited for workers."""

    @property
    def seats(self) -> dict[int, int]:
        """Return the seats of the workers that are connected."""
        return {worker: seat.number for worker, seat in self._seats.items()}

    def start(self, most_bytes: int, shapes: Collection[tuple[int, ...]] | None = None) -> None:
        """Listen.

        Args:
            most_bytes: how many bytes the arrays of a worker's frame may have.
            shapes: of the arrays that come again and again, whose memory is used again; None: all.

        Raises:
            ClusterError: no port is free.
        """
        self._most_bytes, self._arrays = most_bytes, ReusedArrays(shapes)
        self._listener.start()

    @property
    def address(self) -> ServerAddress:
        """Return what workers must know."""
        return ServerAddress(
            run=self._run,
            address=(self._host, self._listener.address[1]),
            credentials=self._credentials,
            timeout_s=self._timeout_s,
        )

    def take_dropped(self) -> Counter[str]:
        """Return who was not let in since the last call, by the reason."""
        return self._listener.take_dropped()

    def expect(self, worker: int, request: int) -> None:
        """Let in the worker's task of this request, and of no other."""
        self._expected[worker] = request

    def send(self, worker: int, seat: int, frame: Frame) -> None:
        """Send a frame to a worker in a seat; nothing happens if it has left that, which `next` tells."""
        there = self._seats.get(worker)
        if there is not None and there.number == seat:
            there.writer.put(frame)
            self._write(there)

    def drop(self, worker: int, seat: int, why: str) -> None:
        """End the connection of a worker in a seat."""
        there = self._seats.get(worker)
        if there is not None and there.number == seat:
            self._end(there, why)

    def cut_off(self, worker: int, seat: int, why: object) -> None:
        """End the connection of a worker in a seat that does not do what it should; log why."""
        log.warning("worker %d is cut off: %s", worker, why)
        self.drop(worker, seat, str(why))

    def next(self, timeout_s: float) -> Joined | Left | Came | None:
        """Return what happened next; None if nothing does in time, though it is looked at least once."""
        deadline, is_over = time.monotonic() + timeout_s, False
        while not self._events:
            if is_over:
                return None
            left_s = max(0.0, deadline - time.monotonic())
            is_over = left_s == 0
            began_s = time.perf_counter()
            ready = self._poll.poll(left_s * 1000)
            self.idle_s += time.perf_counter() - began_s
            for number, _ in ready:
                if number == self._bell.fileno():
                    self._seat_newcomers()
                elif number in self._by_file:  # else it ended just before
                    self._serve(self._by_file[number])
        return self._events.popleft()

    def has_news(self, worker: int) -> bool:
        """Return whether something of a worker waits to be read."""
        if any(event.worker == worker for event in self._events):
            return True
        poll = select.poll()
        if worker in self._seats:
            poll.register(self._seats[worker].connection.sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Stop listening, and end all connections."""
        self._listener.close()
        with self._lock:  # who has just proved itself comes to a closed door
            waiting, self._at_the_door, self._is_closed = self._at_the_door, deque(), True
        for seat in list(self._seats.values()):
            self._end(seat, "the run ends")
        for connection in waiting:
            connection.close()
        self._bell.close()
        self._ringer.close()

    def _welcome(self, connection: Connection) -> None:
        with self._lock:
            if not self._is_closed:
                self._at_the_door.append(connection)
                with suppress(BlockingIOError):  # then it rings already
                    self._ringer.send(b"!")
                return
        connection.close()

    def _seat_newcomers(self) -> None:
        self._bell.recv(64)
        with self._lock:
            newcomers, self._at_the_door = self._at_the_door, deque()
        for connection in newcomers:
            request, worker = HELLO.unpack_from(connection.hello)
            if self._expected.get(worker) != request:
                log.debug("worker %d came for request %d, which is over", worker, request)
                connection.close()
                continue
            if worker in self._seats:
                self._end(self._seats[worker], "another task has taken its place")
            self._numbers += 1
            seat = _Seat(
                connection, self._run, worker, self._numbers, request, self._most_bytes, self._arrays
            )
            self._seats[worker] = self._by_file[connection.sock.fileno()] = seat
            self._poll.register(connection.sock, select.POLLIN)
            self._events.append(Joined(worker=worker, seat=seat.number))

    def _serve(self, seat: _Seat) -> None:
        """Receive all whole frames that are there, and send what waits."""
        try:
            for number in count(1):
                frame = seat.reader.read()
                if frame is None:
                    break
                if number > _MOST_FRAMES:
                    raise PeerLost(f"worker {seat.worker} sends without end")
                self._events.append(Came(worker=seat.worker, seat=seat.number, frame=frame))
        except (PeerLost, OSError) as error:
            self._end(seat, str(error))
            return
        if seat.waits_to_write:
            self._write(seat)

    def _write(self, seat: _Seat) -> None:
        try:
            seat.writer.write()
        except OSError as error:
            self._end(seat, str(error))
            return
        if seat.writer.is_empty == seat.waits_to_write:
            seat.waits_to_write = not seat.writer.is_empty
            events = select.POLLIN | (select.POLLOUT if seat.waits_to_write else 0)
            self._poll.modify(seat.connection.sock, events)

    def _end(self, seat: _Seat, why: str) -> None:
        file = seat.connection.sock.fileno()
        self._poll.unregister(seat.connection.sock)
        del self._by_file[file], self._seats[seat.worker]
        seat.connection.close()
        self._events.append(Left(worker=seat.worker, seat=seat.number, request=seat.request, why=why))
