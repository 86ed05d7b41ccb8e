"""Contiguous, balanced ranges: which shards a worker owns, and which strip of a vector."""

from __future__ import annotations

__all__ = ["balanced_range"]


def balanced_range(part: int, parts: int, count: int) -> range:
    """Return one of several contiguous ranges over `count` things; their lengths differ by at most one.

    >>> [list(balanced_range(worker, 3, 8)) for worker in range(3)]
    [[0, 1], [2, 3, 4], [5, 6, 7]]
    """
    return range(part * count // parts, (part + 1) * count // parts)
