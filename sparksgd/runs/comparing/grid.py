"""The trials of a solver: a log-grid of rates, momentum 0 or 0.9, one knob of its own.

Every solver gets the same number.  Every combination of momentum and knob is tried from the smallest rate to
the largest.  If the best trial lies at an edge of the rates, the grid is extended there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "FEWEST_RATES",
    "MOST_EXTENSIONS",
    "Settings",
    "best_of",
    "extension",
    "is_at_edge",
    "trials_of",
]

FEWEST_RATES = 2
"""How many rates each combination of momentum and knob is tried with, at least: the ends of the grid."""

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

    def text(self, knob: str | None) -> str:
        """Return the settings for people; `knob` is the name of the solver's knob, None if it has none."""
        parts = [f"lr {self.rate:g}"]
        if self.momentum is not None:
            parts.append(f"momentum {self.momentum:g}")
        if knob is not None:
            parts.append(f"{knob} {self.knob}")
        return ", ".join(parts)


def trials_of(
    ends: tuple[float, float],
    trials: int,
    momenta: Sequence[float | None] = (None,),
    knobs: Sequence[Any] = (None,),
) -> list[Settings]:
    """Return the trials: for each combination of momentum and knob, a log-grid of rates between the ends.

    If the number of combinations does not divide `trials`, some of them, spread over momenta and knobs, get a
    grid that is finer by one rate.

    Args:
        ends: the smallest and the largest rate.
        trials: how many trials; at least FEWEST_RATES for each combination.
        momenta: what is tried as momentum.
        knobs: what is tried as the knob.

    >>> [one.rate for one in trials_of((0.1, 0.4), 3)]
    [0.1, 0.2, 0.4]
    """
    share, finer = divmod(trials, len(momenta) * len(knobs))
    return [
        Settings(rate=float(f"{rate:.4g}"), momentum=momentum, knob=knob)
        for number, (momentum, knob) in enumerate(_combinations(momenta, knobs))
        for rate in np.geomspace(*ends, share + (number < finer))
    ]


def _combinations(momenta: Sequence[float | None], knobs: Sequence[Any]) -> list[tuple[float | None, Any]]:
    """Return every combination once; the first ones have momenta and knobs about equally often."""
    period = math.lcm(len(momenta), len(knobs))
    return [
        (momenta[number % len(momenta)], knobs[(number + number // period) % len(knobs)])
        for number in range(len(momenta) * len(knobs))
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
