"""Makes workers late, by rules that every process evaluates alike; for `before_gradients`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from hashlib import blake2b

SLOW_HOST = "SPARKSGD_TEST_SLOW_HOST"
"""Variable that is set on a slow host."""


@dataclass(frozen=True)
class Straggler:
    """Lets one worker sleep before it computes, wherever it runs.

    Args:
        worker: which one.
        delay_s: how long.
        share: of its steps, drawn by their numbers.
    """

    worker: int
    delay_s: float
    share: float = 1.0

    def __call__(self, worker: int, step: int) -> None:
        if worker == self.worker and _drawn(step) < self.share:
            time.sleep(self.delay_s)


@dataclass(frozen=True)
class SlowHost:
    """Lets whoever runs on the slow host sleep before computing.

    Args:
        delay_s: how long.
        share: of the steps, drawn by their numbers.
    """

    delay_s: float
    share: float = 1.0

    def __call__(self, worker: int, step: int) -> None:
        if SLOW_HOST in os.environ and _drawn(step) < self.share:
            time.sleep(self.delay_s)


def _drawn(step: int) -> float:
    """Return a number in 0..1 that looks random, and is the same everywhere."""
    return int.from_bytes(blake2b(b"%d" % step, digest_size=2).digest(), "little") / 2**16
