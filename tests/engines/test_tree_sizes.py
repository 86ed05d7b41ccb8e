"""How many partial sums a step brings to the driver, in Spark's own way of gathering them."""

from __future__ import annotations

import pytest

from sparksgd.engines.tree import _partials_at_driver


@pytest.mark.parametrize(
    ("workers", "shards", "count"),
    [
        (1, 8, 1),  # one worker adds all
        (2, 8, 2),
        (4, 4, 4),
        (3, 8, 5),  # (0,2); (2,4) and (4,5); (5,6) and (6,8)
        (8, 8, 2),  # two groups of four neighbours
        (7, 7, 2),  # three groups are rounded to two: workers 0-3 and 4-6
    ],
)
def test_partial_sums_that_reach_the_driver(workers, shards, count):
    assert _partials_at_driver(workers, shards) == count
