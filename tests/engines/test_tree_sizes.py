"""How many partial sums a worker answers with, and how many reach the driver as Spark gathers them."""

from __future__ import annotations

import pytest

from sparksgd.engines.tree import _partials


@pytest.mark.parametrize(
    ("workers", "shards", "of_a_worker", "at_the_driver"),
    [
        (1, 8, 1, 1),  # one worker adds all
        (2, 8, 1, 2),
        (4, 4, 1, 4),
        (3, 8, 2, 5),  # (0,2); (2,4) and (4,5); (5,6) and (6,8)
        (8, 8, 1, 2),  # two groups of four neighbours
        (7, 7, 1, 2),  # three groups are rounded to two: workers 0-3 and 4-6
    ],
)
def test_partial_sums_of_a_worker_and_at_the_driver(workers, shards, of_a_worker, at_the_driver):
    assert _partials(workers, shards) == (of_a_worker, at_the_driver)
