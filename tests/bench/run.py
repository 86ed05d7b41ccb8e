"""The benchmark: how fast sparksgd's engines are, and against what.

    python tests/bench/run.py [--data DIR] [--out FILE] [--quick] [--only PART]

An hour on 2 cores; --only takes a part of it.

DIR holds train.parquet as jobs/prepare_data.py writes it; without one, images are drawn at random.
Arms run in turns, each in a process and a Spark session of its own, and what is compared are
medians of one run: the arms of another run, or machine, are not comparable.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import LEARNING_RATE, LENET, LENET_PARAMETERS, MOMENTUM, Block, Task
from processes import ROOT, ArmFailed, job_s, run_arm, run_in_turns
from report import (
    Line,
    Ratio,
    accuracy_ratio,
    allreduce_ratios,
    job_ratios,
    job_table,
    lines_of,
    machine,
    ratio_table,
    ratios_of,
    size_table,
    soak_ratios,
    soak_table,
    speed_table,
    straggler_ratios,
    straggler_table,
)
from rich.console import Console
from rich.table import Table

sys.path.append(str(ROOT / "tests" / "hosts"))
from two_hosts import INSIDE, PROBE  # of another folder of tests

NUM_WORKERS = 2
ROWS_PER_WORKER = 64
SYNTHETIC_ROWS = 60_000
BLOCK_STEPS = {"431,080 parameters": (400, 180, 60), "1,663,370 parameters": (200, 85, 27)}
SIZES = tuple(
    (model, rows, steps)
    for model, of_rows in BLOCK_STEPS.items()
    for rows, steps in zip((16, 64, 256), of_rows, strict=True)
)
HOSTS_RATE = "1gbit"
HOSTS_SIZES = (
    ("431,080 parameters", 16, 200),
    ("431,080 parameters", 64, 120),
    ("1,663,370 parameters", 64, 50),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    rounds: int
    """How often the arms take their turn."""

    warmup_steps: int
    """Steps of each arm before its first timed one."""

    block_steps: int
    """Steps of a block."""

    blocks: int
    """Blocks of an arm in a round."""

    shards_per_worker: tuple[int, ...]
    """Numbers of shards whose price is measured, the base first."""

    soak_steps: tuple[int, int]
    """When the soak compares what the driver holds."""

    share: float
    """Of the blocks' steps of the all-reduce engine's sizes: a block is a segment of six seconds."""

    turns: int
    """Blocks of each of those sizes."""

    jobs: int
    """How often whole jobs take their turn."""

    epochs: int
    """Of a whole job."""

    straggling_steps: int
    """Steps beside a straggler."""

    accuracy_epochs: int
    """Of trainings whose accuracy is compared."""


FULL = Size(
    rounds=3,
    warmup_steps=120,
    block_steps=50,
    blocks=3,
    shards_per_worker=(1, 2, 4, 8),
    soak_steps=(200, 2000),
    share=1,
    turns=4,
    jobs=5,
    epochs=2,
    straggling_steps=60,
    accuracy_epochs=3,
)
QUICK = Size(
    rounds=1,
    warmup_steps=5,
    block_steps=5,
    blocks=2,
    shards_per_worker=(1, 2),
    soak_steps=(10, 20),
    share=0.05,
    turns=2,
    jobs=1,
    epochs=1,
    straggling_steps=6,
    accuracy_epochs=1,
)


def main(argv: list[str]) -> int:
    """Measure, draw the table, write the JSON."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the arm, too
    options = _options(argv)
    size = QUICK if options.quick else FULL
    console = Console()
    with train_parquet(options.data) as (path, data):
        task = Task(
            data=str(path),
            num_workers=NUM_WORKERS,
            rows_per_step=NUM_WORKERS * ROWS_PER_WORKER,
            warmup_steps=size.warmup_steps,
            block_steps=size.block_steps,
            blocks=size.blocks,
        )
        found: dict[str, Any] = {
            "machine": machine(),
            "data": data,
            "model": {"name": "lenet", "parameters": LENET_PARAMETERS, **LENET},
            "quick": options.quick,
        }
        try:
            if options.only in (None, "speed"):
                found["speed"] = _speed(task, size, data, console)
            if options.only in (None, "allreduce"):
                found["allreduce"] = _allreduce(task, size, data, console)
            if options.only in (None, "hosts"):
                found["hosts"] = _hosts(task, size, data, console)
            if options.only in (None, "job"):
                found["job"] = _job(task, size, data, console)
            if options.only in (None, "backups"):
                found["backups"] = _backups(task, size, console)
            if options.only in (None, "memory"):
                found["memory"] = _memory(task, size, console)
        except ArmFailed as error:
            console.print(str(error), style="red", markup=False)
            return 1
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"written to {options.out}")
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of train.parquet")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="few steps: whether it runs, not how fast")
    parser.add_argument(
        "--only", choices=["speed", "allreduce", "hosts", "job", "backups", "memory"], help="one part of it"
    )
    return parser.parse_args(argv)


