"""Vectors between processes that have proved to each other that they know the run's secret.

    connector                           listener
        <─────────── handshake ────────>   see handshake.py
        ════════════ frames ════════════   a fixed header, then the bytes of a vector

Nothing else is read before the handshake.  A connector that does not prove itself in time is dropped and
counted.
Both ends always know which frame comes next.  A frame with this header is received directly into its buffer;
any other is an error.  Sending and receiving go on at the same time, so that no order of peers can block
another.  With a certificate in the credentials, everything is sent inside TLS.
"""

from __future__ import annotations

import itertools
import logging
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sparksgd.errors import ClusterError, PeerLost, PeerSilent
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.handshake import HELLO_BYTES, WrongSecret, challenge, prove, send_all

__all__ = [
    "Connection",
    "Header",
    "Listener",
    "Transfer",
    "address_towards",
    "advanced",
    "connect",
    "exchange",
]

log = logging.getLogger("sparksgd")

_HANDSHAKE_S = 5.0
_FEWEST_PENDING = 64
_TLS_SLICE = 1 << 18  # ssl reports progress only when a whole slice is sent
_BACKLOG = 128
_RETRY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Header:
    """Identifies a frame; both ends must expect the same one."""

    run: bytes
    """Which run, 8 bytes."""

    meeting: int
    """Which meeting of the run."""

    step: int
    """Which step, from 0."""

    phase: int
    """Which exchange of the step."""

    def pack(self, num_bytes: int) -> bytes:
        """Return the bytes of the header of a frame of this length."""
        return _HEADER.pack(self.run, self.meeting, self.step, self.phase, num_bytes)


_HEADER = struct.Struct(">8sIQIQ")


class Connection:
    """One authenticated connection, to be used by `exchange`.

    Args:
        sock: connected and proved.
        hello: how the connector named itself.
    """

    def __init__(self, sock: socket.socket, hello: bytes) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a lifeline is silent for long
        sock.setblocking(False)
        self.sock = sock
        self.hello = hello
        self.encrypted = isinstance(sock, ssl.SSLSocket)

    def close(self) -> None:
        """Close it; the other end notices at once."""
        _close(self.sock)

    def shut_down(self, how: int = socket.SHUT_RDWR) -> None:
        """End it, from any thread; a thread that uses it notices at once."""
        with suppress(OSError):
            socket.socket.shutdown(self.sock, how)  # the TLS socket's own shutdown would continue unencrypted

    def ends(self, timeout_s: float | None = None) -> bool:
        """Wait until the other end closes, or this one is shut down; return whether that was in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        unread, poll = memoryview(bytearray(1 << 16)), select.poll()
        try:
            poll.register(self.sock, select.POLLIN)
            while self.receive_some(unread) != 0:
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                poll.poll(None if left_s is None else left_s * 1000)
        except (OSError, ValueError):  # closed meanwhile
            pass
        return True

    def send_some(self, buffers: list[memoryview]) -> int:
        """Send as much of some buffers as the kernel takes now; return the bytes, or -1 for none."""
        try:
            if self.encrypted:
                return self.sock.send(buffers[0][:_TLS_SLICE])
            return self.sock.sendmsg(buffers)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return -1

    def receive_some(self, buffer: memoryview) -> int:
        """Receive what has arrived into a buffer; return the bytes, -1 for none, 0 if the peer has ended."""
        try:
            return self.sock.recv_into(buffer)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return -1
        except ssl.SSLEOFError:
            return 0


@dataclass(kw_only=True)
class Transfer:
    """What is sent to a peer, and received from it, in one exchange."""

    connection: Connection
    """The peer's."""

    name: str
    """The peer's, for errors."""

    sends: Sequence[memoryview] = ()
    """What to send, in this order; if empty, no frame is sent."""

    receives: Sequence[memoryview] = ()
    """Where to put what arrives, in this order; if empty, no frame is expected."""


