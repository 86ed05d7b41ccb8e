"""The target, ratios in pairs, and their intervals.

    target = median of the scores of the tuned run in one process - margin
    r_i    = time of a solver with seed i / time of the reference with seed i
    ratio  = median of r_i

A time is infinite where the target was not reached.  If both are, the pair says nothing: r_i = 1.
The interval is of 95 %, by bootstrap: pairs are drawn with replacement.  Of n pairs the smallest and the
largest enclose the median with a probability of 1 - 2 ** (1 - n), which is below 95 % for n < 6.  So fewer
pairs have the interval from 0 to infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FEWEST_PAIRS", "Difference", "difference", "ratio_of", "target_of"]

FEWEST_PAIRS = 6
_SAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The ratio of a solver's times to the reference's, with its interval."""

    ratio: float
    low: float
    high: float

    @property
    def is_shown(self) -> bool:
        """Return whether the interval lies on one side of 1."""
        return not self.low <= 1 <= self.high


def target_of(scores: Sequence[float], margin: float) -> float:
    """Return the target; -infinity if most of these runs diverged."""
    return float(np.median(scores)) - margin


def difference(times: Sequence[float], reference: Sequence[float], seed: int = 0) -> Difference:
    """Return the median ratio of times in pairs, and its interval.

    Args:
        times: of a solver, for each seed; above 0, infinite if it did not reach the target.
        reference: of the reference, for the same seeds.
        seed: of the bootstrap.

    >>> difference([1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], [4.0] * 8).ratio
    0.5
    """
    ratios = np.array([ratio_of(*pair) for pair in zip(times, reference, strict=True)])
    ratio = float(np.median(ratios))
    if len(ratios) < FEWEST_PAIRS:
        return Difference(ratio=ratio, low=0.0, high=math.inf)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (_SAMPLES, len(ratios)))
    medians = np.sort(np.median(ratios[drawn], axis=1))
    low, high = medians[int(0.025 * _SAMPLES)], medians[int(0.975 * _SAMPLES)]
    return Difference(ratio=ratio, low=float(low), high=float(high))


def ratio_of(time: float, reference: float) -> float:
    """Return the ratio of a pair of times; 1 if both are infinite."""
    if math.isinf(reference):
        return 1.0 if math.isinf(time) else 0.0
    return time / reference
