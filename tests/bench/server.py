"""How many exchanges a second the server makes, against a bare loop that adds and sends back.

The peers compute nothing: they answer at once, each in a process of its own.  Both arms move the same bytes:
a vector of gradients up, a vector of weights down.  The bare loop receives into buffers that it has made
before, adds in place, and sends.

    python tests/bench/server.py [--parameters 431080] [--seconds 4]
"""

from __future__ import annotations

import argparse
import select
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.reused import ReusedArrays
from sparksgd.config import Config
from sparksgd.engines.arrival_exchange import ArrivalExchange
from sparksgd.engines.freed_memory import freed_memory_kept_in_block
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.frames import FrameReader, FrameWriter
from sparksgd.peers.server_desk import Came, Joined, ServerDesk
from sparksgd.peers.server_frames import (
    TURN,
    Times,
    Vectors,
    answer_in,
    field_of,
    message_in,
    sent_frame,
    turn_frame,
)
from sparksgd.peers.server_worker import HELLO
from sparksgd.peers.wire import connect
from sparksgd.solvers.protocol import Answer, Message
from sparksgd.solvers.rules import Experiment, completed, make_solver

_ROUNDS = 5
_FORK = get_context("fork")


def _module(parameters: int) -> nn.Module:
    return nn.Linear(parameters, 1, bias=False)


class _Served:
    """The server's own loop, without Spark."""

    def __init__(self, parameters: int, workers: int) -> None:
        config = completed(
            Config.from_dict(
                {
                    "solver": {"name": "async_sgd"},
                    "optimizer": {"name": "SGD", "lr": 1e-6},
                    "train": {"num_shards": workers},
                }
            )
        )
        experiment = Experiment(
            optimizer=config.optimizer, schedule=config.schedule, num_shards=workers,
            turns_per_epoch=1000, total_turns=10**9, rows=1000 * workers,
        )  # fmt: skip
        self._solver: Any = make_solver(config, FlatModule(_module(parameters)), experiment)
        self._vectors = Vectors.of(self._solver.readout(), 1)
        self._desk = ServerDesk(
            run=b"benchrun", credentials=Credentials.new(encrypt=False), host="127.0.0.1",
            listen_on="127.0.0.1", ports=None, num_workers=workers, timeout_s=30,
        )  # fmt: skip
        self._desk.start(self._vectors.most_bytes(1))
        self._exchange = ArrivalExchange(self._solver, {n: n for n in range(workers)}, self)
        self._answers: dict[int, Answer] = {}
        for worker in range(workers):
            self._desk.expect(worker, 1)
        address = self._desk.address
        self._peers = [_FORK.Process(target=_peer, args=(address, n, self._vectors)) for n in range(workers)]
        for peer in self._peers:
            peer.start()
        here = 0
        while here < workers:
            here += isinstance(self._desk.next(5), Joined)
        self._seats = self._desk.seats
        self._exchange.begin()

    def take(self, shard: int, answer: Answer) -> None:
        self._answers[shard] = answer

    def start(self, shard: int, turn: int) -> None:
        self._desk.send(shard, self._seats[shard], turn_frame(shard, turn, self._answers.pop(shard, None)))

    def forget(self, shard: int) -> None:
        raise AssertionError(f"shard {shard} is lost")

    def exchange(self) -> None:
        """Take a message, step, and answer."""
        event = self._desk.next(5)
        assert isinstance(event, Came), event
        self._exchange.pushed(field_of(event.frame, "shard", int), message_in(event.frame, self._vectors))
        self._exchange.take_steps()

    def close(self) -> None:
        self._desk.close()
        for peer in self._peers:
            peer.join()


