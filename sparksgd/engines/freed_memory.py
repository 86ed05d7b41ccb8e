"""Memory that a step has freed is kept for the next one, instead of being given back to the system.

A forward and backward pass allocates and frees the same blocks at every step.  By default, glibc gives the
free end of its heap back, and the next step pays for it with page faults: some 2,000 for LeNet and 64 rows,
which is a fifth of the step on a virtual machine.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["freed_memory_kept_in_block", "keep_freed_memory_until_exit"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_BY_ITSELF = 32 << 20  # glibc's own upper limit for M_MMAP_THRESHOLD
_LARGEST_OF_WORKERS = 1 << 30
_MOST_KEPT = 512 << 20

_users = 0
_lock = threading.Lock()


def keep_freed_memory_until_exit() -> None:
    """Keep what this process frees for as long as it lives, up to 512 MiB at the end of its heap.

    Nothing happens where the C library is not glibc, or where the environment sets the thresholds.
    """
    _set_thresholds(_LARGEST_OF_WORKERS, _MOST_KEPT)


@contextmanager
def freed_memory_kept_in_block() -> Iterator[None]:
    """Keep what this process frees inside `with`, and then give it back: for a process that is not a worker.

    Allocations of more than 32 MiB are still given back at once: they are whole vectors of a large model, and
    a step has few.
    What the thresholds were cannot be asked for.  Afterwards they are what glibc itself makes of them in a
    process that has once freed a block of 32 MiB.
    """
    global _users
    entered = False
    try:
        with _lock:
            _users += 1
            entered = True
            _set_thresholds(_LARGEST_BY_ITSELF, _MOST_KEPT)
        yield
    finally:
        with _lock:
            _users -= entered
            if not _users:
                _set_thresholds(_LARGEST_BY_ITSELF, 2 * _LARGEST_BY_ITSELF)
                _of_glibc("malloc_trim")(0)


def _set_thresholds(mmap_bytes: int, trim_bytes: int) -> None:
    """Set from what size on a block has pages of its own, and how much may be free at the end of the heap."""
    if _are_users_own():
        return
    if not _of_glibc("mallopt")(_M_MMAP_THRESHOLD, mmap_bytes):  # old versions take no greater one than this
        _of_glibc("mallopt")(_M_MMAP_THRESHOLD, _LARGEST_BY_ITSELF)
    _of_glibc("mallopt")(_M_TRIM_THRESHOLD, trim_bytes)


def _are_users_own() -> bool:
    """Return whether this process was started with thresholds, which then hold."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    return any(name in os.environ for name in names) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")


@cache
def _of_glibc(name: str) -> Callable[..., Any]:
    """Return a function of glibc; in its absence, one that does nothing."""
    found: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None)
    return found or (lambda *arguments: None)
