"""What runs were said to take of memory, and what they took at their peaks.

    python tests/bench/memory_said.py [--case ENGINE:PARAMETERS:OPTIMISER[:SHARDS]] [--out FILE]

Each case is a short training in a process and a session of its own: two executors, each with a worker, on
this machine.  Said is what engines/memory.py says.  Of Python processes the kernel tells the peak.  Heaps
have no peak but what they are given: a second training must do with heaps as large as was said, or with the
least that Spark takes.  The exit status is 1 if a peak is above what was said, or more than a fifth below it,
or if a heap was too small.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
ENGINES = {
    "inline": ["engine.name=inline"],
    "tree": ["engine.name=tree"],
    "stages": ["engine.name=tree", "engine.barrier=false"],
    "allreduce": ["engine.name=allreduce", "engine.segment_steps=4"],
    "server": ["engine.name=server", "solver.name=async_sgd"],
}
OPTIMISERS = {
    "sgd": ["optimizer.name=SGD", "optimizer.lr=0.01"],
    "momentum": ["optimizer.name=SGD", "optimizer.lr=0.01", "optimizer.momentum=0.9"],
    "adam": ["optimizer.name=Adam", "optimizer.lr=0.001"],
}
_SIZES = ("431e3", "10e6", "25e6")
CASES = [
    *(f"inline:{size}:{optimiser}" for size in _SIZES for optimiser in ("momentum", "adam")),
    *(f"{engine}:{size}:momentum" for engine in list(ENGINES)[1:] for size in _SIZES),
    "allreduce:10e6:adam", "allreduce:25e6:momentum:2", "tree:25e6:adam:8", "inline:133e6:sgd",
]  # fmt: skip
MOST_BELOW = 1.2
LEAST_HEAP_MIB = 512
_STEPS = 12
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What one kind of process of a case took."""

    case: str
    process: str
    measured_mib: float
    """Of heaps what they were given; infinity if that was too little."""

    said_mib: float

    @property
    def ratio(self) -> float:
        """What was said, over what was measured."""
        return self.said_mib / self.measured_mib

    @property
    def is_right(self) -> bool:
        """Whether it was said, and not far too much of it; of a heap, whether it was enough."""
        return self.measured_mib < math.inf if "heap" in self.process else 1 <= self.ratio <= MOST_BELOW