def _peer(about: Any, number: int, vectors: Vectors) -> None:
    torch.set_num_threads(1)
    connection = connect(about.credentials, about.address, HELLO.pack(1, number), "the desk", 30)
    reader = FrameReader(connection, about.run, "the desk", vectors.most_bytes(2), ReusedArrays())
    writer = FrameWriter(connection, about.run)
    message = Message(
        vectors={"gradient": np.full(vectors.parameters, 1e-3, np.float32)},
        statistics=np.zeros(0, vectors.statistics_type), counters=np.zeros(0, np.int64), loss=1.0, rows=1,
    )  # fmt: skip
    try:
        while True:
            while (frame := reader.read()) is None:
                select.select([connection.sock], [], [])
            assert frame.kind == TURN
            answer_in(frame, vectors)
            turn = field_of(frame, "turn", int)
            writer.put(
                sent_frame(number, turn, message, Times(started_at_s=0.0, computed_s=0.0, waited_s=0.0))
            )
            while not writer.is_empty:
                writer.write()
    except Exception:
        connection.close()


class _Bare:
    """The least that can be done: receive, add in place, send."""

    def __init__(self, parameters: int, workers: int) -> None:
        self._weights = np.zeros(parameters, np.float32)
        self._gradients = [np.empty_like(self._weights) for _ in range(workers)]
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = listening.getsockname()
            self._peers = [_FORK.Process(target=_echo, args=(address, parameters)) for _ in range(workers)]
            for peer in self._peers:
                peer.start()
            self._socks = [listening.accept()[0] for _ in range(workers)]
        self._poll = select.poll()
        self._of: dict[int, int] = {}
        for number, sock in enumerate(self._socks):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._poll.register(sock, select.POLLIN)
            self._of[sock.fileno()] = number
            sock.sendall(self._weights.data)
        self._ready: list[int] = []

    def exchange(self) -> None:
        """Receive a vector, add it, send the sum."""
        while not self._ready:
            self._ready = [self._of[file] for file, _ in self._poll.poll()]
        number = self._ready.pop()
        sock, gradient = self._socks[number], self._gradients[number]
        _receive(sock, memoryview(gradient).cast("B"))
        np.add(self._weights, gradient, out=self._weights)
        sock.sendall(self._weights.data)

    def close(self) -> None:
        for sock in self._socks:
            sock.close()
        for peer in self._peers:
            peer.join()


def _receive(sock: socket.socket, into: memoryview) -> None:
    while into.nbytes:
        count = sock.recv_into(into)
        if not count:
            raise EOFError
        into = into[count:]


def _echo(address: tuple[str, int], parameters: int) -> None:
    weights, gradient = np.empty(parameters, np.float32), np.full(parameters, 1e-3, np.float32)
    with socket.create_connection(address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while True:
                _receive(sock, memoryview(weights).cast("B"))
                sock.sendall(gradient.data)
        except (EOFError, OSError):
            return


@contextmanager
def _made(make: Callable[[int, int], Any], parameters: int, workers: int) -> Iterator[Any]:
    arm = make(parameters, workers)
    try:
        yield arm
    finally:
        arm.close()


def _rate(arm: Any, seconds: float) -> float:
    for _ in range(10):
        arm.exchange()
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < seconds:
        arm.exchange()
        count += 1
    return count / (time.perf_counter() - began_s)


def main() -> None:
    """Print a line for each number of workers."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--parameters", type=int, default=431_080)
    options.add_argument("--seconds", type=float, default=2.0)
    given = options.parse_args()
    torch.set_num_threads(1)
    for workers in (2, 4, 8):
        rates: dict[str, list[float]] = {"server": [], "bare": []}
        with freed_memory_kept_in_block():
            for _ in range(_ROUNDS):
                for name, make in (("server", _Served), ("bare", _Bare)):
                    with _made(make, given.parameters, workers) as arm:
                        rates[name].append(_rate(arm, given.seconds))
        ratios = [one / other for one, other in zip(rates["server"], rates["bare"], strict=True)]
        print(
            f"{workers} workers: {statistics.median(rates['server']):,.0f} exchanges/s, a bare loop "
            f"{statistics.median(rates['bare']):,.0f}: ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
