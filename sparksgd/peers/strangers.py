"""Connections of strangers: all of them are counted, and a flood of them does not fill the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from sparksgd.storage import Throttle

__all__ = ["StrangersLog"]

log = logging.getLogger("sparksgd")

_SAID_EVERY_S = 60.0
_MOST_DOORS = 8


class StrangersLog:
    """Logs who was not let in: one line a minute at most, with the numbers since the line before.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._unsaid: dict[str, Counter[str]] = {}
        """Who was dropped since the last line: by the door where it knocked, and by the reason."""
        self._lines = Throttle(_SAID_EVERY_S, 1.0, clock)

    def note(self, door: str, dropped: Counter[str]) -> None:
        """Count connections that were dropped.

        Args:
            door: whose listener dropped them, as "worker 3".
            dropped: how many, by the reason.
        """
        if dropped.total():
            self._unsaid.setdefault(door, Counter()).update(dropped)

    def say(self, *, is_last: bool = False) -> None:
        """Log what was counted since the last line, if it is time to; at the end of the run it always is."""
        if not self._unsaid or not (is_last or self._lines.is_due()):
            return
        with self._lines.done():
            total = sum(dropped.total() for dropped in self._unsaid.values())
            doors = sorted(self._unsaid.items(), key=lambda item: -item[1].total())
            told = [
                f"{dropped.total():,} to {door} ({_reasons(dropped)})"
                for door, dropped in doors[:_MOST_DOORS]
            ]
            if len(doors) > _MOST_DOORS:
                told.append(f"the others to {len(doors) - _MOST_DOORS} more workers")
            log.warning("%s connections of strangers were dropped: %s", f"{total:,}", ", ".join(told))
        self._unsaid.clear()


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in sorted(dropped.items()))
