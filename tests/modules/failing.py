"""Tasks that fail by chance, wherever they run; for `Probe.before_gradients`."""

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
        context = TaskContext.get()
        drawn = blake2b(f"{context.taskAttemptId()}".encode(), digest_size=8).digest()
        fails = int.from_bytes(drawn[:4], "little") < self.share * 2**32
        if fails and turn % self.turns == drawn[4] % self.turns:
            os.kill(os.getpid(), signal.SIGKILL)
