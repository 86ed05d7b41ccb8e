"""What runs were said to take of memory, and what they took at their peaks.

    python tests/bench/memory_said.py [--case ENGINE:PARAMETERS:OPTIMISER[:SHARDS]] [--out FILE]

Each case is a short training in a process and a session of its own: two executors, each with a worker, on
this machine.  Of Python processes the kernel says the peak.  Of JVMs it is the most that one held after a
full collection of its garbage; there are four of them a second.  Said is what engines/memory.py says.
The exit status is 1 if a peak is above what was said, or more than a fifth below it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
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
_STEPS = 12
_MIB = 1 << 20
_COLLECTIONS = "-XX:+UseG1GC -XX:G1PeriodicGCInterval=250 -XX:-G1PeriodicGCInvokesConcurrent -Xlog:gc:file={}"


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What one kind of process of a case took."""

    case: str
    process: str
    measured_mib: float
    said_mib: float

    @property
    def ratio(self) -> float:
        """What was said, over what was measured."""
        return self.said_mib / self.measured_mib

    @property
    def is_right(self) -> bool:
        """Whether it was said, and not far too much of it."""
        return 1 <= self.ratio <= MOST_BELOW


def main(argv: Sequence[str]) -> int:
    """Measure the cases, each in a process of its own; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", action="append", metavar="CASE", help="repeatable; without it, all")
    parser.add_argument("--out", type=Path, default=Path("memory-said.json"), metavar="FILE")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        peaks = _inline(options.one) if options.one.startswith("inline") else _on_spark(options.one)
        options.out.write_text(json.dumps([asdict(peak) for peak in peaks]))
        return 0
    found: list[Peak] = []
    with tempfile.TemporaryDirectory(prefix="sgd-") as temporary:
        for case in options.case or CASES:
            answer = Path(temporary, "peaks")
            command = [sys.executable, __file__, "--one", case, "--out", str(answer)]
            path = [str(ROOT), str(TESTS / "modules"), str(TESTS / "spark")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TMPDIR": temporary}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{case}: {done.stderr[-2000:]}", file=sys.stderr)
                return 1
            found += [Peak(**peak) for peak in json.loads(answer.read_text())]
            print(case, file=sys.stderr)
    Console().print(_table(found))
    options.out.write_text(json.dumps([asdict(peak) for peak in found], indent=2) + "\n")
    return 0 if all(peak.is_right for peak in found) else 1


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


def _on_spark(case: str) -> list[Peak]:
    """Measure a training on two executors."""
    logs = Path(tempfile.mkdtemp())
    driver, executor = (_COLLECTIONS.format(logs / f"{name}.log") for name in ("driver", "executor-%p"))
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    submit = f'--driver-memory 4g --driver-java-options "{driver}" pyspark-shell'
    os.environ["PYSPARK_SUBMIT_ARGS"] = submit

    from pyspark.sql import SparkSession
    from spark_helpers import with_descendants, write_rows

    from sparksgd.config import TrainConfig
    from sparksgd.engines.memory import Takes, total
    from sparksgd.spark import session as sessions
    from sparksgd.spark import train as trainings
    from sparksgd.training.state import Observer, Training

    builder = SparkSession.builder.master("local-cluster[2,1,2500]").config("spark.ui.enabled", "false")
    for setting in sessions.wanted_settings(TrainConfig()):
        builder = builder.config(setting.key, setting.value)
    settings = {
        "spark.driver.maxResultSize": "8g",
        "spark.executor.memory": "2g",
        "spark.executor.extraJavaOptions": executor,
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    rows = spark.read.parquet(write_rows(Path(tempfile.mkdtemp()) / "rows", 300))
    said: list[Takes] = []
    asked = trainings.require_memory
    workers: list[int] = []

    def listen(*given: object) -> Takes:
        said.append(asked(*given))
        return said[-1]

    class Look(Observer):
        """Reads the workers' peaks while they live."""

        def ended(self, training: Training) -> None:
            for process in with_descendants([os.getpid()]):
                if b"pyspark.daemon" in Path(f"/proc/{process}/cmdline").read_bytes():
                    workers.append(_bytes(process))

    _forget("self")
    with mock.patch.object(trainings, "require_memory", listen):
        trainings.train(spark, _config(case), rows, observers=[Look()])
    peak, takes = _bytes("self"), said[0]
    spark.stop()
    return [
        _peak(case, "driver's Python", peak, total(takes.driver_python)),
        _peak(case, "driver's heap", _live(logs.glob("driver.log")), total(takes.driver_heap)),
        _peak(case, "a worker's Python", max(workers), total(takes.worker_python)),
        _peak(case, "an executor's heap", _live(logs.glob("executor-*.log")), total(takes.executor_heap)),
    ]


def _peak(case: str, process: str, measured: int, said: int) -> Peak:
    return Peak(case=case, process=process, measured_mib=measured / _MIB, said_mib=said / _MIB)


def _bytes(process: int | str) -> int:
    """Return the most memory that a process had resident."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) << 10 if found else 0


def _forget(process: int | str) -> None:
    """Let a process's peak begin anew."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def _live(logs: Iterable[Path]) -> int:
    """Return the most bytes that one of the JVMs held after a full collection."""
    return max(
        int(held) << 20 for log in logs for held in re.findall(r"Pause Full.*?->(\d+)M\(", log.read_text())
    )


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
