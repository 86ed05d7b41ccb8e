"""What checkpoints cost: steps per second with them and without, in turns.

    python tests/bench/checkpoints.py [--size PARAMETERS] [--every-s 10] [--seconds 60] [--turns 3]

All-reduce with two workers of 64 rows and momentum, of a net with two hidden layers; each turn is a training
of its own in one session, and both write the same folder otherwise.  A run has a checkpoint every minute by
default: --every-s makes them more frequent, so that a turn has several.  A size that takes more memory than
this machine has is refused, and the refusal is what the table shows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest import mock

from pyspark.sql import SparkSession
from rich.console import Console
from rich.table import Table

from sparksgd.config import Config
from sparksgd.engines.protocol import StepReport
from sparksgd.errors import OutOfMemory
from sparksgd.runs.checkpoints import CheckpointFolder
from sparksgd.runs.earlier import Found
from sparksgd.runs.folder import RunFolder
from sparksgd.spark.session import start_session
from sparksgd.spark.train import train
from sparksgd.training.state import Observer, Training

TESTS = Path(__file__).resolve().parent.parent
SIZES = (431_080, 25_000_000, 133_000_000)
_ROWS = 4096
_WARM_UP_S = 5.0
_WRITE = CheckpointFolder.write


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One training."""

    parameters: int
    has_checkpoints: bool
    steps_per_second: float
    checkpoints: int
    """How many were written, without that of the end."""


class Stopwatch(Observer):
    """Counts steps after a warm-up, and ends the training.

    Args:
        seconds: how long it counts.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begun_s: float | None = None
        self._started_s = self._now_s = 0.0
        self.steps = 0

    def started(self, training: Training) -> None:
        """Start the clock."""
        self._started_s = time.perf_counter()

    def stepped(self, training: Training, report: StepReport) -> None:
        """Count a step."""
        self._now_s = time.perf_counter()
        if self._begun_s is None:
            if self._now_s - self._started_s >= _WARM_UP_S:
                self._begun_s = self._now_s
            return
        self.steps += 1
        if self._now_s - self._begun_s >= self._seconds:
            training.stop("the turn is over")

    @property
    def steps_per_second(self) -> float:
        """Steps that were counted, over their time."""
        assert self._begun_s is not None, "it ended in its warm-up"
        return self.steps / (self._now_s - self._begun_s)


def main(argv: Sequence[str]) -> int:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, action="append", metavar="PARAMETERS", help="repeatable")
    parser.add_argument("--every-s", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3, help="of each kind")
    parser.add_argument("--out", type=Path, default=Path("checkpoints.json"), metavar="FILE")
    options = parser.parse_args(argv)
    modules = str(TESTS / "modules")
    sys.path.insert(0, modules)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), modules]),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_SUBMIT_ARGS": "--master local[2] --driver-memory 4g pyspark-shell",
    }
    session = start_session("sparksgd benchmark", Config().train)
    turns: list[Turn] = []
    table = Table(title=f"Steps a second; a checkpoint every {options.every_s:g} s", title_justify="left")
    for name in ("parameters", "without", "with", "ratio", "checkpoints a turn"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory(prefix="sgd-") as temporary:
        rows = str(Path(temporary, "rows"))
        columns = "array_repeat(id % 251, 16) as features", "id % 4 as label"
        session.range(_ROWS).selectExpr(*columns).write.parquet(rows)
        for size in options.size or SIZES:
            try:
                pairs = [
                    sorted(
                        (_turn(session, rows, Path(temporary, "run"), size, every_s, options.seconds)
                         for every_s in (None, options.every_s)[:: -1 if number % 2 else 1]),
                        key=lambda turn: turn.has_checkpoints,
                    )
                    for number in range(options.turns)
                ]  # fmt: skip
            except OutOfMemory as error:
                table.add_row(f"{size:,}", str(error))
                continue
            turns += [turn for pair in pairs for turn in pair]
            ratio = median(last.steps_per_second / first.steps_per_second for first, last in pairs)
            speeds = (median(turn.steps_per_second for turn in kind) for kind in zip(*pairs, strict=True))
            taken = median(pair[1].checkpoints for pair in pairs)
            table.add_row(f"{size:,}", *(f"{speed:.2f}" for speed in speeds), f"{ratio:.3f}", f"{taken:g}")
    Console().print(table)
    options.out.write_text(json.dumps([asdict(turn) for turn in turns], indent=2) + "\n")
    return 0


def _turn(
    session: SparkSession, rows: str, out: Path, size: int, every_s: float | None, seconds: float
) -> Turn:
    """Make one training."""
    config = Config.load(
        None,
        [
            "model.name=wide_nets:wide", f"model.parameters={size}", "optimizer.lr=0.001",
            "optimizer.momentum=0.9", "train.rows_per_step=128", "train.num_shards=2", "train.epochs=100000",
            "engine.name=allreduce", "engine.num_workers=2", f"checkpoint.every_s={every_s or 1e6}",
        ],
    )  # fmt: skip
    folder, watch = RunFolder(out), Stopwatch(seconds)
    with folder.held(), mock.patch.object(CheckpointFolder, "write", autospec=True) as write:
        write.side_effect = _WRITE
        checkpoints = None if every_s is None else folder.checkpoints(config, Found())
        training = train(
            session, config, session.read.parquet(rows), observers=[folder, watch], checkpoints=checkpoints
        )
    return Turn(
        parameters=training.flat.parameters.numel(),
        has_checkpoints=every_s is not None,
        steps_per_second=watch.steps_per_second,
        checkpoints=max(0, write.call_count - 1),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
