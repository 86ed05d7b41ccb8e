"""Connections that only who knows the secret gets, and frames that arrive whole or not at all."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from company_of_workers import ENDLESS_S, HOST

from sparksgd.errors import ClusterError, PeerLost
from sparksgd.peers import wire
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.handshake import HELLO_BYTES
from sparksgd.peers.wire import Connection, Header, Listener, Transfer, connect, exchange

HEADER = Header(run=b"run-0001", meeting=1, step=7, phase=2)


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def credentials(request: pytest.FixtureRequest) -> Credentials:
    return Credentials.new(encrypt=request.param)


@contextmanager
def listening(credentials: Credentials) -> Iterator[tuple[Listener, list[Connection]]]:
    """Listen for the time of the block; yield the listener, and whom it welcomed."""
    welcomed: list[Connection] = []
    listener = Listener(credentials, HOST, None, 2, welcomed.append)
    listener.start()
    try:
        yield listener, welcomed
    finally:
        listener.close()
        for connection in welcomed:
            connection.close()


@contextmanager
def pair(credentials: Credentials) -> Iterator[tuple[Connection, Connection]]:
    """Yield both ends of one connection."""
    with listening(credentials) as (listener, welcomed):
        here = connect(credentials, listener.address, b"me", "there", 5)
        eventually(lambda: welcomed)
        yield here, welcomed[0]
        here.close()


def eventually(true, within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # another thread gets there


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_vectors_cross_in_both_directions_at_once(credentials):
    # larger than any socket buffer: both ends would block for ever if either only sent
    size = 3_000_001
    there, here = np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32)[::-1].copy()
    got_here, got_there = np.empty(size, np.float32), np.empty(size, np.float32)
    with pair(credentials) as (a, b):
        moving = Transfer(connection=b, name="a", sends=[memoryview(there)], receives=[memoryview(got_there)])
        other = in_thread(lambda: exchange(HEADER, [moving], 30))
        halves = [memoryview(here[:1000]), memoryview(here[1000:])]
        exchange(
            HEADER, [Transfer(connection=a, name="b", sends=halves, receives=[memoryview(got_here)])], 30
        )
        other.join()
    assert np.array_equal(got_here, there)
    assert np.array_equal(got_there, here)


def test_the_listener_learns_who_connects(credentials):
    with pair(credentials) as (_, there):
        assert there.hello == b"me".ljust(HELLO_BYTES, b"\0")


def test_a_wrong_secret_is_dropped_and_counted_and_told(credentials):
    with listening(credentials) as (listener, welcomed):
        wrong = Credentials(secret=secrets.token_bytes(32), pem=credentials.pem)
        with pytest.raises(PeerLost, match=r"cannot reach there at 127\.0\.0\.1"):
            connect(wrong, listener.address, b"me", "there", 0.5)
        eventually(lambda: listener._dropped["wrong secret"])
        assert not welcomed


def test_a_listener_that_does_not_know_the_secret_is_told_apart(credentials):
    """A stranger that listens in a worker's place, and takes any proof, gets no vector."""
    impostor = socket.create_server((HOST, 0))

    def pretend() -> None:
        sock, _ = impostor.accept()
        tls = credentials.context(listens=True)
        sock = sock if tls is None else tls.wrap_socket(sock, server_side=True)
        sock.sendall(secrets.token_bytes(32))
        said = b""
        while len(said) < HELLO_BYTES + 64:
            said += sock.recv(4096)
        sock.sendall(said[-32:])  # the connector's own proof, sent back
        sock.close()

    thread = in_thread(pretend)
    with pytest.raises(PeerLost, match="it does not know this run's secret"):
        connect(credentials, impostor.getsockname(), b"me", "there", 5)
    thread.join()
    impostor.close()


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        (lambda sock: None, "no proof in time"),
        (lambda sock: sock.sendall(os.urandom(40)), "no proof in time"),
        (lambda sock: sock.close(), "left before its proof"),
        (lambda sock: sock.sendall(os.urandom(128)), "wrong secret"),
    ],
    ids=["silent", "half a handshake", "gone", "garbage"],
)
def test_strangers_are_dropped_and_counted_and_friends_come_through(monkeypatch, stranger, reason):
    monkeypatch.setattr(wire, "_HANDSHAKE_S", 0.5)
    credentials = Credentials.new(encrypt=False)
    with listening(credentials) as (listener, welcomed), socket.create_connection(listener.address) as sock:
        stranger(sock)
        connect(credentials, listener.address, b"me", "there", 5).close()
        eventually(lambda: welcomed)
        eventually(lambda: listener._dropped[reason])
        assert sum(listener._dropped.values()) == 1


