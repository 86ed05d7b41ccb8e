"""A look: it is cut off if it hangs, its errors and the warnings that it hears become findings.

look ── findings, one by one ──> kept, whatever happens later
  ├── raises                ──> a finding that fails, with the error
  ├── takes too long        ──> its Spark jobs are cancelled; a finding that fails
  └── the library warns     ──> a finding that warns, once for each text
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from sparksgd.spark.doctor.findings import Finding, bad, broken, parted, poor, unseen

__all__ = ["Looks"]

log = logging.getLogger("sparksgd")

_LEAVES_S = 3.0
_HANGS = "see on Spark's pages, or in the logs of its executors, what it waits for"
_HEARD = "change what the line names, if a run shall not be so; it trains as it is"
_REPORT = "see the logs of the driver and the executors; if they say no more, report it"


class Looks:
    """Makes one look after the other, within a time.

    Args:
        within_s: how long all of them may take.
        cancel: ends the Spark jobs of a look.
    """

    def __init__(self, within_s: float, cancel: Callable[[], None]) -> None:
        self._until_s = time.monotonic() + within_s
        self._within_s = within_s
        self._cancel = cancel
        self._heard: set[str] = set()

    def make(
        self, name: str, look: Callable[[], Iterable[Finding]], limit_s: float, *, is_told: bool = False
    ) -> list[Finding]:
        """Make a look; return what it found.

        Args:
            name: what is looked at, for errors of the look itself.
            look: returns the findings, or yields one after the other.
            limit_s: how long it may take.
            is_told: whether its findings have what the library warns of.
        """
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            return [unseen(name, f"the {self._within_s:.0f} s of --within were over")]
        found, errors = list[Finding](), list[BaseException]()

        def work() -> None:
            try:
                found.extend(look())
            except BaseException as error:
                errors.append(error)

        with self._hearing() as heard:
            thread = threading.Thread(target=work, name="sparksgd-look", daemon=True)
            thread.start()
            thread.join(min(left_s, limit_s))
            is_late = thread.is_alive()
            if is_late:
                self._cancel()
                thread.join(_LEAVES_S)
        if is_late:
            found = found[:]  # the thread may go on
            late = (
                unseen(name, f"it was not finished within the {self._within_s:.0f} s of --within")
                if left_s < limit_s
                else bad(name, f"it was not finished after {limit_s:.0f} s, and was cut off", _HANGS)
            )
            found.append(late)
        elif errors:
            found.append(broken(name, errors[0], _REPORT))
        return found if is_told else [*found, *(_warned(name, text) for text in heard)]

    @contextmanager
    def _hearing(self) -> Iterator[list[str]]:
        heard: list[str] = []

        def hear(record: logging.LogRecord) -> bool:
            text = record.getMessage()
            if record.levelno >= logging.WARNING and text not in self._heard:
                self._heard.add(text)
                heard.append(text)
            return False  # nobody else shows it

        log.addFilter(hear)
        try:
            yield heard
        finally:
            log.removeFilter(hear)


def _warned(name: str, text: str) -> Finding:
    seen, advice = parted(text)
    return poor(name, seen, advice or _HEARD)
