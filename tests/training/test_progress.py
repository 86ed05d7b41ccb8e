"""What a run logs while it trains; the time is virtual."""

from __future__ import annotations

import logging
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from sparksgd.training.progress import ProgressLines


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sparksgd")
    return caplog


def told(lines: ProgressLines, turn: int, *, rows: int = 60, step_s: float = 0.5) -> None:
    training: Any = SimpleNamespace(total_turns=100)
    report: Any = SimpleNamespace(
        step=turn, turn=turn, epoch=2, loss=0.25, rows=rows, timing=SimpleNamespace(total=step_s)
    )
    lines.stepped(training, report)


def test_a_line_comes_at_most_every_ten_seconds(log: pytest.LogCaptureFixture) -> None:
    lines = ProgressLines(clock=count(0, 4).__next__)  # 0 when it is made, then 4, 8, 12, ... after each step
    for turn in range(41, 49):
        told(lines, turn)
    assert log.messages == [
        "turn 43 of 100, epoch 2, loss 0.2500, 120 rows/s",
        "turn 46 of 100, epoch 2, loss 0.2500, 120 rows/s",
    ]


def test_the_rate_follows_the_last_steps_and_begins_with_the_first_also_of_a_run_that_goes_on() -> None:
    lines = ProgressLines()
    assert lines.rows_per_s == 0
    told(lines, 41)
    assert lines.rows_per_s == 120
    told(lines, 42, step_s=0.25)
    assert lines.rows_per_s == pytest.approx(0.95 * 120 + 0.05 * 240)


def test_steps_are_not_told_of_where_a_bar_shows_them(log: pytest.LogCaptureFixture) -> None:
    lines = ProgressLines(of_steps=False, clock=count(0, 60).__next__)
    told(lines, 1)
    assert log.messages == []
