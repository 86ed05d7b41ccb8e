"""Tasks and turns that fail by chance, wherever they run; for `Probe.before_gradients`."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from hashlib import blake2b

from pyspark import TaskContext


@dataclass(frozen=True)
class FailingTasks:
    """Kills the Python worker of each task with some probability; each attempt draws anew.

    Args:
        share: of all tasks.
        turns: a task that is to fail does so in one of its first turns, of which there are so many.
    """

    share: float
    turns: int = 1

    def __call__(self, worker: int, turn: int) -> None:
        drawn = _drawn(TaskContext.get().taskAttemptId())
        if _is_below(self.share, drawn) and turn % self.turns == drawn[4] % self.turns:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FailingTurns:
    """Kills the Python worker of a task with some probability before each turn; each attempt draws anew.

    Args:
        share: of all turns.
    """

    share: float

    def __call__(self, worker: int, turn: int) -> None:
        if _is_below(self.share, _drawn(TaskContext.get().taskAttemptId(), turn)):
            os.kill(os.getpid(), signal.SIGKILL)


def _drawn(*of: int) -> bytes:
    return blake2b(" ".join(map(str, of)).encode(), digest_size=8).digest()


def _is_below(share: float, drawn: bytes) -> bool:
    return int.from_bytes(drawn[:4], "little") < share * 2**32
