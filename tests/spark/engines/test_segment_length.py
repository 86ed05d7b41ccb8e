"""A segment is as long as its start and end are cheap, but no longer than progress can wait."""

from __future__ import annotations

import pytest

from sparksgd.spark.engines.allreduce import next_length


@pytest.mark.parametrize(
    ("steps", "step_s", "overhead_s", "expected"),
    [
        pytest.param(4, 0.02, 0.05, 32, id="at most eight times the last one"),
        pytest.param(32, 0.02, 0.05, 150, id="three seconds where start and end are cheap"),
        pytest.param(150, 0.02, 0.2, 333, id="a state that comes back slowly makes it longer"),
        pytest.param(333, 0.02, 5.0, 500, id="no longer than ten seconds"),
        pytest.param(4, 20.0, 0.1, 1, id="one step at least"),
        pytest.param(500, 0.04, 0.05, 75, id="shorter again when steps get slower"),
    ],
)
def test_the_next_segment(steps: int, step_s: float, overhead_s: float, expected: int) -> None:
    assert next_length(steps, step_s, overhead_s) == expected
