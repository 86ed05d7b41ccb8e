"""What the steps of a run took: medians of each part, and rows per second of the steps alone."""

from __future__ import annotations

import pytest

from sparksgd.engines.protocol import StepReport, StepTiming
from sparksgd.training.step_times import StepTimes


def report(step: int, rows: int, total: float, launch: float, aggregate: float) -> StepReport:
    timing = StepTiming(total=total, launch=launch, aggregate=aggregate)
    return StepReport(
        step=step, turn=step, epoch=1, version=step - 1, rows=rows, weight=rows, shards=1, loss=0.0, lr=0.1,
        timing=timing, workers=(), took_part=(0,),
    )  # fmt: skip


def test_medians_and_rate_of_three_steps() -> None:
    times = StepTimes()
    for step, (rows, total, launch, aggregate) in enumerate(
        [(10, 4.0, 1.0, 2.5), (10, 1.0, 0.5, 0.25), (9, 3.0, 0.75, 2.0)]
    ):
        times.add(report(step + 1, rows, total, launch, aggregate))
    assert (len(times), times.rows) == (3, 29)
    assert times.rows_per_second == pytest.approx(29 / 8)
    assert times.medians_s() == {
        "total": 3.0,
        "broadcast": 0.0,
        "launch": 0.75,
        "compute": 0.0,
        "aggregate": 2.0,
        "update": 0.0,
    }


def test_before_the_first_step_there_is_neither() -> None:
    assert StepTimes().rows_per_second is None
    assert StepTimes().medians_s() == {}
