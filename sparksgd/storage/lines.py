"""Text files that grow line by line, here or where files cannot grow."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from sparksgd.storage.scratch import in_temporary_folder, scratch_folder

__all__ = ["Lines", "LocalLines", "SpooledLines", "Target", "Throttle"]

_SECONDS_BETWEEN_COPIES = 5.0
_COPYING_SHARE = 0.05
"""Copying a growing file may take this share of the time."""


class Lines(Protocol):
    """A text file that grows line by line."""

    def write(self, text: str) -> object:
        """Append whole lines."""
        ...

    def flush(self) -> object:
        """Let others read what was written; the lines of the last seconds may be missing."""
        ...

    def flush_all(self) -> object:
        """Let others read everything that was written so far."""
        ...

    def close(self) -> None:
        """Let others read everything."""
        ...


class Target(Protocol):
    """A place for a whole file."""

    def put(self, file: Path) -> None:
        """Write the file as a copy of one of this machine, whole or not at all."""
        ...


@dataclass(frozen=True)
class LocalLines:
    """Lines of a file of this machine, which others can read at once."""

    file: IO[str]
    check: Callable[[], None]

    def write(self, text: str) -> None:
        """Append whole lines."""
        self.check()
        self.file.write(text)

    def flush(self) -> None:
        """Do nothing: they were flushed line by line."""

    def flush_all(self) -> None:
        """Wait until they would outlast a loss of power: a checkpoint is to follow."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Throttle:
    """Says when to do something again that takes time.

    Args:
        pause_s: the least time between two times.
        share: the largest share of all time that it may take.
        clock: returns seconds.
    """

    def __init__(self, pause_s: float, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s, self._share, self._clock = pause_s, share, clock
        self._due_s = -math.inf

    def is_due(self) -> bool:
        """Return whether it is time again."""
        return self._clock() >= self._due_s

    @contextmanager
    def done(self) -> Iterator[None]:
        """Do it in the block."""
        started_s = self._clock()
        try:
            yield
        finally:
            ended_s = self._clock()
            self._due_s = ended_s + max(self._pause_s, (ended_s - started_s) / self._share)


class SpooledLines:
    """Lines for a place where files cannot grow: they are kept here, and copied there every few seconds.

    If a run is killed, the lines of its last seconds are missing there.  A long file takes longer to copy, so
    it is copied less often.

    Args:
        target: where the file goes.
        kept: what it begins with.
        clock: returns seconds.
    """

    def __init__(
        self, target: Target, kept: bytes = b"", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._target = target
        self._copies = Throttle(_SECONDS_BETWEEN_COPIES, _COPYING_SHARE, clock)
        self._unwritten = bytearray(kept)
        with ExitStack() as unless_begun:
            self._path = unless_begun.enter_context(scratch_folder()) / "lines"
            with in_temporary_folder():
                self._spool = unless_begun.enter_context(self._path.open("wb", 0))
            self._copy()
            self._open = unless_begun.pop_all()

    def write(self, text: str) -> None:
        """Append whole lines."""
        self._unwritten += text.encode()

    def flush(self) -> None:
        """Copy what is not there yet, if it is time to."""
        if self._copies.is_due():
            self._copy()

    def flush_all(self) -> None:
        """Copy what is not there yet, now."""
        self._copy()

    def close(self) -> None:
        """Copy what is not there yet."""
        with self._open:
            self._copy()

    def _copy(self) -> None:
        with self._copies.done():
            with in_temporary_folder():
                while self._unwritten:  # if the disk is full, the rest waits until there is space again
                    del self._unwritten[: self._spool.write(self._unwritten)]
            self._target.put(self._path)