def main(argv: Sequence[str]) -> int:
    """Measure the cases, each in a process of its own; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", action="append", metavar="CASE", help="repeatable; without it, all")
    parser.add_argument("--out", type=Path, default=Path("memory-said.json"), metavar="FILE")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--heaps", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        if options.one.startswith("inline"):
            peaks = _inline(options.one)
        else:
            peaks = _on_spark(options.one, options.heaps and tuple(options.heaps))
        options.out.write_text(json.dumps([asdict(peak) for peak in peaks]))
        return 0
    found: list[Peak] = []
    with tempfile.TemporaryDirectory(prefix="sgd-") as temporary:
        for case in options.case or CASES:
            measured = _measured(case, Path(temporary))
            heaps = [peak for peak in measured if "heap" in peak.process]
            found += [peak for peak in measured if peak not in heaps]
            if heaps:
                given = (max(LEAST_HEAP_MIB, math.ceil(peak.said_mib)) for peak in heaps)
                found += _measured(case, Path(temporary), "--heaps", *map(str, given))
            print(case, file=sys.stderr)
    Console().print(_table(found))
    options.out.write_text(json.dumps([asdict(peak) for peak in found], indent=2) + "\n")
    return 0 if all(peak.is_right for peak in found) else 1


def _measured(case: str, temporary: Path, *options: str) -> list[Peak]:
    """Measure a case in a process of its own."""
    answer = temporary / "peaks"
    command = [sys.executable, __file__, "--one", case, "--out", str(answer), *options]
    path = [str(ROOT), str(TESTS / "modules"), str(TESTS / "spark")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return [Peak(**peak) for peak in json.loads(answer.read_text())]


def _config(case: str) -> Any:  # the package is imported in the process of the case alone
    from sparksgd.config import Config

    engine, parameters, optimiser, *shards = case.split(":")
    return Config.load(
        None,
        [
            "model.name=wide_nets:wide", f"model.parameters={int(float(parameters))}",
            "train.rows_per_step=64", f"train.num_shards={shards[0] if shards else 4}",
            f"train.steps={_STEPS}", "train.epochs=99", "engine.num_workers=2",
            *ENGINES[engine], *OPTIMISERS[optimiser],
        ],
    )  # fmt: skip


def _inline(case: str) -> list[Peak]:
    """Measure a training in this process, Python and torch included."""
    from spark_helpers import write_rows

    from sparksgd.engines import memory
    from sparksgd.engines.inline import InlineEngine
    from sparksgd.engines.kinds import INLINE
    from sparksgd.training.in_process import train_in_process

    said: list[int] = []
    rows = write_rows(Path(tempfile.mkdtemp()) / "rows", 300)
    import pyspark  # noqa: F401  # as a process of a user has it

    def listen(sizes: memory.RunSizes, num_shards: int) -> None:
        said.append(memory.total(memory.takes(INLINE, sizes).driver_python))

    _forget("self")
    with mock.patch.object(InlineEngine, "check_memory", staticmethod(listen)):
        train_in_process(_config(case), rows)
    return [_peak(case, "driver's Python", _bytes("self"), said[0])]


def _on_spark(case: str, heaps_mib: tuple[int, int] | None = None) -> list[Peak]:
    """Measure a training on two executors.

    Args:
        case: which.
        heaps_mib: of the driver and of each executor; None: enough, and what is measured is Python.
    """
    driver_mib, executor_mib = heaps_mib or (4096, 2048)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ["PYSPARK_SUBMIT_ARGS"] = f"--driver-memory {driver_mib}m pyspark-shell"

    from pyspark.sql import SparkSession
    from spark_helpers import with_descendants, write_rows

    from sparksgd.config import TrainConfig
    from sparksgd.engines.memory import Takes, total
    from sparksgd.errors import OutOfMemory
    from sparksgd.spark import session as sessions
    from sparksgd.spark import train as trainings
    from sparksgd.training.state import Observer, Training

    master = f"local-cluster[2,1,{executor_mib}]"
    builder = SparkSession.builder.master(master).config("spark.ui.enabled", "false")
    for setting in sessions.wanted_settings(TrainConfig()):
        builder = builder.config(setting.key, setting.value)
    builder = builder.config("spark.driver.maxResultSize", "8g")
    spark = builder.config("spark.executor.memory", f"{executor_mib}m").getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    rows = spark.read.parquet(write_rows(Path(tempfile.mkdtemp()) / "rows", 300))
    said: list[Takes] = []
    asked = trainings.require_memory
    workers: list[int] = []

    def listen(*given: Any) -> Takes:
        said.append(asked(*given))
        return said[-1]

    class Look(Observer):
        """Reads the workers' peaks while they live."""

        def ended(self, training: Training) -> None:
            for process in with_descendants([os.getpid()]):
                if b"pyspark.daemon" in Path(f"/proc/{process}/cmdline").read_bytes():
                    workers.append(_bytes(process))

    _forget("self")
    is_enough = True
    with mock.patch.object(trainings, "require_memory", listen):
        try:
            trainings.train(spark, _config(case), rows, observers=[Look()])
        except OutOfMemory as error:
            print(error, file=sys.stderr)
            if heaps_mib is None:
                raise
            is_enough = False
    peak, takes = _bytes("self"), said[0]
    spark.stop()
    heaps = {"driver's heap": total(takes.driver_heap), "an executor's heap": total(takes.executor_heap)}
    if heaps_mib is None:
        return [
            _peak(case, "driver's Python", peak, total(takes.driver_python)),
            _peak(case, "a worker's Python", max(workers), total(takes.worker_python)),
            *(_peak(case, heap, 0, bytes_) for heap, bytes_ in heaps.items()),
        ]
    given = (mib * _MIB if is_enough else math.inf for mib in heaps_mib)
    return [_peak(case, heap, mib, heaps[heap]) for heap, mib in zip(heaps, given, strict=True)]


def _peak(case: str, process: str, measured: float, said: int) -> Peak:
    return Peak(case=case, process=process, measured_mib=measured / _MIB, said_mib=said / _MIB)


def _bytes(process: int | str) -> int:
    """Return the most memory that a process had resident."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) << 10 if found else 0


def _forget(process: int | str) -> None:
    """Let a process's peak begin anew."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def _table(peaks: Sequence[Peak]) -> Table:
    table = Table(title="Peaks of memory, MiB", title_justify="left")
    for name in ("case", "process", "measured", "said", "said / measured"):
        table.add_column(name, justify="left" if name in ("case", "process") else "right")
    for peak in peaks:
        figures = (f"{peak.measured_mib:,.0f}", f"{peak.said_mib:,.0f}", f"{peak.ratio:.2f}")
        table.add_row(peak.case, peak.process, *figures, style=None if peak.is_right else "bold red")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
