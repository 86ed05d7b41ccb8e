"""The trials of a solver: a log-grid of rates, momentum 0 or 0.9, one knob of its own.

Every solver gets the same number.  If the best trial lies at an edge of the rates, the grid is extended
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["MOST_EXTENSIONS", "Settings", "best_of", "extension", "is_at_edge", "trials_of"]

MOST_EXTENSIONS = 6
"""How often the grid of a solver is extended."""

_LARGEST_STEP = 4.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is tuned."""

    rate: float
    momentum: float | None = None
    """None: the optimiser has none."""

    knob: Any = None
    """The value of the solver's own knob; None: it has none."""


def trials_of(
    ends: tuple[float, float],
    trials: int,
    momenta: Sequence[float | None] = (None,),
    knobs: Sequence[Any] = (None,),
) -> list[Settings]:
    """Return the trials: every combination, if their number divides `trials`, else evenly some of them.

    Args:
        ends: the smallest and the largest rate.
        trials: how many trials, 2 at least.
        momenta: what is tried as momentum.
        knobs: what is tried as the knob.

    >>> [one.rate for one in trials_of((0.1, 0.4), 3)]
    [0.1, 0.2, 0.4]
    """
    each = len(momenta) * len(knobs)
    rates = [float(f"{rate:.4g}") for rate in np.geomspace(*ends, max(2, math.ceil(trials / each)))]
    return [
        Settings(
            rate=rates[number * len(rates) // trials],
            momentum=momenta[number % len(momenta)],
            knob=knobs[number // len(momenta) % len(knobs)],
        )
        for number in range(trials)
    ]


def best_of(scores: Mapping[Settings, float]) -> Settings:
    """Return the settings of the highest score; of equal ones those with the smallest rate."""
    return max(scores, key=lambda tried: (scores[tried], -tried.rate))


def is_at_edge(scores: Mapping[Settings, float]) -> bool:
    """Return whether the best rate is the smallest or the largest that was tried."""
    rates = {tried.rate for tried in scores}
    return best_of(scores).rate in (min(rates), max(rates))


def extension(scores: Mapping[Settings, float]) -> Settings | None:
    """Return what to try next, beyond the edge where the best trial lies; None: it lies at none.

    The step is that of the grid, but not above 4.

    Args:
        scores: of what was tried, at two rates at least; higher is better.
    """
    if not is_at_edge(scores):
        return None
    best, rates = best_of(scores), sorted({tried.rate for tried in scores})
    if best.rate == rates[0]:
        rate = rates[0] / min(_LARGEST_STEP, rates[1] / rates[0])
    else:
        rate = rates[-1] * min(_LARGEST_STEP, rates[-1] / rates[-2])
    return Settings(rate=float(f"{rate:.4g}"), momentum=best.momentum, knob=best.knob)
