"""Text files that grow line by line, here or where files cannot grow."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

from sparksgd.storage.scratch import in_temporary_folder, scratch_folder

__all__ = ["Lines", "LocalLines", "Place", "SpooledLines", "Target", "Throttle"]

log = logging.getLogger("sparksgd")

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


class Place(Protocol):
    """Where a growing file of this machine lies."""

    @property
    def path(self) -> Path:
        """Return its path."""
        ...

    @property
    def check(self) -> Callable[[], None]:
        """Return what raises if nothing may be written there any more."""
        ...

    def write_bytes(self, data: bytes) -> None:
        """Write a whole file there."""
        ...


class LocalLines:
    """Lines of a file of this machine, which others can read at once.

    This process can read its file when the name is gone, too.  So a file that was removed is written again
    before anything promises that it is there.  Another file in its place is left alone: that is an error.  So
    is a folder that was moved away or removed, because other files are missing as well.

    Args:
        place: of the file, which is there; lines are appended.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        with ExitStack() as unless_opened:
            self._folder = os.open(place.path.parent, os.O_RDONLY)  # open, so that its number stays its own
            unless_opened.callback(os.close, self._folder)
            self._file = _appended_to(place.path)
            self._open = unless_opened.pop_all()
        self._bytes, self._is_told = os.fstat(self._file.fileno()).st_size, False

    def write(self, text: str) -> None:
        """Append whole lines."""
        self._place.check()
        self._file.write(text)
        self._bytes += len(text.encode())

    def flush(self) -> None:
        """Do nothing: they were flushed line by line."""

    def flush_all(self) -> None:
        """Wait until they would outlast a loss of power: a checkpoint is to follow."""
        os.fsync(self._file.fileno())
        self._tell_if_changed()
        if not self._is_there():
            if (why := self._why_elsewhere()) is not None:
                raise OSError(errno.ENOENT, f"{why}, and the run goes on with it", str(self._place.path))
            self._write_again()

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: another file is in its place, or its folder was moved away or removed; it was written all
                the same, beside that file or in a new folder.
        """
        with self._open, ExitStack() as stack:
            stack.callback(lambda: self._file.close())  # it may be another one by then
            self._file.flush()
            self._tell_if_changed()
            if self._is_there():
                return
            why, path = self._why_elsewhere(), self._place.path
            if why is not None and os.path.lexists(path):
                names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
                path = next(name for name in names if not os.path.lexists(name))
                self._place.check()
                path.write_bytes(self._all())
            else:
                self._write_again()
            if why is not None:
                raise OSError(errno.ENOENT, f"{why}; all lines are in {path} now", str(path))

    def _tell_if_changed(self) -> None:
        """Warn once of a file that somebody else has cut or written to: what is lost is nowhere else."""
        found = os.fstat(self._file.fileno()).st_size
        if found != self._bytes and not self._is_told:
            self._is_told = True
            log.warning(
                "%s has %s bytes, but the run wrote %s: somebody else changed it meanwhile, and what is lost "
                "cannot be written again. A later run will not take it for whole",
                self._place.path,
                f"{found:,}",
                f"{self._bytes:,}",
            )

    def _is_there(self) -> bool:
        """Return whether the name leads to this file.

        Some file systems give a file another number when it is asked for again: then its size tells.
        """
        held = os.fstat(self._file.fileno())
        try:
            found = self._place.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(found, held) or (held.st_nlink > 0 and found.st_size == held.st_size)

    def _why_elsewhere(self) -> str | None:
        """Return why the file cannot be written again under its name, and what to do; None: it can."""
        path, folder = self._place.path, self._place.path.parent
        try:
            is_folder_there = os.path.samestat(folder.stat(), os.fstat(self._folder))
        except (FileNotFoundError, NotADirectoryError):
            is_folder_there = False
        if not is_folder_there:
            return f"{folder} was moved away or removed while the run wrote to it: move it back where it was"
        if os.path.lexists(path):
            return (
                f"{path} is another file, which took the place of the one that the run writes: move it away"
            )
        return None

    def _all(self) -> bytes:
        size_bytes = os.fstat(self._file.fileno()).st_size
        data = os.pread(self._file.fileno(), size_bytes, 0)
        if len(data) < size_bytes:
            path = self._place.path
            raise OSError(errno.EIO, f"{path} was removed, and cannot be read to be written again", str(path))
        return data

    def _write_again(self) -> None:
        """Write the file under its name again, from what is still held of it."""
        path, file, data = self._place.path, self._file, self._all()
        self._place.write_bytes(data)
        self._file = _appended_to(path)
        file.close()
        log.warning(
            "%s was removed while the run wrote to it: all of its %s bytes are written again",
            path,
            f"{len(data):,}",
        )


def _appended_to(path: Path) -> IO[str]:
    return path.open("a+", encoding="utf-8", buffering=1)  # to be read, too, if it must be written again


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
