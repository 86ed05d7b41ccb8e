"""The worker's end of the server engine: it makes the turns of its shards as the server tells it."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from sparksgd.arithmetic.flat import Weights
from sparksgd.arithmetic.reused import ReusedArrays
from sparksgd.data.shard import Descriptor
from sparksgd.engines.compute import Computer
from sparksgd.engines.replies import Evaluation, with_place
from sparksgd.engines.shard_work import ShardWork
from sparksgd.errors import PeerLost, ShardMissing, SparkSGDError
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.frames import Frame, FrameReader, FrameWriter
from sparksgd.peers.server_frames import (
    EVALUATE,
    LEAVE,
    TURN,
    Times,
    Vectors,
    answer_in,
    descriptor_in,
    evaluated_frame,
    failed_frame,
    field_of,
    here_frame,
    missing_frame,
    sent_frame,
    turned_frame,
    weights_in,
)
from sparksgd.peers.wire import Connection, connect
from sparksgd.solvers.arrival_centre import refuse_changes

__all__ = ["HELLO", "ServerAddress", "serve"]

HELLO = struct.Struct(">QI")
"""How a worker names itself: the number of the request that its task is of, and its own."""


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """What a worker must know to find the server."""

    run: bytes
    """Which run, 8 bytes."""

    address: tuple[str, int]
    credentials: Credentials
    timeout_s: float
    """How long to try to connect."""


def serve(
    computer: Computer,
    server: ServerAddress,
    request: int,
    worker: int,
    shards: Iterable[Descriptor],
) -> SparkSGDError | None:
    """Make turns until the server ends it, or the connection does.

    Args:
        computer: of the run.
        server: where it is.
        request: which of the server's requests this is.
        worker: this worker's number.
        shards: its shards.

    Returns:
        Why the worker ends: the server cannot be reached, or the file of a shard is gone or damaged; None:
        the server said so, or knows.
    """
    hello = HELLO.pack(request, worker)
    try:
        connection = connect(server.credentials, server.address, hello, "the driver", server.timeout_s)
    except PeerLost as error:
        return with_place(error, worker, "its start")
    try:
        with suppress(PeerLost), computer.many_rounds():  # the server sees that it is gone
            _Worker(computer, connection, server.run, worker, shards).run()
    except ShardMissing as missing:
        return missing
    finally:
        connection.close()
    return None


class _Worker:
    """One worker, as long as its connection lasts."""

    def __init__(
        self,
        computer: Computer,
        connection: Connection,
        run: bytes,
        worker: int,
        shards: Iterable[Descriptor],
    ) -> None:
        self._computer, self._connection, self._worker = computer, connection, worker
        self._vectors = Vectors.of(computer.flat.view(0), len(computer.flat.trainable))
        table: Mapping[int, Descriptor] = {shard.shard: shard for shard in shards}
        self._work = ShardWork(computer, table, partial(computer.turn, worker=worker))
        most = self._vectors.most_bytes(computer.plan.halves.vectors + 1)
        self._reader = FrameReader(connection, run, "the driver", most, ReusedArrays(self._vectors.shapes))
        self._writer = FrameWriter(connection, run)
        self._poll = select.poll()
        self._poll.register(connection.sock, select.POLLIN)
        self._ended_s: float | None = None  # the turn before; None: it did something else since
        self._ahead: deque[tuple[int, int]] = deque()  # turns that no order has come for yet
        self._ahead_s: dict[int, float] = {}  # how long those took that are computed
        self._evaluated: Weights | None = None

    def run(self) -> None:
        """Do what the server says, until it says that this ends, or something fails.

        Raises:
            PeerLost: the connection ended, or the server said what it never says.
            ShardMissing: the file of a shard is gone, or damaged.
        """
        try:
            self._obey()
        except (PeerLost, ShardMissing):
            raise
        except SparkSGDError as error:
            self._send(failed_frame(error))

    def _obey(self) -> None:
        self._send(here_frame(socket.gethostname(), self._computer.numerics))
        while (frame := self._next()).kind != LEAVE:
            if frame.kind == TURN:
                self._make_turn(frame)
            elif frame.kind == EVALUATE:
                self._evaluate(frame)
            else:
                raise PeerLost(f'the driver sent a frame of kind "{frame.kind}"')

    def _make_turn(self, frame: Frame) -> None:
        told_s, started_at_s = time.perf_counter(), time.time()
        shard, turn = field_of(frame, "shard", int), field_of(frame, "turn", int)
        if (shard, turn) in self._ahead:
            self._ahead.remove((shard, turn))  # the order came before there was time for it
        ahead_s = self._ahead_s.pop(shard, 0.0)
        answer = answer_in(frame, self._vectors)
        if answer is not None:
            self._work.take(shard, answer)
        if not ahead_s:
            self._before(turn)
        message = self._work.turn(shard, turn)
        if message is not None:
            refuse_changes(message.changes)
        ended_s = time.perf_counter()
        waited_s = 0.0 if self._ended_s is None else max(0.0, told_s - self._ended_s - ahead_s)
        times = Times(started_at_s=started_at_s, computed_s=ended_s - told_s + ahead_s, waited_s=waited_s)
        self._send(
            turned_frame(shard, turn, times) if message is None else sent_frame(shard, turn, message, times)
        )
        self._ended_s = time.perf_counter()
        if message is not None and self._work.may_compute_ahead(shard):
            self._ahead.append((shard, turn + 1))

    def _evaluate(self, frame: Frame) -> None:
        if frame.arrays:
            self._evaluated = weights_in(frame, self._vectors)
        shard, version = descriptor_in(frame), field_of(frame, "version", int)
        if self._evaluated is None or self._evaluated.version != version:
            raise PeerLost(f"there are no weights of version {version}")
        number = shard.shard
        reply = self._computer.evaluations(self._worker, [shard], self._evaluated)
        if isinstance(reply.failure, ShardMissing):
            self._send(missing_frame(number, version))
        elif reply.failure is not None:
            raise reply.failure
        else:
            (sums,) = reply.partials.values()
            assert sums is None or isinstance(sums, Evaluation)
            self._send(evaluated_frame(number, version, sums))
        self._ended_s = None

    def _next(self) -> Frame:
        """Return the next frame; compute turns ahead until it is there."""
        while self._ahead:
            with _broken_is_lost():
                frame = self._reader.read()
            if frame is not None:
                return frame
            shard, turn = self._ahead.popleft()
            began_s = time.perf_counter()
            self._before(turn)
            self._work.compute(shard, turn)
            self._ahead_s[shard] = time.perf_counter() - began_s
        return self._receive()

    def _before(self, turn: int) -> None:
        if self._computer.plan.before_gradients is not None:
            self._computer.plan.before_gradients(self._worker, turn)

    def _receive(self) -> Frame:
        with _broken_is_lost():
            while (frame := self._reader.read()) is None:
                self._poll.poll()
            return frame

    def _send(self, frame: Frame) -> None:
        with _broken_is_lost():
            self._writer.put(frame)
            self._writer.write()
            if self._writer.is_empty:
                return
            self._poll.modify(self._connection.sock, select.POLLOUT)
            while not self._writer.is_empty:
                self._poll.poll()
                self._writer.write()
            self._poll.modify(self._connection.sock, select.POLLIN)


@contextmanager
def _broken_is_lost() -> Iterator[None]:
    """In the block, let a connection that breaks be a server that is lost."""
    try:
        yield
    except OSError as error:
        raise PeerLost(f"the connection to the driver broke: {error}") from error
