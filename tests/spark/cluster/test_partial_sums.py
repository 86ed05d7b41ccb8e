"""How many partial sums reach the driver, in one result and in all, as Spark gathers them."""

from __future__ import annotations

import pytest

from sparksgd.spark.cluster.memory import partial_sums


@pytest.mark.parametrize(
    ("workers", "shards", "in_one", "in_all"),
    [
        (1, 8, 1, 1),  # one worker adds all
        (2, 8, 1, 2),
        (4, 4, 1, 4),
        (3, 8, 2, 5),  # (0,2); (2,4) and (4,5); (5,6) and (6,8)
        (8, 8, 1, 2),  # two groups of four neighbours
        (7, 7, 1, 2),  # three groups are rounded to two: workers 0-3 and 4-6
    ],
)
def test_partial_sums_that_reach_the_driver(workers, shards, in_one, in_all):
    assert partial_sums(workers, shards) == (in_one, in_all)
