"""Ctrl-C and SIGTERM: the first one ends the run in order, and the last good model is written.

SIGTERM from a scheduler means the same as Ctrl-C, so `Terminated` is a KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["Terminated", "end_in_order", "ended_by"]

_LONGEST_END_S = 25.0


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


_came: list[int] = []
"""The signal that ends this process, if one came."""


def ended_by() -> int | None:
    """Return the signal that ends this process, if one came; its exception may have been replaced."""
    return _came[0] if _came else None


def end_in_order(first: Callable[[], object] = lambda: None) -> None:
    """Let the first Ctrl-C or SIGTERM raise in this process, and kill it if it does not end soon.

    A second Ctrl-C kills it at once.

    Args:
        first: called before anything else.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if _came:
            if number == signal.SIGINT:
                os._exit(128 + number)
            return  # SIGTERM may follow Ctrl-C, because the JVM passes signals on
        _came.append(number)
        last = threading.Timer(_LONGEST_END_S, os._exit, [128 + number])
        last.daemon = True
        last.start()
        first()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
