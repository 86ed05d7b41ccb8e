"""Turns: arms that live side by side, of which only one works at a time, a block after another's.

So what a machine's neighbours do to it befalls all arms alike.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

__all__ = ["TURNS", "Turns", "TurnsOf"]

TURNS = "SPARKSGD_BENCH_TURNS"
_POLL_S = 1.0


class Turns:
    """An arm's side: it has its turn from the start, and until it asks for the next."""

    def __init__(self) -> None:
        self._path = os.environ.get(TURNS)
        self._turn: socket.socket | None = None
        self.next()

    def next(self) -> None:
        """Let the other arms have theirs, and return when it is this one's turn again."""
        if self._turn is not None:
            self._turn.close()
        if self._path is not None:
            self._turn = socket.socket(socket.AF_UNIX)
            self._turn.connect(self._path)
            self._turn.recv(1)


class TurnsOf:
    """The side that gives an arm its turns.

    Args:
        path: of a socket, to be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._socket.settimeout(_POLL_S)

    def give(self) -> bool:
        """Give the arm a turn and return True when it is over, or False if it has not asked for one yet."""
        try:
            turn, _ = self._socket.accept()
        except TimeoutError:
            return False
        with turn:
            turn.sendall(b"!")
            turn.recv(1)
        return True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
