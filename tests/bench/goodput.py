"""What is left of the speed where executors and drivers are killed: rows trained per second.

    python tests/bench/goodput.py [--data DIR] [--minutes 6] [--out goodput.json]

Each arm trains for so many minutes on a standalone cluster of two hosts, which restarts executors.  A loop
submits the same command again whenever it has ended.  What is counted is how far the training has come, so
that rows which are trained again count once.  sparksgd makes its checkpoints as it does by default;
TorchDistributor has none, and runs a program that saves after each epoch (torch_distributor_saving.py).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import LEARNING_RATE, LENET, MOMENTUM
from processes import ROOT
from run import NUM_WORKERS, ROWS_PER_WORKER, train_parquet

sys.path[:0] = [str(ROOT / "tests" / name) for name in ("hosts", "cluster")]
servers, checkouts = map(importlib.import_module, ("servers", "checkouts"))  # of other folders of tests

HOSTS = ("127.0.0.2", "127.0.0.3")
EXECUTORS_KILLED_EVERY_S = 60.0
DRIVER_KILLED_EVERY_S = 120.0
_POLL_S = 0.2
_EPOCHS = 1000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How far a training came."""

    trainer: str
    killed: str
    seconds: float
    rows: int
    kills: int
    submissions: int

    @property
    def rows_per_second(self) -> float:
        """Rows trained, each counted once, over the arm's wall-clock."""
        return self.rows / self.seconds


class Sparksgd:
    """Submits our job; its metrics say how far it is."""

    name = "sparksgd"

    def __init__(self, folder: Path, data: Path) -> None:
        self._out = folder / "out"
        settings = {
            "data.train": str(data), "data.features": "image", **{f"model.{k}": v for k, v in LENET.items()},
            "optimizer.lr": LEARNING_RATE, "optimizer.momentum": MOMENTUM, "engine.name": "allreduce",
            "engine.num_workers": NUM_WORKERS, "train.epochs": _EPOCHS, "train.num_shards": NUM_WORKERS,
            "train.rows_per_step": NUM_WORKERS * ROWS_PER_WORKER,
        }  # fmt: skip
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        self.command = [str(ROOT / "jobs" / "train.py"), *sets, "--out", str(self._out)]

    def rows(self) -> int:
        """Return how many rows have been trained, each counted once."""
        with suppress(FileNotFoundError):
            lines = (self._out / "metrics.jsonl").read_text().splitlines()
            steps = (json.loads(line) for line in lines if line.endswith("}"))
            return sum(step["rows"] for step in steps if step["kind"] == "step")
        return 0


class Distributor:
    """Submits a program with TorchDistributor, which leaves in a file how far it is."""

    name = "TorchDistributor, saving after each epoch"

    def __init__(self, folder: Path, data: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._progress = folder / "progress"
        script = Path(__file__).with_name("torch_distributor_saving.py")
        words = (data, ROWS_PER_WORKER, _EPOCHS, NUM_WORKERS, folder)
        self.command = [str(script), *map(str, words)]

    def rows(self) -> int:
        """Return how many rows have been trained, each counted once."""
        try:
            return int(self._progress.read_text())
        except FileNotFoundError:
            return 0


def run_arm(
    make: Callable[[Path, Path], Sparksgd | Distributor],
    folder: Path,
    data: Path,
    killed: str,
    seconds: float,
) -> Arm:
    """Train for so long, and kill on the way."""
    folder.mkdir()
    here = make(folder / "run", data)
    environment = os.environ | {
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    every_s = {"executor": EXECUTORS_KILLED_EVERY_S, "driver": DRIVER_KILLED_EVERY_S}.get(killed)
    kills = submissions = 0
    with servers.standalone(folder / "servers", environment=environment, hosts=HOSTS, memory="2g") as cluster:
        settings = {
            "spark.master": cluster.address, "spark.executor.memory": "1g", "spark.ui.enabled": "false",
            "spark.cores.max": str(NUM_WORKERS),
        }  # fmt: skip
        spark = [word for key, value in settings.items() for word in ("--conf", f"{key}={value}")]
        command = [str(Path(sys.executable).parent / "spark-submit"), *spark, *here.command]
        started_s = time.monotonic()
        process, next_s = None, None if every_s is None else started_s + every_s
        try:
            while (now_s := time.monotonic()) < started_s + seconds:
                if process is None or process.poll() is not None:
                    process, submissions = _submitted(command, environment, folder), submissions + 1
                if next_s is not None and now_s >= next_s:
                    next_s += every_s
                    kills += _killed(killed, process, folder)
                time.sleep(_POLL_S)  # kills come by the clock: that is what is measured
            took_s = time.monotonic() - started_s
        finally:
            if process is not None:
                _end(process)
    return Arm(
        trainer=here.name,
        killed=killed,
        seconds=took_s,
        rows=here.rows(),
        kills=kills,
        submissions=submissions,
    )


def _killed(what: str, driver: subprocess.Popen[bytes], folder: Path) -> int:
    """Kill the driver, or one executor; return how many were there."""
    if what == "driver":
        _end(driver)
        return 1
    executors = checkouts.processes_of("CoarseGrainedExecutorBackend", str(folder))
    for executor in executors[:1]:
        os.kill(executor, signal.SIGKILL)
    return len(executors[:1])


def _submitted(command: Sequence[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: Sequence[str]) -> int:
    """Run all arms; print and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of train.parquet")
    parser.add_argument("--minutes", type=float, default=6.0, help="of each arm")
    parser.add_argument("--killed", nargs="+", default=["nothing", "executor", "driver"])
    parser.add_argument("--out", type=Path, default=Path("goodput.json"), metavar="FILE")
    options = parser.parse_args(argv)
    arms: list[Arm] = []
    with tempfile.TemporaryDirectory(prefix="sgd-") as temporary, train_parquet(options.data) as (data, what):
        print(f"{what}; {options.minutes:g} minutes an arm", flush=True)
        for killed in options.killed:
            for make in (Sparksgd, Distributor):
                folder = Path(temporary, f"arm-{len(arms)}")
                arms.append(run_arm(make, folder, data, killed, 60 * options.minutes))
                arm = arms[-1]
                print(f"{arm.rows_per_second:.0f} rows/s: {arm}", flush=True)
    options.out.write_text(json.dumps([asdict(arm) for arm in arms], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
