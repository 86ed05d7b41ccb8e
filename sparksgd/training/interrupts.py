"""Ctrl-C and SIGTERM: the first one ends the run in order, and the last good model is written.

SIGTERM from a scheduler means the same as Ctrl-C, so `Terminated` is a KeyboardInterrupt.

Python's handlers run in the main thread.  While that waits for an answer of the JVM, only a signal that the
kernel gives to this thread ends the wait.  If two signals come close together, as Ctrl-C and the SIGTERM by
which the JVM passes it on, other threads get both half the time.  So a thread is told of each signal, and
wakes the main thread until that has seen it.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

__all__ = ["Terminated", "end_in_order", "ended_by"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HANDLED = 0  # no signal has this number
_LONGEST_END_S = 25.0
_WOKEN_EVERY_S = 0.1


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


_came: list[int] = []
"""The signal that ends this process, if one came."""

_first: list[Callable[[], object]] = []
"""What is called before anything else."""

_told: list[socket.socket] = []
"""Where Python writes the number of each signal."""


def ended_by() -> int | None:
    """Return the signal that ends this process, if one came; its exception may have been replaced."""
    return _came[0] if _came else None


def end_in_order(first: Callable[[], object] = lambda: None) -> None:
    """Let the first Ctrl-C or SIGTERM raise in this process, and kill it if it does not end soon.

    A second Ctrl-C kills it at once.  The main thread must call this.

    Args:
        first: called before anything else.
    """
    _first[:] = [first]
    for number in _SIGNALS:
        signal.signal(number, _end)
    if not _told:
        told, watched = socket.socketpair()
        told.setblocking(False)
        _told.append(told)
        os.register_at_fork(after_in_child=_forget_signals)
        threading.Thread(target=_watch, args=[watched], name="sparksgd-signals", daemon=True).start()
    signal.set_wakeup_fd(_told[0].fileno(), warn_on_full_buffer=False)


def _forget_signals() -> None:
    """Let a forked child end as others do; it has its parent's socket, too, and no thread that reads."""
    signal.set_wakeup_fd(-1)
    _told.clear()
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    if _came:
        if number == _came[0] == signal.SIGINT:
            os._exit(128 + number)
        return
    _came.append(number)
    for told in _told:  # asyncio, too, has Python write there, and nowhere afterwards
        with suppress(OSError):
            told.send(bytes([_HANDLED]))
    for call in _first:
        call()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _watch(told: socket.socket) -> None:
    """Wake the main thread once a signal has come, and kill this process if it lasts."""
    main = threading.main_thread().ident
    assert main is not None
    came: list[int] = []
    ends_at_s = math.inf
    while came.count(signal.SIGINT) < 2 and (left_s := ends_at_s - time.monotonic()) > 0:
        is_awake = not came or bool(_came)
        told.settimeout(None if not came else left_s if is_awake else min(left_s, _WOKEN_EVERY_S))
        try:
            number = told.recv(1)[0]
        except TimeoutError:
            if not is_awake:
                signal.pthread_kill(main, signal.SIGTERM)  # the handler of what came runs with it
            continue
        # PySpark's handler may be in the place of ours, and raises by itself.
        if number == _HANDLED or (number in _SIGNALS and signal.getsignal(number) is _end):
            came.append(number)
            ends_at_s = min(ends_at_s, time.monotonic() + _LONGEST_END_S)
    os._exit(128 + (_came or came)[0])
