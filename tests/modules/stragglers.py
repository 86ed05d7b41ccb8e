"""Makes workers late, by a rule that every process evaluates alike; for `before_gradients`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class Straggler:
    """Lets one worker sleep before it computes.

    Args:
        worker: which one.
        delay_s: how long.
        share: of its steps, drawn by their numbers.
    """

    worker: int
    delay_s: float
    share: float = 1.0

    def __call__(self, worker: int, step: int) -> None:
        drawn = blake2b(b"%d" % step, digest_size=2).digest()
        if worker == self.worker and int.from_bytes(drawn, "little") / 2**16 < self.share:
            time.sleep(self.delay_s)
