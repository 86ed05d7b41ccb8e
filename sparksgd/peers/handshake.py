"""How both ends of a connection prove to each other that they know the run's secret.

    connector                           listener
        <──────────── challenge ────────   32 random bytes; a stranger gets nothing else
        ──── hello, nonce, proof ───────>  HMAC(secret, challenge, nonce, hello)
        <──────────── proof ────────────   HMAC(secret, nonce, challenge)

Nothing else is read before the proof.  With a certificate in the credentials, all of it is inside TLS.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import ssl
import time

from sparksgd.peers.credentials import Credentials

__all__ = ["HELLO_BYTES", "WrongSecret", "challenge", "prove", "send_all"]

HELLO_BYTES = 64
"""Length of the hello, in which a connector names itself; its content does not matter here."""

_NONCE_BYTES = 32
_PROOF_BYTES = 32


class WrongSecret(OSError):
    """The other end does not know the run's secret."""


def challenge(sock: socket.socket, credentials: Credentials, deadline: float) -> tuple[bytes, bytes]:
    """Let a connector prove that it knows the secret.

    Returns:
        Its hello, and the listener's own proof, which is still to be sent.

    Raises:
        WrongSecret: it does not know it.
        OSError: it left, gave no proof in time, or there is no TLS of this run.
    """
    _shake_hands(sock, deadline)
    asked = secrets.token_bytes(_NONCE_BYTES)
    send_all(sock, asked, deadline)
    said = _receive_exactly(sock, HELLO_BYTES + _NONCE_BYTES + _PROOF_BYTES, deadline)
    hello, nonce = said[:HELLO_BYTES], said[HELLO_BYTES:-_PROOF_BYTES]
    if not hmac.compare_digest(said[-_PROOF_BYTES:], _proof(credentials, b"connector", asked, nonce, hello)):
        raise WrongSecret("it does not know this run's secret")
    return hello, _proof(credentials, b"listener", nonce, asked)


def prove(sock: socket.socket, credentials: Credentials, hello: bytes, deadline: float) -> None:
    """Prove to a listener that this end knows the secret, and let it prove the same.

    Raises:
        WrongSecret: the listener does not know it.
        OSError: it left, gave no proof in time, or there is no TLS of this run.
    """
    _shake_hands(sock, deadline)
    asked = _receive_exactly(sock, _NONCE_BYTES, deadline)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    proof = _proof(credentials, b"connector", asked, nonce, hello)
    send_all(sock, hello + nonce + proof, deadline)
    answer = _receive_exactly(sock, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(answer, _proof(credentials, b"listener", nonce, asked)):
        raise WrongSecret("it does not know this run's secret")


def _proof(credentials: Credentials, role: bytes, *parts: bytes) -> bytes:
    """Return a proof that needs the secret; the role in it makes an echo of it invalid."""
    return hmac.digest(credentials.secret, b"sparksgd " + role + b"".join(parts), "sha256")


def _shake_hands(sock: socket.socket, deadline: float) -> None:
    """Make the TLS handshake, if TLS is used."""
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(_left_s(deadline))
        sock.do_handshake()


def send_all(sock: socket.socket, message: bytes, deadline: float) -> None:
    """Send a message before the deadline, or raise TimeoutError."""
    sock.settimeout(_left_s(deadline))
    sock.sendall(message)


def _receive_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < count:
        sock.settimeout(_left_s(deadline))
        some = sock.recv(count - len(received))
        if not some:
            raise ConnectionResetError("it closed the connection")
        received += some
    return bytes(received)


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no answer in time")
    return left_s
