"""Peaks of memory of short trainings, in one session: of the driver's Python, of the workers, and the heap.

    python tests/bench/peaks.py --case tree:10e6:momentum --case allreduce:10e6:adam --no-trial

The driver's heap is found by bisection: `--as-is --case tree:10e6:momentum@400` fills it until 400 MiB are
left, Spark's own part among them, and trains; it suffices if there is no error.  Without `--as-is` the JVMs
collect all garbage four times a second, and what they hold after it is shown.

The trial before the training is the largest part of the driver's Python, and takes the longest: `--no-trial`
leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), *(str(TESTS / name) for name in ("modules", "spark"))]

PIECE_MIB = 20  # of ballast
OPTIMIZERS = {
    "sgd": ["optimizer.name=SGD", "optimizer.lr=0.01"],
    "momentum": ["optimizer.name=SGD", "optimizer.lr=0.01", "optimizer.momentum=0.9"],
    "adam": ["optimizer.name=Adam", "optimizer.lr=0.001"],
}
ENGINES = {
    "tree": ["engine.name=tree"],
    "stages": ["engine.name=tree", "engine.barrier=false"],
    "allreduce": ["engine.name=allreduce", "engine.segment_steps=4"],
}


def memory(pid: int | str, of: str) -> int:
    """Return a figure of a process's memory, in bytes."""
    found = re.search(rf"{of}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def forget_peaks(*pids: int | str) -> None:
    """Let VmHWM begin anew."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def live_after(logs: Path, marks: dict[Path, int]) -> dict[str, int]:
    """Return the most that each JVM held after a full collection, in MB, since the places in `marks`."""
    found = {}
    for log in logs.glob("gc-*.log"):
        text = log.read_text()
        held = re.findall(r"Pause Full.*?->(\d+)M\(", text[marks.get(log, 0) :])
        marks[log] = len(text)
        if held:
            found[log.stem] = max(map(int, held))
    return found


def main() -> None:
    """Measure the cases; print a line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--case", action="append", default=[], help="engine:parameters:optimizer[:shards][@MiB]"
    )
    parser.add_argument("--master", default="local[2]")
    parser.add_argument("--driver", default="2500m")
    parser.add_argument("--executor", default="1500m")
    parser.add_argument("--no-trial", action="store_true")
    parser.add_argument("--as-is", action="store_true", help="no collections: do these heaps suffice?")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--conf", action="append", default=[])
    options = parser.parse_args()
    logs = Path(tempfile.mkdtemp())
    full = "-XX:+UseG1GC -XX:G1PeriodicGCInterval=250 -XX:-G1PeriodicGCInvokesConcurrent"
    java = "" if options.as_is else f"{full} -Xlog:gc:file={logs}/gc-%s.log"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS / "modules")])
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    at_driver = java and java % "driver"
    os.environ["PYSPARK_SUBMIT_ARGS"] = (
        f'--driver-memory {options.driver} --driver-java-options "{at_driver}" pyspark-shell'
    )

    from pyspark.sql import SparkSession
    from spark_helpers import with_descendants, write_rows

    from sparksgd.config import Config, TrainConfig
    from sparksgd.engines.trial.trial import Found
    from sparksgd.spark import session as sessions
    from sparksgd.spark.train import train
    from sparksgd.training import preflight
    from sparksgd.training.state import Observer, Training

    builder = SparkSession.builder.master(options.master).config("spark.ui.enabled", "false")
    for setting in sessions.wanted_settings(TrainConfig()):
        builder = builder.config(setting.key, setting.value)
    settings = {
        "spark.driver.maxResultSize": "8g",
        "spark.executor.memory": options.executor,
        "spark.executor.extraJavaOptions": java and java % "executor-%p",
        **dict(pair.split("=", 1) for pair in options.conf),
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    if options.no_trial:
        preflight.try_out = lambda *_: Found(output=(64, 4))
    folder = tempfile.mkdtemp()
    path = write_rows(Path(folder) / "rows", 300)
    marks: dict[Path, int] = {}

    ballast: list[Any] = []

    def fill(left_mib: int) -> None:
        """Leave so much of the heap of the driver's JVM, which holds Spark itself, too."""
        largest = int(spark._jvm.java.lang.Runtime.getRuntime().maxMemory()) >> 20
        while largest - PIECE_MIB * (len(ballast) + 1) >= left_mib:
            size = (PIECE_MIB << 20) - 64
            ballast.append(spark._jvm.java.nio.ByteBuffer.allocate(size))

    def workers() -> list[int]:
        family = with_descendants([os.getpid()])
        return [p for p in family if b"pyspark.daemon" in Path(f"/proc/{p}/cmdline").read_bytes()]

    for case in options.case:
        case, _, heap_mib = case.partition("@")
        engine, parameters, optimizer, *rest = case.split(":")
        found: dict[str, Any] = {"case": case, "heap_mib": heap_mib}
        if heap_mib:
            fill(int(heap_mib))
        forget_peaks(*workers())
        live_after(logs, marks)

        class Look(Observer):
            def __init__(self, found: dict[str, Any]) -> None:
                self.found = found

            def started(self, training: Training) -> None:
                self.found["setup"] = memory("self", "VmHWM")
                forget_peaks("self")

            def ended(self, training: Training) -> None:
                self.found["steps"] = memory("self", "VmHWM")
                peaks = sorted((memory(pid, "VmHWM") for pid in workers()), reverse=True)
                self.found["workers"] = peaks[:3]
                self.found["vector"] = 4 * training.flat.parameters.numel()

        found["base"] = memory("self", "VmRSS")
        forget_peaks("self")
        config = Config.load(
            None,
            [
                "model.name=wide_nets:wide",
                f"model.parameters={int(float(parameters))}",
                "train.rows_per_step=64",
                f"train.num_shards={rest[0] if rest else 4}",
                f"train.steps={options.steps}",
                "train.epochs=9",
                "engine.num_workers=2",
                *ENGINES[engine],
                *OPTIMIZERS[optimizer],
            ],
        )
        try:
            train(spark, config, spark.read.parquet(path), observers=[Look(found)])
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:300]
        found["live_mb"] = live_after(logs, marks)
        print(json.dumps(found), flush=True)
        if "error" in found:
            break
    if not found.get("error"):
        spark.stop()


if __name__ == "__main__":
    main()
