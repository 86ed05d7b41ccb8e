"""What the arms of the benchmark share: their task, their blocks of timed steps, and the model.

An *arm* is one way to make the same training step.  Each runs in a process of its own, with a Spark
session of its own, and answers with *blocks*: steps made in a row, each timed by the wall clock.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

__all__ = [
    "EMPTY_JOB",
    "LEARNING_RATE",
    "LENET",
    "LENET_PARAMETERS",
    "MODELS",
    "MOMENTUM",
    "OWN_EMPTY_JOB",
    "Block",
    "Task",
    "answer",
    "percentile",
]

LENET: dict[str, Any] = {"maps": [20, 50], "hidden": 500, "padding": 0}
LENET_PARAMETERS = 431_080
MODELS: dict[str, dict[str, Any]] = {"431,080 parameters": LENET, "1,663,370 parameters": {}}
LEARNING_RATE = 0.01
MOMENTUM = 0.9

EMPTY_JOB = "empty job"
OWN_EMPTY_JOB = "empty job on its workers"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an arm is asked to do."""

    data: str
    """Parquet of the training rows: image (784 bytes), label."""

    num_workers: int
    """Spark tasks of a step."""

    rows_per_step: int
    """Rows of all workers together."""

    warmup_steps: int
    """Steps before the first timed one: JVM and Python workers start slowly."""

    block_steps: int
    """Steps of a block."""

    blocks: int
    """Blocks to time."""

    master: str | None = None
    """Spark's; None: this machine's cores, as many as workers."""

    plain_session: bool = False
    """Whether the Spark session is one with nothing set by us."""

    overlap: str = "auto"
    """Whether the all-reduce engine's sums begin before gradients are whole."""

    shards_per_worker: tuple[int, ...] = (1,)
    """How finely the rows are dealt; more than one value: a training of each, in turns."""

    sizes: tuple[tuple[str, int, int], ...] = ()
    """Models by name, rows of each worker's step, steps of a block: one training of each."""

    @classmethod
    def read(cls, path: Path) -> Task:
        """Read a task as JSON."""
        values = json.loads(path.read_text())
        values["shards_per_worker"] = tuple(values["shards_per_worker"])
        values["sizes"] = tuple((name, rows, steps) for name, rows, steps in values["sizes"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Steps, or empty jobs, made in a row."""

    what: str
    """What was timed."""

    rows_per_step: int
    """Rows that took part in each; 0 for an empty job."""

    step_s: tuple[float, ...]
    """Wall-clock of each."""

    compute_s: tuple[float, ...] = ()
    """The slowest worker's own work in each, where it is known."""

    sent_share: float | None = None
    """Bytes that a worker sent in a step, of the 2 (W - 1) / W gradients that it has to."""

    @property
    def overhead_s(self) -> float:
        """Median of step time minus the slowest worker's compute."""
        return median(step - compute for step, compute in zip(self.step_s, self.compute_s, strict=True))

    @property
    def rows_per_second(self) -> float:
        """Rows of the block over its wall-clock."""
        return self.rows_per_step * len(self.step_s) / sum(self.step_s)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Block:
        """Return the block that `asdict` turned into a dict."""
        return cls(**values)


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least this share of the values do not exceed.

    >>> percentile([3.0, 1.0, 2.0], 0.5), percentile([3.0, 1.0, 2.0], 0.99)
    (2.0, 3.0)
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def answer(measure: Callable[[Task], list[Block]]) -> None:
    """Run as an arm's process: `arm.py TASK.json BLOCKS.json`."""
    task_path, blocks_path = map(Path, sys.argv[1:])
    blocks = measure(Task.read(task_path))
    blocks_path.write_text(json.dumps([asdict(block) for block in blocks]))
