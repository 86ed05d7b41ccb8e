"""The trials of a solver: a grid, every combination once, and what extends it."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from sparksgd.runs.comparing.grid import Settings, best_of, extension, trials_of


def test_twelve_trials_are_every_combination_once() -> None:
    trials = trials_of((0.01, 0.16), 12, (0.0, 0.9), ("a", "b"))
    every = product([0.01, 0.04, 0.16], [0.0, 0.9], ["a", "b"])
    assert Counter(trials) == Counter(Settings(rate=r, momentum=m, knob=k) for r, m, k in every)


def test_without_a_knob_the_grid_of_rates_is_finer() -> None:
    trials = trials_of((0.01, 0.32), 12, (0.0, 0.9))
    assert sorted({one.rate for one in trials}) == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]


@pytest.mark.parametrize("trials", [28, 30, 31, 41, 42, 64])
@pytest.mark.parametrize("knobs", [1, 2, 5, 7])
def test_every_combination_gets_its_share_of_rates(trials: int, knobs: int) -> None:
    found = trials_of((0.01, 0.32), trials, (0.0, 0.9), range(knobs))
    assert len(found) == len(set(found)) == trials
    shares = Counter((one.momentum, one.knob) for one in found)
    assert shares.keys() == set(product((0.0, 0.9), range(knobs)))
    assert set(shares.values()) <= {trials // (2 * knobs), -(-trials // (2 * knobs))}
    for momentum, knob in shares:
        rates = [one.rate for one in found if (one.momentum, one.knob) == (momentum, knob)]
        assert (min(rates), max(rates)) == (0.01, 0.32)


@pytest.mark.parametrize("knobs", [2, 4, 5])
def test_finer_grids_are_spread_over_momenta_and_knobs(knobs: int) -> None:
    found = trials_of((0.01, 0.32), 4 * knobs + knobs, (0.0, 0.9), range(knobs))
    for of in (Counter(one.momentum for one in found), Counter(one.knob for one in found)):
        assert max(of.values()) - min(of.values()) <= 1


def scores(*of_rates: tuple[float, float]) -> dict[Settings, float]:
    return {Settings(rate=rate, momentum=0.9, knob="a"): score for rate, score in of_rates}


def test_a_best_within_the_grid_ends_the_tuning() -> None:
    assert extension(scores((0.1, 0.5), (0.2, 0.9), (0.4, 0.6))) is None


def test_a_best_at_an_edge_is_followed_beyond_it() -> None:
    up = extension(scores((0.1, 0.5), (0.2, 0.6), (0.4, 0.9)))
    assert up == Settings(rate=0.8, momentum=0.9, knob="a")
    down = extension(scores((0.1, 0.9), (0.2, 0.6), (0.4, 0.5)))
    assert down == Settings(rate=0.05, momentum=0.9, knob="a")


def test_a_coarse_grid_is_extended_by_small_steps() -> None:
    up = extension(scores((0.01, 0.5), (0.32, 0.9)))
    assert up is not None
    assert up.rate == 1.28


def test_where_all_diverged_smaller_rates_follow() -> None:
    nothing = float("-inf")
    tried = scores((0.4, nothing), (0.1, nothing), (0.2, nothing))
    assert best_of(tried).rate == 0.1
    down = extension(tried)
    assert down is not None
    assert down.rate == 0.05