class _Moving:
    """A transfer under way."""

    def __init__(self, transfer: Transfer, header: Header) -> None:
        self.connection, self.name, self.moved = transfer.connection, transfer.name, 0
        self.outgoing = _framed(header, transfer.sends)
        due = _framed(header, transfer.receives)
        self._due = bytes(due[0]) if due else b""
        self._header = bytearray(len(self._due))
        self.incoming = [memoryview(self._header), *due[1:]] if due else []

    def move(self) -> bool:
        """Send and receive as much as is possible now; return whether that was anything."""
        before = self.moved
        self._send()
        self._receive()
        return self.moved > before

    def _send(self) -> None:
        while self.outgoing:
            sent = self.connection.send_some(self.outgoing)
            if sent < 0:
                return
            self.moved += sent
            advanced(self.outgoing, sent)

    def _receive(self) -> None:
        while self.incoming:
            received = self.connection.receive_some(self.incoming[0])
            if received < 0:
                return
            self.moved += received
            if received == 0:
                raise PeerLost(f"{self.name} closed its connection")
            in_header = self.incoming[0].obj is self._header
            advanced(self.incoming, received)
            if in_header and (not self.incoming or self.incoming[0].obj is not self._header):
                self._check_header()

    def _check_header(self) -> None:
        if bytes(self._header) != self._due:
            raise PeerLost(
                f"{self.name} sent a frame {_HEADER.unpack(self._header)} where {_HEADER.unpack(self._due)} "
                f"(run, meeting, step, phase, bytes) was due"
            )

    @property
    def events(self) -> int:
        return (select.POLLOUT if self.outgoing else 0) | (select.POLLIN if self.incoming else 0)


def exchange(header: Header, transfers: Iterable[Transfer], timeout_s: float) -> None:
    """Send to and receive from many peers at once; return when all of it is done.

    Args:
        header: of every frame of this exchange, except its length.
        transfers: one for each peer.
        timeout_s: how long may pass without progress.

    Raises:
        PeerLost: a peer has ended, or sent something else.
        PeerSilent: there was no progress for too long.
    """
    moving = [_Moving(transfer, header) for transfer in transfers]
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            moved = [transfer.move() for transfer in moving]
            if any(moved):
                deadline = time.monotonic() + timeout_s
            moving = [transfer for transfer in moving if transfer.events]
            if not moving:
                return
            _wait(moving, deadline, timeout_s)
    except (OSError, ValueError) as error:  # ValueError: closed by another thread
        names = ", ".join(transfer.name for transfer in moving)
        raise PeerLost(f"a connection to one of {names} broke: {error}") from error


def _wait(moving: Sequence[_Moving], deadline: float, timeout_s: float) -> None:
    poll = select.poll()
    for transfer in moving:
        poll.register(transfer.connection.sock, transfer.events)
    left_s = deadline - time.monotonic()
    if left_s <= 0 or not poll.poll(left_s * 1000):
        names = ", ".join(transfer.name for transfer in moving)
        raise PeerSilent(f"{names} sent or took nothing for {timeout_s:g} s (engine.peer_timeout_s)")


class Listener:
    """Accepts the connections of peers that know the secret, in threads of its own.

    Args:
        credentials: the run's.
        host: address to listen on, and on no other.
        ports: ports to try, in this order; None: any free one.
        friends: how many members of the run may connect at once.
        welcome: called with each connection that has proved itself, in some thread; it owns the connection.
    """

    def __init__(
        self,
        credentials: Credentials,
        host: str,
        ports: range | None,
        friends: int,
        welcome: Callable[[Connection], None],
    ) -> None:
        self._credentials = credentials
        self._host = host
        self._ports = ports
        self._welcome = welcome
        self._most_pending = max(_FEWEST_PENDING, 2 * friends)
        self._lock = threading.Lock()
        self._pending: dict[int, socket.socket] = {}
        self._dropped: Counter[str] = Counter()
        self._closed = False
        self._socket: socket.socket | None = None
        self.address: tuple[str, int] = (host, 0)

    def start(self) -> None:
        """Bind and listen.

        Raises:
            ClusterError: no port is free.
        """
        self._socket = listening = _bound(self._host, self._ports)
        self.address = listening.getsockname()[:2]
        self._tls = self._credentials.context(listens=True)
        accepting = threading.Thread(
            target=self._accept, args=[listening], name="sparksgd-listener", daemon=True
        )
        accepting.start()

    def close(self) -> None:
        """Stop listening, and drop connections that have not proved themselves yet."""
        with self._lock:
            self._closed = True
            pending, self._pending = self._pending, {}
        if self._socket is not None:
            _close(self._socket)  # wakes the thread that accepts
        for sock in pending.values():
            _close(sock)

    def take_dropped(self) -> Counter[str]:
        """Return how many connections were refused since the last call, by reason."""
        with self._lock:
            dropped, self._dropped = self._dropped, Counter()
        return dropped

    def _accept(self, listening: socket.socket) -> None:
        for number in itertools.count():
            try:
                sock, _ = listening.accept()
                self._admit(number, sock)
            except (OSError, RuntimeError) as error:  # no files or threads left, or the peer has gone
                if self._closed:
                    return
                log.debug("a connection was not accepted: %s", error)
                time.sleep(_RETRY_S)  # files or threads may be free then

    def _admit(self, number: int, sock: socket.socket) -> None:
        """Start a connection's proof."""
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            with self._lock:
                if self._closed:
                    raise OSError("the listener is closed")
                self._pending[number] = sock
                crowd = len(self._pending) > self._most_pending
                oldest = next(iter(self._pending))
            if crowd:
                self._drop(oldest, "too many at once")
            prove = partial(self._prove, number, sock)
            threading.Thread(target=prove, name="sparksgd-proof", daemon=True).start()
        except BaseException:
            self._taken(number)
            sock.close()
            raise

    def _prove(self, number: int, sock: socket.socket) -> None:
        """Let one connector prove that it knows the secret."""
        deadline = time.monotonic() + _HANDSHAKE_S
        try:
            hello, proof = challenge(sock, self._credentials, deadline)
            if self._taken(number) is not None:  # else it was dropped meanwhile, and closed
                send_all(sock, proof, deadline)
                self._welcome(Connection(sock, hello))
            return
        except WrongSecret:
            reason = "wrong secret"
        except TimeoutError:
            reason = "no proof in time"
        except ssl.SSLError:
            reason = "no TLS of this run"
        except OSError:
            reason = "left before its proof"
        self._drop(number, reason)
        _close(sock)

    def _taken(self, number: int, reason: str | None = None) -> socket.socket | None:
        """Take a connection out of those that are still proving; None if another thread did so before."""
        with self._lock:
            sock = self._pending.pop(number, None)
            if sock is not None and reason is not None:
                self._dropped[reason] += 1
            return sock

    def _drop(self, number: int, reason: str) -> None:
        sock = self._taken(number, reason)
        if sock is not None:
            log.debug("a stranger was dropped: %s", reason)
            _close(sock)


