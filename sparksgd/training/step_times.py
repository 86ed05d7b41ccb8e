"""How long the steps of a run took, in few bytes per step, because nightly runs make millions."""

from __future__ import annotations

import statistics
from array import array
from dataclasses import astuple, fields

from sparksgd.engines.protocol import StepReport, StepTiming

__all__ = ["StepTimes"]


class StepTimes:
    """The seconds of each part of every step, 8 bytes each, and the rows of all."""

    def __init__(self) -> None:
        self.rows = 0
        self._seconds = {part.name: array("d") for part in fields(StepTiming)}

    def __len__(self) -> int:
        return len(self._seconds["total"])

    def add(self, report: StepReport) -> None:
        """Note a step."""
        self.rows += report.rows
        for seconds, taken in zip(self._seconds.values(), astuple(report.timing), strict=True):
            seconds.append(taken)

    @property
    def rows_per_second(self) -> float | None:
        """Rows of all steps over the seconds of the steps alone; None before the first."""
        total = sum(self._seconds["total"])
        return self.rows / total if total else None

    def medians_s(self) -> dict[str, float]:
        """Return the median seconds of each part of a step; empty before the first step."""
        return {name: statistics.median(seconds) for name, seconds in self._seconds.items() if seconds}