def test_a_stranger_without_tls_is_dropped(monkeypatch):
    listens = listening(Credentials.new(encrypt=True))
    with listens as (listener, _), socket.create_connection(listener.address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        eventually(lambda: listener._dropped["no TLS of this run"])


def test_a_crowd_of_silent_strangers_keeps_no_friend_out(monkeypatch):
    monkeypatch.setattr(wire, "_HANDSHAKE_S", ENDLESS_S)  # none of them is dropped for its silence
    credentials = Credentials.new(encrypt=False)
    with listening(credentials) as (listener, welcomed):
        crowd = [socket.create_connection(listener.address) for _ in range(150)]
        connect(credentials, listener.address, b"me", "there", ENDLESS_S).close()
        eventually(lambda: welcomed)
        eventually(lambda: listener._dropped["too many at once"] >= 80)
        for sock in crowd:
            sock.close()


def test_a_gigabyte_from_a_stranger_is_not_read():
    credentials = Credentials.new(encrypt=False)
    with listening(credentials) as (listener, _), socket.create_connection(listener.address) as sock:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sock.sendall(bytes(1 << 30))
        assert listener._dropped["wrong secret"] == 1


def test_a_peer_that_dies_is_told_at_once(credentials):
    with pair(credentials) as (a, b):
        waiting = [Transfer(connection=a, name="worker 3", receives=[memoryview(bytearray(8))])]
        thread = in_thread(b.close)
        with pytest.raises(PeerLost, match="worker 3"):
            exchange(HEADER, waiting, ENDLESS_S)
        thread.join()


def test_a_silent_peer_ends_the_exchange_in_time(credentials):
    with pair(credentials) as (a, _):
        waiting = [Transfer(connection=a, name="worker 3", receives=[memoryview(bytearray(8))])]
        with pytest.raises(PeerLost, match=r"worker 3 sent or took nothing for 0\.2 s"):
            exchange(HEADER, waiting, 0.2)


@pytest.mark.parametrize(
    "other",
    [
        Header(run=b"run-0002", meeting=1, step=7, phase=2),
        Header(run=b"run-0001", meeting=2, step=7, phase=2),
        Header(run=b"run-0001", meeting=1, step=6, phase=2),
        Header(run=b"run-0001", meeting=1, step=7, phase=1),
    ],
    ids=["run", "meeting", "step", "phase"],
)
def test_a_frame_that_is_not_due_is_refused(other):
    with pair(Credentials.new(encrypt=False)) as (a, b):
        exchange(other, [Transfer(connection=b, name="a", sends=[memoryview(b"12345678")])], 5)
        got = bytearray(8)
        with pytest.raises(PeerLost, match=r"where .* was due"):
            exchange(HEADER, [Transfer(connection=a, name="b", receives=[memoryview(got)])], 5)
        assert bytes(got) == bytes(8)


def test_a_frame_of_another_length_is_refused():
    with pair(Credentials.new(encrypt=False)) as (a, b):
        exchange(HEADER, [Transfer(connection=b, name="a", sends=[memoryview(b"1234567")])], 5)
        with pytest.raises(PeerLost, match=r"where .* was due"):
            exchange(HEADER, [Transfer(connection=a, name="b", receives=[memoryview(bytearray(8))])], 5)


def test_a_port_range_is_kept_to_and_its_end_is_told():
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        listener = Listener(Credentials.new(encrypt=False), HOST, range(port, port + 1), 2, lambda _: None)
        with pytest.raises(ClusterError, match=f"cannot listen on a port of {port} to {port} of 127.0.0.1"):
            listener.start()


def test_credentials_show_nothing_when_printed():
    assert repr(Credentials.new(encrypt=True)) == "Credentials()"