def _speed(task: Task, size: Size, data: str, console: Console) -> dict[str, Any]:
    """Run the arms in turns."""
    arms = {
        "sparksgd": ("product.py", task),
        "the textbook loop": ("textbook.py", replace(task, plain_session=True)),
        "sparksgd in a plain session": ("product.py", replace(task, plain_session=True)),
        "one plain torch process": ("one_process.py", task),
    }
    blocks: list[Block] = []
    with console.status("") as status:
        for turn in range(size.rounds):
            for name, (script, arm_task) in arms.items():
                status.update(f"round {turn + 1} of {size.rounds}: {name}")
                blocks += map(Block.from_dict, run_arm(script, arm_task))
        status.update(f"{', '.join(map(str, size.shards_per_worker))} shards per worker")
        shards_task = replace(task, blocks=size.rounds, shards_per_worker=size.shards_per_worker)
        blocks += map(Block.from_dict, run_arm("product.py", shards_task))
    title = (
        f"LeNet of {LENET_PARAMETERS:,} parameters, {task.num_workers} workers, "
        f"{ROWS_PER_WORKER} rows each, {data}"
    )
    lines = lines_of(blocks)
    return _shown(speed_table(title, lines), lines, ratios_of(blocks), console)


def _allreduce(task: Task, size: Size, data: str, console: Console) -> dict[str, Any]:
    """Run the all-reduce engine in turns with DistributedDataParallel and one process, at every size."""
    sizes = tuple((model, rows, max(1, round(size.share * steps))) for model, rows, steps in SIZES)
    sized = replace(task, sizes=sizes, blocks=size.turns, shards_per_worker=size.shards_per_worker)
    documented = replace(sized, plain_session=True)
    arms = [("allreduce.py", sized), ("ddp.py", documented), ("ddp.py", sized), ("one_process.py", sized)]
    with console.status("the all-reduce engine, DistributedDataParallel and one process, in turns"):
        found = run_in_turns(arms)
    blocks = [Block.from_dict(block) for arm in found for block in arm]
    lines = lines_of(blocks)
    table = size_table(f"{task.num_workers} workers, rows of each, LeNet, {data}", lines)
    return _shown(table, lines, allreduce_ratios(blocks), console)


