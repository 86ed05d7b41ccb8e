"""Who does not know the secret of an all-reduce run is dropped at every port, and counted."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections import Counter
from contextlib import suppress

import pytest
from spark_helpers import ALLREDUCE, AtStep, configured, memory_bytes, python_workers, undisturbed

from sparksgd.errors import ClusterError
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.wire import connect
from sparksgd.spark.train import train

pytestmark = pytest.mark.session("local[2]")


@pytest.mark.soak
@pytest.mark.parametrize("encrypt", ["false", "true"])
def test_strangers_at_every_port_are_counted_and_change_nothing(spark, small, caplog, encrypt):
    with socket.create_server(("127.0.0.1", 0)) as free:
        first = free.getsockname()[1]
    config = configured(
        *ALLREDUCE, "train.steps=1000", "train.epochs=80", "engine.segment_steps=50",
        f"engine.ports={first}-{first + 20}", f"engine.encrypt={encrypt}",
    )  # fmt: skip
    crowd = Strangers(range(first, first + 21), Credentials.new(encrypt=encrypt == "true"))
    looks: list[int] = []
    observers = [AtStep(step, lambda _: looks.append(most_resident_bytes())) for step in (50, 1000)]
    observers += [AtStep(50, crowd.come), AtStep(950, crowd.join)]
    training = train(spark, config, spark.read.parquet(small), observers=observers)
    crowd.close()
    assert crowd.let_in == 0
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries == 0
    assert crowd.knocked.keys() == {"nothing", "garbage", "half", "secret", "gigabyte"}
    assert crowd.knocked.total() >= 8  # the driver and a worker at least
    for door in ("the driver", "worker 0", "worker 1"):
        assert re.search(rf"connections of strangers were dropped: .*\d to {door} \(", caplog.text)
    before, after = looks
    assert after - before < 200 << 20


class Strangers:
    """Connections by who does not know the secret, in a thread while a training runs.

    Args:
        ports: some of them listen.
        credentials: another run's.
    """

    def __init__(self, ports: range, credentials: Credentials) -> None:
        self.knocked: Counter[str] = Counter()
        self.let_in = 0
        self._ports, self._credentials = ports, credentials
        self._silent: list[socket.socket] = []

    def come(self, _) -> None:
        self._thread = threading.Thread(target=self._knock)
        self._thread.start()

    def join(self, _) -> None:
        """Wait until all have come."""
        self._thread.join()

    def close(self) -> None:
        for sock in self._silent:
            sock.close()

    def _knock(self) -> None:
        for port in self._ports:
            for kind in ("nothing", "garbage", "half", "secret", "gigabyte"):
                try:
                    self._silent.append(socket.create_connection(("127.0.0.1", port), timeout=1))
                except OSError:
                    break  # nobody listens there
                self.knocked[kind] += 1
                with suppress(OSError, ClusterError):  # dropped, as it should be
                    self._say(kind, port, self._silent[-1])

    def _say(self, kind: str, port: int, sock: socket.socket) -> None:
        if kind == "garbage":
            sock.sendall(os.urandom(4096))
        elif kind == "half":
            sock.recv(16)
            sock.sendall(bytes(40))
        elif kind == "secret":
            connect(self._credentials, ("127.0.0.1", port), b"hello", "a worker", 1)
            self.let_in += 1
        elif kind == "gigabyte":
            for _ in range(1 << 10):
                sock.sendall(bytes(1 << 20))


def most_resident_bytes() -> int:
    """Return the most memory that this process has had, and each Python worker that it started."""
    return sum(memory_bytes(pid, "VmHWM") for pid in python_workers() | {os.getpid()})
