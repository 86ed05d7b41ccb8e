"""How the time from the submission to the first step was spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

__all__ = ["StartUp", "warn_of_start"]

log = logging.getLogger("sparksgd")

Span = tuple[float, float]
"""Beginning and end, seconds since the epoch."""


class StartUp:
    """Seconds of each part of a start; together they are the whole start.

        submit        until there is a Spark session; on YARN it waits up to 3 s for containers
        containers    until there are enough slots for the workers
        shards        until all rows are checked and dealt
        first_step    until the first steps are made
        environment   while a shipped environment was unpacked; that is during the first two parts, and is
                      subtracted from them

    Args:
        since_s: when the run was submitted; None: now.
        clock: returns seconds since the epoch, which other processes share.
    """

    def __init__(self, since_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._began_s = self._since_s = clock() if since_s is None else since_s
        self._parts: dict[str, Span] = {}
        self._unpacking: list[Span] = []

    def reached(self, part: str) -> None:
        """Note that a part has ended, and the next begins; only the first call for a part counts."""
        if part not in self._parts:
            now_s = self._clock()
            self._parts[part] = self._since_s, now_s
            self._since_s = now_s

    def elapsed_s(self) -> float:
        """Return the seconds since the submission."""
        return self._clock() - self._began_s

    def unpacked(self, spans: Iterable[Span]) -> None:
        """Note when hosts unpacked an environment."""
        self._unpacking += spans

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part that has ended.

        >>> times = iter([4.0, 10.0])
        >>> start = StartUp(0.0, lambda: next(times))
        >>> start.reached("submit"), start.reached("containers"), start.unpacked([(3.0, 6.0), (5.0, 8.0)])
        (None, None, None)
        >>> start.seconds()
        {'submit': 3.0, 'containers': 2.0, 'environment': 5.0}
        """
        if not self._parts:
            return {}
        ends = [end for _, end in self._parts.values()]
        began = next(iter(self._parts.values()))[0]
        unpacking = _merged((max(start, began), min(end, max(ends))) for start, end in self._unpacking)
        found = {
            part: end - start - sum(_overlap((start, end), span) for span in unpacking)
            for part, (start, end) in self._parts.items()
        }
        if unpacking:
            found["environment"] = sum(end - start for start, end in unpacking)
        return found


def warn_of_start(start_up: StartUp, limit_s: float, steps: int) -> None:
    """Warn where a start took more than half of the time that a run had.

    Args:
        start_up: what was reached.
        limit_s: the time, from the submission.
        steps: how many steps were made in it.
    """
    parts = {part: took_s for part, took_s in start_up.seconds().items() if part != "first_step"}
    began_s = sum(parts.values())
    if began_s > limit_s / 2:
        log.warning(
            "train.max_wall_s is %g, and counts from the submission: the start took %.1f s (%s), so %d steps "
            "were made. Raise train.max_wall_s",
            limit_s,
            began_s,
            ", ".join(f"{part} {took_s:.1f}" for part, took_s in parts.items()),
            steps,
        )


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Merge spans that overlap; empty ones are left out."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _overlap(one: Span, other: Span) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