def _hosts(task: Task, size: Size, data: str, console: Console) -> dict[str, Any] | None:
    """Run the all-reduce engine in turns with DistributedDataParallel on two hosts, across a slow link."""
    if subprocess.run([*INSIDE, "sh", "-c", PROBE], capture_output=True, check=False).returncode:
        console.print("no hosts of their own: network namespaces cannot be made here")
        return None
    sizes = tuple((model, rows, max(1, round(size.share * steps))) for model, rows, steps in HOSTS_SIZES)
    sized = replace(task, sizes=sizes, blocks=size.turns, shards_per_worker=())
    with tempfile.TemporaryDirectory(prefix="sgd-") as temporary:
        folder = Path(temporary)
        asked, answered = folder / "task", folder / "blocks"
        asked.write_text(json.dumps(asdict(sized)))
        hosts = ["--rate", HOSTS_RATE, "--cores", "4", "--memory", "4g"]  # a slot for each of four arms
        cluster = [
            *INSIDE,
            sys.executable,
            str(ROOT / "tests" / "hosts" / "two_hosts.py"),
            *hosts,
            str(folder),
        ]
        program = [sys.executable, str(Path(__file__).with_name("on_hosts.py")), str(asked), str(answered)]
        with console.status(f"two hosts, {HOSTS_RATE} between them"):
            done = subprocess.run(
                [*cluster, *program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
        if done.returncode:
            raise ArmFailed(done.stdout[-4000:])
        blocks = [Block.from_dict(block) for block in json.loads(answered.read_text())]
    lines = lines_of(blocks)
    table = size_table(f"2 hosts, {HOSTS_RATE}, rows of each, LeNet, {data}", lines)
    return _shown(table, lines, allreduce_ratios(blocks), console)


def _shown(table: Table, lines: list[Line], ratios: list[Ratio], console: Console) -> dict[str, Any]:
    """Draw the tables, and return what they show as JSON has it."""
    console.print(table)
    console.print(ratio_table(ratios))
    return {"lines": [asdict(line) for line in lines], "ratios": [asdict(ratio) for ratio in ratios]}


def _job(task: Task, size: Size, data: str, console: Console) -> dict[str, Any]:
    """Submit whole jobs in turns: ours, and one that trains with TorchDistributor."""
    settings: dict[str, Any] = {
        "data.train": task.data,
        "data.features": "image",
        **{f"model.{key}": value for key, value in LENET.items()},
        "optimizer.lr": LEARNING_RATE,
        "optimizer.momentum": MOMENTUM,
        "engine.name": "allreduce",
        "train.epochs": size.epochs,
        "train.rows_per_step": task.rows_per_step,
        "train.num_shards": task.num_workers,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    ours = ROOT / "jobs" / "train.py", [*words, "--out", "run"]
    theirs = (
        Path(__file__).with_name("torch_distributor.py"),
        [task.data, str(ROWS_PER_WORKER), str(size.epochs), str(task.num_workers)],
    )
    jobs = {
        "sparksgd": (*ours, task, True),
        "sparksgd without make warm": (*ours, task, False),
        "TorchDistributor": (*theirs, replace(task, plain_session=True), False),
        "TorchDistributor with sparksgd's settings and make warm": (*theirs, task, True),
    }
    took_s: dict[str, list[float]] = {name: [] for name in jobs}
    with console.status("") as status:
        for turn in range(size.jobs):
            for name, (script, arguments, job_task, warm) in jobs.items():
                status.update(f"round {turn + 1} of {size.jobs}: a whole job with {name}")
                took_s[name].append(job_s(script, arguments, job_task, warm=warm))
    ratios = job_ratios(took_s)
    console.print(job_table(f"{size.epochs} epochs, sessions' start included, {data}", took_s))
    console.print(ratio_table(ratios))
    return {"took_s": took_s, "ratios": [asdict(ratio) for ratio in ratios]}


def _backups(task: Task, size: Size, console: Console) -> dict[str, Any]:
    """Train beside stragglers: with backup workers, without, and with Spark's speculation."""
    sized = replace(task, blocks=1, warmup_steps=10, block_steps=size.straggling_steps)
    with console.status("backup workers, and no backup workers, beside a straggler"):
        blocks = [Block.from_dict(block) for block in run_arm("backups.py", sized)]
    lines = lines_of(blocks)
    title = "A small LeNet, 4 workers, one of them late by 1 s"
    found = _shown(straggler_table(title, blocks), lines, straggler_ratios(blocks), console)
    if not Path(task.data).with_name("test.parquet").exists():
        console.print("no accuracy with backup workers: --data has no test.parquet")
        return found
    with console.status("accuracy with a backup worker, and without"):
        eight = replace(task, num_workers=8, blocks=size.accuracy_epochs)
        found["accuracy"] = run_arm("backups_accuracy.py", eight)
    ratio = accuracy_ratio(found["accuracy"])
    console.print(ratio_table([ratio]))
    found["ratios"].append(asdict(ratio))
    return found


def _memory(task: Task, size: Size, console: Console) -> dict[str, Any]:
    """Train for long, and compare what the driver holds early and late."""
    first, last = size.soak_steps
    soak_task = replace(task, warmup_steps=first, block_steps=last - first, blocks=1)
    with console.status(f"{last:,} steps"):
        early, late = run_arm("soak.py", soak_task)
    ratios = soak_ratios(early, late)
    console.print(soak_table(early, late, ratios))
    return {"samples": [early, late], "ratios": [asdict(ratio) for ratio in ratios]}


@contextmanager
def train_parquet(folder: Path | None) -> Iterator[tuple[Path, str]]:
    """Give a Parquet file of training rows, and say what it is."""
    if folder is not None:
        path = folder.resolve() / "train.parquet"
        if not path.exists():
            sys.exit(
                f"{folder} has no train.parquet: write it with jobs/prepare_data.py, or leave out --data"
            )
        rows = pq.ParquetDataset(path).read(columns=["label"]).num_rows
        yield path, f"{rows:,} rows of --data"
        return
    with tempfile.TemporaryDirectory(prefix="sgd-") as temporary:
        path = Path(temporary) / "train.parquet"
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (SYNTHETIC_ROWS, 784), np.uint8)
        labels = random.integers(0, 10, SYNTHETIC_ROWS)
        table = {"image": [image.tobytes() for image in images], "label": labels}
        pq.write_table(pa.table(table), path)
        yield path, f"{SYNTHETIC_ROWS:,} synthetic images of MNIST's shape"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
