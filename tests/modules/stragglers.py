"""Makes workers late, by rules that every process evaluates alike; for `Probe.before_gradients`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

SLOW_HOST = "SPARKSGD_TEST_SLOW_HOST"
"""Variable that is set on a slow host."""


@dataclass(frozen=True)
class HeldBack:
    """Holds one worker back, before it computes, until its step has been made without it.

    It does so from the first step on: after one of which another worker was late, who is still busy, nobody
    would make up for this one.  A `StepsMade` of spark_helpers.py, which observes the run, says which steps
    were made.

    Args:
        worker: which one.
        made: the file that holds the number of the last step.
        steps: how many steps; None for all.
    """

    worker: int
    made: str
    steps: int | None = None

    def __call__(self, worker: int, step: int) -> None:
        if worker == self.worker and (self.steps is None or step < self.steps):
            while not self._is_made(step + 1):
                time.sleep(0.005)  # the driver writes a file; nobody tells of that

    def _is_made(self, number: int) -> bool:
        try:
            return int(Path(self.made).read_text()) >= number
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class HeldUntil:
    """Holds all workers back, from a turn on, until so many processes have made turns.

    Args:
        folder: where each process leaves its number.
        processes: how many, with the successors of those that are lost.
        turn: from which one on.
    """

    folder: str
    processes: int
    turn: int

    def __call__(self, worker: int, turn: int) -> None:
        Path(self.folder, str(os.getpid())).touch()
        while turn >= self.turn and len(list(Path(self.folder).iterdir())) < self.processes:
            time.sleep(0.005)


@dataclass(frozen=True)
class HeldWhile:
    """Holds all workers back, from a turn on, while a file is there.

    Args:
        named_in: a file that says which one.
        turn: from which one on.
    """

    named_in: str
    turn: int

    def __call__(self, worker: int, turn: int) -> None:
        while turn >= self.turn and Path(Path(self.named_in).read_text()).exists():
            time.sleep(0.005)


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