def connect(
    credentials: Credentials, address: tuple[str, int], hello: bytes, name: str, timeout_s: float
) -> Connection:
    """Connect to a listener; prove that we know the secret, and let it prove the same.

    Args:
        credentials: the run's.
        address: the listener's.
        hello: names this end, in at most HELLO_BYTES.
        name: the listener's, for errors.
        timeout_s: how long to try; a listener with too many strangers may drop us.

    Raises:
        PeerLost: nobody listens, or nobody who knows the secret.
        PeerSilent: no answer in time.
    """
    assert len(hello) <= HELLO_BYTES
    hello = hello.ljust(HELLO_BYTES, b"\0")
    tls = credentials.context(listens=False)
    deadline = time.monotonic() + timeout_s
    while True:
        sock = None
        try:
            sock = socket.create_connection(address, max(0.001, deadline - time.monotonic()))
            if tls is not None:
                sock = tls.wrap_socket(sock, do_handshake_on_connect=False)
            handshake = min(deadline, time.monotonic() + _HANDSHAKE_S)
            prove(sock, credentials, hello, handshake)
            return Connection(sock, hello)
        except OSError as error:
            if sock is not None:
                _close(sock)
            where = f"{name} at {address[0]}:{address[1]}"
            if isinstance(error, (ConnectionRefusedError, WrongSecret, socket.gaierror)):
                raise PeerLost(f"cannot reach {where}: {error}") from error
            if time.monotonic() >= deadline:
                raise PeerSilent(f"cannot reach {where} within {timeout_s:g} s: {error}") from error
            time.sleep(_RETRY_S)  # its queue was full, and needs a moment


def _framed(header: Header, buffers: Sequence[memoryview]) -> list[memoryview]:
    """Return a frame's header and its non-empty buffers as bytes; nothing if there are none."""
    if not buffers:
        return []
    views = [view.cast("B") for view in buffers if view.nbytes]
    return [memoryview(header.pack(sum(view.nbytes for view in views))), *views]


def advanced(buffers: list[memoryview] | deque[memoryview], count: int) -> None:
    """Drop this many first bytes of some buffers."""
    while count:
        first = buffers[0]
        if first.nbytes <= count:
            count -= first.nbytes
            del buffers[0]
        else:
            buffers[0] = first[count:]
            count = 0


def _bound(host: str, ports: range | None) -> socket.socket:
    family, failure = _family(host), None
    for port in [0] if ports is None else ports:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(_BACKLOG)
            return sock
        except OSError as error:
            failure = error
            sock.close()
    which = "any port" if ports is None else f"a port of {ports.start} to {ports.stop - 1}"
    raise ClusterError(f"cannot listen on {which} of {host}: {failure}; free one, or set engine.ports")


def _family(host: str) -> int:
    try:
        return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ClusterError(f"cannot listen on {host!r}, which is no address of this host: {error}") from error


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    sock.close()


def address_towards(host: str, port: int) -> str:
    """Return this host's address on the interface towards another host; nothing is sent.

    Raises:
        ClusterError: there is no such host, or no route to it.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(
            f"no way from {socket.gethostname()} to the driver at {host!r}: {error}"
        ) from error
