"""The target, and ratios in pairs with their intervals."""

from __future__ import annotations

import math

import pytest

from sparksgd.runs.comparing.statistics import Difference, difference, ratio_of, target_of

NEVER = math.inf


def test_the_target_is_the_median_less_the_margin() -> None:
    assert target_of([0.9, 0.96, 0.98], 0.01) == pytest.approx(0.95)
    assert target_of([-NEVER, 0.96, 0.98], 0.01) == pytest.approx(0.95)
    assert target_of([-NEVER, -NEVER, 0.98], 0.01) == -NEVER


@pytest.mark.parametrize(
    ("time", "reference", "ratio"),
    [(1.0, 4.0, 0.25), (NEVER, 4.0, NEVER), (1.0, NEVER, 0.0), (NEVER, NEVER, 1.0)],
)
def test_a_pair_without_an_end_has_a_ratio(time: float, reference: float, ratio: float) -> None:
    assert ratio_of(time, reference) == ratio


def test_pairs_cancel_what_seeds_have_in_common() -> None:
    reference = [1.0, 10.0, 100.0, 1000.0, 2.0, 20.0, 200.0, 2000.0]
    found = difference([time / 2 for time in reference], reference)
    assert (found.ratio, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.is_shown


def test_an_interval_that_contains_1_shows_nothing() -> None:
    found = difference([0.5, 2.0, 0.6, 1.8, 0.7, 1.5, 0.8, 1.2], [1.0] * 8)
    assert found.low < 1 < found.high
    assert not found.is_shown
    assert Difference(ratio=1.0, low=1.0, high=1.0).is_shown is False


def test_the_interval_is_that_of_the_order_statistics() -> None:
    """Of ten pairs, the second to the ninth enclose the median with 97.9 %; a bootstrap of it is similar."""
    found = difference([float(n) for n in range(1, 11)], [1.0] * 10)
    assert found.ratio == 5.5
    assert 2 <= found.low <= 3.5
    assert 7.5 <= found.high <= 9


def test_runs_that_never_come_widen_the_interval() -> None:
    found = difference([1.0, 1.0, 1.0, 1.0, 1.0, NEVER, NEVER, NEVER], [2.0] * 8)
    assert found.ratio == 0.5
    assert found.high == NEVER
    assert not found.is_shown
    assert difference([NEVER] * 8, [2.0] * 8) == Difference(ratio=NEVER, low=NEVER, high=NEVER)


def test_five_pairs_cannot_show_a_difference() -> None:
    found = difference([1.0] * 5, [100.0] * 5)
    assert found == Difference(ratio=0.01, low=0.0, high=NEVER)
    assert not found.is_shown
    assert difference([1.0] * 6, [100.0] * 6).is_shown
