"""What tests on Spark use beside its sessions: rows, configurations, observers, and a look at processes."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import SparkContext
from pyspark.sql import DataFrame, SparkSession

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.training.loop import train as train_inline
from sparksgd.training.state import Observer, Training

LOCAL_CLUSTER = "local-cluster[2,1,1024]"
ALLREDUCE = ("engine.name=allreduce", "engine.segment_steps=4")
WIDE = ("model.width=66000", "optimizer.lr=0.001", "train.rows_per_step=16")
"""Of both layers the last is a bucket by itself."""
OVERLAPPING = ("engine.overlap=always", *WIDE)


@contextmanager
def striking(when: Callable[[], object], deed: Callable[[], object]) -> Iterator[None]:
    """Do something once, in a thread beside the block, as soon as something else has happened.

    Args:
        when: returns something true once the block is where it is to be struck: where it holds.
        deed: what to do then.
    """
    struck, over = threading.Event(), threading.Event()

    def strike() -> None:
        while not over.wait(0.01):
            if when():
                struck.set()
                deed()
                return

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert struck.is_set(), "the block ended before it was struck"


def executor_pids() -> list[int]:
    """Return the JVMs of this session's executors."""
    application, found = SparkContext.getOrCreate().applicationId.encode(), []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"org.apache.spark.executor.CoarseGrainedExecutorBackend" in words and application in words:
                found.append(int(process.name))
    return sorted(found)


def with_descendants(pids: Iterable[int]) -> set[int]:
    """Return some processes and all that they started, and those, that live."""
    parents = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                status = (process / "status").read_text()
            except OSError:
                continue
            parents[int(process.name)] = int(re.search(r"PPid:\s+(\d+)", status)[1])
    family = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family & parents.keys()


def python_workers() -> set[int]:
    """Return the Python workers that this process started, and the daemons that forked them."""
    found = set()
    for pid in with_descendants([os.getpid()]):
        with suppress(OSError):  # it ended
            if b"pyspark.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def memory_bytes(pid: int, of: str) -> int:
    """Return a figure of a process's memory: VmRSS is what is resident now, VmHWM its peak."""
    found = re.search(rf"{of}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def flip_bit(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def write_rows(folder: Path, rows: int, files: int = 1, seed: int = 0, repeated: int = 0) -> str:
    """Write uint8[16] features with learnable labels 0..3, in any number of files, and any order."""
    source = np.random.default_rng(1)
    features = source.integers(0, 256, (rows, 16), dtype=np.uint8)
    features[:repeated] = features[0]
    labels = features.reshape(rows, 4, 4).sum(axis=2).argmax(axis=1)
    order = np.random.default_rng(seed).permutation(rows) if seed else np.arange(rows)
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(order, files)):
        table = pa.table(
            {
                "features": pa.array([features[row].tobytes() for row in part], pa.binary()),
                "label": pa.array(labels[part], pa.int32()),
            }
        )
        pq.write_table(table, folder / f"part-{number:03d}.parquet")
    return str(folder)


def read_files_apart(spark: SparkSession, folder: str) -> DataFrame:
    """Return the rows of a folder, a partition for each file; Spark would pack small ones together."""
    files = sorted(Path(folder).glob("*.parquet"))
    return reduce(DataFrame.union, [spark.read.parquet(str(file)) for file in files])


def configured(*settings: str) -> Config:
    """Return a configuration of small things, with settings over it."""
    momentum = () if any(word.startswith("optimizer.name") for word in settings) else (0.9,)
    return Config.load(
        None,
        [
            "model.name=users_modules:DropoutNet",
            "optimizer.lr=0.1",
            *(f"optimizer.momentum={value}" for value in momentum),
            "train.rows_per_step=64",
            "train.num_shards=4",
            "train.epochs=2",
            "engine.num_workers=2",
            *settings,
        ],
    )


class AtStep(Observer):
    """Observes a run, and does something once, between two steps."""

    def __init__(self, step: int, deed: Callable[[Training], None]) -> None:
        self.step, self.deed = step, deed

    def ended(self, training):
        self.training = training

    def stepped(self, training, report):
        if report.step == self.step:
            self.deed(training)


class StepsMade(Observer):
    """Observes every step's report, and leaves the number of the last one in a file, for stragglers.HeldBack.

    Args:
        file: is made, and replaced.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.seen = file, []

    def stepped(self, training, report):
        self.seen.append(report)
        new = self.file.with_suffix(".new")
        new.write_text(str(report.step))
        new.rename(self.file)


def digests(training: Training) -> tuple[str, str]:
    return training.flat.parameters_sha256(), training.flat.buffers_sha256()


def undisturbed(path: str, config: Config) -> str:
    """Return the digest that every engine must reach, through whatever happens."""
    training = train_inline(config, rows=ParquetRows(path), test=None, make_engine=InlineEngine)
    return training.flat.parameters_sha256()


class Reports(Observer):
    """Observes what must be equal in every step's report, and every evaluation."""

    def __init__(self):
        self.seen = []

    def stepped(self, training, report):
        of = report
        self.seen.append((of.step, of.epoch, of.version, of.rows, of.shards, of.loss, of.lr))

    def evaluated(self, training, report):
        self.seen.append((report.step, report.loss, report.accuracy))
