"""One vector at two addresses: the module sees what the solver writes there, but not the other way round.

    solver ── writes ──> shared mapping  ─┐
                                          ├─ the same pages, of a file in memory
    module ── reads ───> private mapping ─┘
    module ── writes ──> a page of its own, which the kernel makes, and which /proc/self/pagemap tells

So nothing is copied before forward, and bytes are compared only where a page was written.  A page that is
given back shows again what the solver wrote.  A module that writes many pages keeps them instead, and each
point is copied to them.

Every write of ours must go to the shared mapping: a page that was written privately no longer shows it.

    shared     the solver's strip: its steps, and what it loads; the strips of other workers, as they arrive;
               what forward changed, when it becomes the weights; the weights of a segment or an evaluation
    private    forward, backward, their hooks, the module's own `train` and `eval`: what they write is found,
               and given back

What a solver of the user's own writes through the module's parameters would be private.  So only solvers of
strips use this, which never get them.

Legend: P elements.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from weakref import WeakSet, finalize

import numpy as np
import numpy.typing as npt
import torch

from sparksgd.arithmetic.changes import bits, equal
from sparksgd.errors import ModelError

__all__ = ["LEAST_BYTES", "MappedTwice", "mapped_twice"]

LEAST_BYTES = 1 << 19
"""A smaller vector is copied and compared in less time than the kernel takes to say what was written."""

_PAGE = mmap.PAGESIZE
_ENTRY = 8  # bytes of the pagemap for each page, in the order of the machine
_TOP = _ENTRY - 1 if sys.byteorder == "little" else 0
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20  # in the top byte of an entry: its bits 63, 62 and 61
_IS_WRITTEN = bytes(bool(top & (_PRESENT | _SWAPPED)) and not top & _OF_FILE for top in range(256))
_UNWRITTEN = bytes(top for top in range(256) if not _IS_WRITTEN[top])

_MOST_WRITTEN = 1 / 8
"""The share of pages above which it takes longer to make pages of its own than to copy a point."""

_NONE = np.empty(0, np.int64)
_POPULATE_WRITE = 23  # as if each page was written; Python has no name for it


class MappedTwice:
    """The two mappings of a vector; see `mapped_twice`.

    Args:
        shared: whole pages.
        private: the same pages.
        like: float[P], of the vector's size and type.

    Raises:
        OSError: the system does not tell of pages.
    """

    def __init__(self, shared: mmap.mmap, private: mmap.mmap, like: torch.Tensor) -> None:
        self._private, self._process = private, os.getpid()
        self.is_copied = False
        """Whether the module keeps pages of its own, and every point is copied to them."""

        dtype = like.numpy().dtype
        self.vector = torch.from_numpy(np.frombuffer(shared, dtype, like.numel()))
        """float[P]: what stands; the solver writes it."""

        self.seen = torch.from_numpy(np.frombuffer(private, dtype, like.numel()))
        """float[P]: what the module has."""

        self.stands, self.words = bits(self.vector), bits(self.seen)
        self._bytes = np.frombuffer(shared, np.uint8), np.frombuffer(private, np.uint8)
        self._first, self._pages = self._bytes[1].ctypes.data // _PAGE, len(private) // _PAGE
        self._file = _open_pagemap()  # it stays open: to open it takes longer than to read it
        finalize(self, os.close, self._file).atexit = False

    def stand_at(self, point: torch.Tensor) -> None:
        """Let a point, float[P], be what stands, and what the module has.

        Raises:
            ModelError: this is another process, which the module started by a fork.
        """
        self._require_own_process()
        if point.data_ptr() != self.vector.data_ptr():
            self.vector.copy_(point)
        self.restore()

    def is_changed(self) -> bool:
        """Return whether the module has other bytes than those that stand.

        Raises:
            ModelError: see above.
        """
        self._require_own_process()
        if not self.is_copied:
            pages = self.written()
            if pages is not None and not len(pages):
                return False
            self.is_copied = pages is not None and len(pages) > _MOST_WRITTEN * self._pages
        if not equal(self.words, self.stands):
            return True
        if not self.is_copied:
            self.restore()
        return False

    def restore(self) -> None:
        """Let the module have the bytes that stand."""
        if not self.is_copied:
            try:
                self._give_back()
            except OSError:  # the module has locked its memory
                self.is_copied = True
        if self.is_copied and not equal(self.words, self.stands):
            self.words[...] = self.stands

    def _give_back(self) -> None:
        """Let every page that the module has written be that of the shared mapping again."""
        pages = self.written()
        if pages is not None and not len(pages):
            return
        for run in [range(self._pages)] if pages is None else _runs(pages):
            self._private.madvise(mmap.MADV_DONTNEED, run.start * _PAGE, len(run) * _PAGE)

    def written(self) -> npt.NDArray[np.int64] | None:
        """Return which pages the module has written, ascending; None if the system does not say."""
        own = os.getpid() == self._process
        try:
            file = self._file if own else _open_pagemap()  # after a fork, it would tell of the parent
            try:
                entries = os.pread(file, _ENTRY * self._pages, _ENTRY * self._first)
            finally:
                if not own:
                    os.close(file)
        except OSError:
            return None
        if len(entries) != _ENTRY * self._pages:
            return None
        tops = entries[_TOP::_ENTRY]
        if not tops.translate(None, _UNWRITTEN):
            return _NONE
        return np.flatnonzero(np.frombuffer(tops.translate(_IS_WRITTEN), np.bool_))

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise ModelError(
                "forward forks, and the child process comes back from it, where it would train in the memory "
                "of its parent: let the child end by os._exit()"
            )

    def leave_copy(self) -> None:
        """Let a process that is now forked keep what the module has, whatever the solver writes later."""
        try:
            self._private.madvise(_POPULATE_WRITE)
        except OSError:  # of Linux before 5.14
            self._bytes[1][::_PAGE] |= 0

    def works(self) -> bool:
        """Return whether both mappings do what is said above; the values stay as they are."""
        shared, private = self._bytes
        if not self._is_clean():
            return False
        for page in (0, self._pages - 1):
            for place in (page * _PAGE, (page + 1) * _PAGE - 1):
                before = int(shared[place])
                shared[place] = before ^ 255
                is_seen = private[place] == before ^ 255
                private[place] = before
                pages = self.written()
                is_told = pages is not None and pages.tolist() == [page]
                is_apart = shared[place] == before ^ 255 and private[place] == before
                self._give_back()
                is_back = private[place] == before ^ 255
                shared[place] = before
                if not (is_seen and is_told and is_apart and is_back and self._is_clean()):
                    return False
        return True

    def _is_clean(self) -> bool:
        pages = self.written()
        return pages is not None and not len(pages) and equal(self.words, self.stands)


def mapped_twice(values: torch.Tensor) -> MappedTwice | None:
    """Return memory that holds these values, float[P]; None where the system has none that works so."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return None
    size = -(-values.nbytes // _PAGE) * _PAGE
    try:
        file = os.memfd_create("sparksgd-parameters", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(file, 0, size)  # else want of memory would end the process
            shared = mmap.mmap(file, size)
            private = mmap.mmap(file, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(file)
        made = MappedTwice(shared, private, values)
        made.vector.copy_(values)
        if not made.works():
            return None
    except (OSError, ValueError, OverflowError):
        return None
    _LIVE.add(made)
    return made


def _open_pagemap() -> int:
    return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def _runs(pages: npt.NDArray[np.int64]) -> Iterator[range]:
    """Yield ranges of adjacent pages.

    >>> list(_runs(np.array([2, 3, 4, 7])))
    [range(2, 5), range(7, 8)]
    """
    for run in np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1):
        yield range(int(run[0]), int(run[-1]) + 1)


_LIVE: WeakSet[MappedTwice] = WeakSet()


def _leave_copies() -> None:
    for mapped in list(_LIVE):
        mapped.leave_copy()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_leave_copies)
