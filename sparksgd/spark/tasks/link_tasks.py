"""What executors run to measure the connections between them.

No pyspark at module level: executors import this as it is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sparksgd.errors import ClusterError
from sparksgd.peers.links import Link, measured_links
from sparksgd.peers.mesh import Meeting

__all__ = ["Measured", "measure", "measured_here"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process measured."""

    worker: int
    host: str
    links: tuple[Link, ...] = ()

    failure: ClusterError | None = None
    """What was in the way."""


def measure(meeting: Meeting, workers: Iterable[int]) -> Iterator[Measured]:
    """Task: measure the connections of the worker whose number is this partition's only element."""
    (worker,) = workers
    yield measured_here(meeting, worker)


def measured_here(meeting: Meeting, worker: int) -> Measured:
    """Return what this process measures; errors are values."""
    host = os.environ.get("NM_HOST") or socket.gethostname()  # YARN's name of this node
    try:
        return Measured(worker=worker, host=host, links=tuple(measured_links(meeting, worker)))
    except ClusterError as error:
        return Measured(worker=worker, host=host, failure=error)
