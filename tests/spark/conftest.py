"""One Spark session at a time, started anew where a test wants another master or other settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark import SparkConf, SparkContext
from pyspark.sql import DataFrame, SparkSession

from sparksgd.config import Config, TrainConfig
from sparksgd.engines.inline import InlineEngine
from sparksgd.local_rows import ParquetRows
from sparksgd.spark.session import start_session
from sparksgd.training import Training
from sparksgd.training import train as train_inline

LOCAL_CLUSTER = "local-cluster[2,1,1024]"

_current: dict[str, object] = {}


@pytest.fixture(scope="session")
def local_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where these sessions keep their blocks and shards, apart from any other Spark here."""
    return tmp_path_factory.mktemp("spark")


@pytest.fixture(scope="session")
def session_for(local_dir: Path) -> Iterator[Callable[..., SparkSession]]:
    """Return a function: the session of a master and settings, the last one if they are the same."""

    def session(master: str, **settings: str) -> SparkSession:
        wanted = (master, tuple(sorted(settings.items())))
        if _current.get("wanted") != wanted or SparkContext._active_spark_context is None:
            stop()
            conf = {"spark.master": master, "spark.ui.enabled": "false", "spark.log.level": "ERROR"}
            conf |= {"spark.ui.showConsoleProgress": "false", "spark.local.dir": str(local_dir)}
            conf |= {key.replace("__", "."): value for key, value in settings.items()}
            if SparkContext._gateway is None:
                SparkContext._ensure_initialized(conf=SparkConf(loadDefaults=False))
            system = SparkContext._jvm.System  # what spark-submit would have set
            for key in _current.get("keys", ()):
                system.clearProperty(key)
            for key, value in conf.items():
                system.setProperty(key, value)
            _current.update(
                wanted=wanted, keys=tuple(conf), session=start_session("sparksgd tests", TrainConfig())
            )
        return _current["session"]

    def stop() -> None:
        if SparkContext._active_spark_context is not None:
            SparkContext._active_spark_context.stop()

    yield session
    stop()


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


def memory_bytes(pid: int, of: str) -> int:
    """Return a figure of a process's memory: VmRSS is what is resident now, VmHWM its peak."""
    found = re.search(rf"{of}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


@pytest.fixture
def setting(session_for: Callable[..., SparkSession]) -> Iterator[Callable[[str, str], None]]:
    """Return a function that gives the session of `local[2]` a setting, as if it had been started with it.

    Only for settings that we read, not Spark: starting a session takes seconds.
    """
    conf, before = session_for("local[2]").sparkContext._conf, {}

    def give(key: str, value: str) -> None:
        before[key] = conf.get(key, None)
        conf.set(key, value)

    yield give
    for key, value in before.items():
        if value is None:
            conf._jconf.remove(key)
        else:
            conf.set(key, value)


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


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of 1,003 rows in one Parquet file."""
    return write_rows(tmp_path_factory.mktemp("data") / "small", 1003)


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


class AtStep:
    """Observes a run, and does something once, between two steps."""

    def __init__(self, step: int, deed: Callable[[Training], None]) -> None:
        self.step, self.deed = step, deed

    def started(self, training): ...
    def evaluated(self, training, report): ...
    def ended(self, training):
        self.training = training

    def stepped(self, training, report):
        if report.step == self.step:
            self.deed(training)


@pytest.fixture
def flags(tmp_path: Path) -> Path:
    folder = tmp_path / "flags"
    folder.mkdir()
    return folder


def digests(training: Training) -> tuple[str, str]:
    return training.flat.parameters_sha256(), training.flat.buffers_sha256()


def undisturbed(path: str, config: Config) -> str:
    """Return the digest that every engine must reach, through whatever happens."""
    training = train_inline(config, rows=ParquetRows(path), test=None, make_engine=InlineEngine)
    return training.flat.parameters_sha256()


class Reports:
    """Observes what must be equal in every step's report, and every evaluation."""

    def __init__(self):
        self.seen = []

    def stepped(self, training, report):
        of = report
        self.seen.append((of.step, of.epoch, of.version, of.rows, of.shards, of.loss, of.lr))

    def evaluated(self, training, report):
        self.seen.append((report.step, report.loss, report.accuracy))

    def started(self, training): ...
    def ended(self, training): ...
