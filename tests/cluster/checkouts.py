"""Trainings submitted to real clusters, as README's reader submits them, but with less to train."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import servers  # tests/hosts
from hadoop import Hadoop

__all__ = [
    "HELD", "HOLDING", "ROOT", "ROWS", "SMALL", "Checkout", "Run", "make_checkout", "processes_of", "sets",
]  # fmt: skip

ROOT = Path(__file__).parent.parent.parent
ROWS = {"train": 6_000, "test": 1_000}
"""Of MNIST's own rows, the first."""

SMALL = ("model.maps=[4, 8]", "model.hidden=32", "train.num_shards=4", "train.rows_per_step=120")
"""Settings of a training whose steps are quick."""

_LESS = {"epochs = 3": "epochs = 1", "rows_per_step = 256": "rows_per_step = 256\nsteps = 6"}
_OF_TESTS = ("PYTHONPATH", "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON")


HOLDING = ROOT / "tests" / "modules" / "holding.py"
HELD = ("train.num_shards=4", "train.rows_per_step=120", "train.steps=20")
"""Settings of a training of holding.HeldNet, beside those of its `Hold`."""


def sets(*settings: str) -> list[str]:
    """Return settings as words of a command."""
    return [word for setting in settings for word in ("--set", setting)]


def processes_of(*marks: str) -> list[int]:
    """Return the processes whose command line, or environment, mentions all of these."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                words = (process / "cmdline").read_bytes()
                text = (
                    (words + (process / "environ").read_bytes()).replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if words and all(mark in text for mark in marks):
                found.append(int(process.name))
    return found


@dataclass
class Run:
    """A submitted job."""

    process: servers.Process
    log: Path

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = 400) -> int:
        """Return its exit status."""
        return self.process.wait(timeout=timeout_s)

    def application(self) -> str:
        """Return the id that YARN gave it."""
        found = servers.wait_for(
            lambda: re.search(r"application_\d+_\d+", self.said), "the application", process=self.process,
            log=self.log,
        )  # fmt: skip
        return found[0]


@dataclass
class Checkout:
    """A folder as README's reader has it: jobs/, conf/, dist/ and data/."""

    folder: Path
    hadoop: Hadoop
    environment: dict[str, str] = field(default_factory=dict)

    def run(
        self, *command: str, cwd: Path | None = None, timeout_s: float = 400
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here, or elsewhere."""
        with self.started(*command, name="run", cwd=cwd) as run:
            try:
                status = run.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"not within {timeout_s:.0f} s: {run.said[-4000:]}") from error
            return subprocess.CompletedProcess(command, status, run.said)

    @contextmanager
    def started(self, *command: str, name: str, cwd: Path | None = None) -> Iterator[Run]:
        """Start a command; nothing of it is left after the block."""
        log = self.folder / f"{name}.log"
        process = servers.kept(command, log, environment=self.environment, cwd=cwd or self.folder)
        try:
            yield Run(process, log)
        finally:
            servers.stop(process)

    def on_yarn(
        self, *words: str, mode: str = "client", settings: Sequence[str] = (), modules: Sequence[Path] = ()
    ) -> list[str]:
        """Return the command that trains on YARN, with small containers.

        Args:
            words: arguments of the job.
            mode: client or cluster.
            settings: words for spark-submit, over these.
            modules: files that are shipped beside the package.
        """
        return [
            "spark-submit", "--master", "yarn", "--deploy-mode", mode,
            "--properties-file", "conf/spark-yarn.conf", "--num-executors", "2",
            *(("--conf", "spark.pyspark.driver.python=python3") if mode == "client" else ()),
            "--executor-memory", "640m", "--driver-memory", "768m",
            "--archives", "hdfs:///environments/environment.tar.gz#environment",
            "--py-files", ",".join(["dist/sparksgd.zip", *map(str, modules)]), *settings,
            "jobs/train.py", "--config", "hdfs:///data/mnist-lenet.toml",
            *sets("data.train=hdfs:///data/mnist/train.parquet", "data.test=hdfs:///data/mnist/test.parquet"),
            *words,
        ]  # fmt: skip

    def summary(self, out: str) -> dict[str, Any]:
        """Return a run's summary, from HDFS."""
        return json.loads(self.hadoop.read(f"{out}/summary.json"))

    def steps(self, out: str) -> int:
        """Return how many steps a run's metrics.jsonl has, on HDFS."""
        try:
            lines = self.hadoop.read(f"{out}/metrics.jsonl").splitlines()
        except FileNotFoundError:
            return 0
        return sum(json.loads(line)["kind"] == "step" for line in lines)

    def reference(self, *settings: str) -> dict[str, Any]:
        """Return the summary of the same training by the inline engine, with modules of this folder."""
        return _reference(self.folder, settings)


@cache
def _reference(folder: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    out = folder / f"reference-{len(list(folder.glob('reference-*')))}"
    words = ["--config", "conf/mnist-lenet.toml", *sets(*settings, "engine.name=inline"), "--out", str(out)]
    path = os.pathsep.join([str(folder), str(HOLDING.parent)])
    done = subprocess.run(
        [sys.executable, "jobs/train.py", *words], cwd=folder, env=os.environ | {"PYTHONPATH": path},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((out / "summary.json").read_text())


def make_checkout(folder: Path, hadoop: Hadoop) -> Checkout:
    """Build what is shipped, and put it beside jobs, settings and rows in a folder of their own."""
    folder.mkdir()
    for name in ("jobs", "dist"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "conf", folder / "conf")
    training = folder / "conf" / "mnist-lenet.toml"
    text = training.read_text()
    for before, after in _LESS.items():
        assert before in text
        text = text.replace(before, after)
    training.write_text(text)
    for name in ("spark-yarn.conf", "spark-standalone.conf"):
        with (folder / "conf" / name).open("a") as opened:  # as README says one may
            opened.writelines(f"{key} {value}\n" for key, value in hadoop.spark_settings.items())
    (folder / "data" / "mnist").mkdir(parents=True)
    for split, rows in ROWS.items():
        table = pq.read_table(ROOT / "data" / "mnist" / f"{split}.parquet").slice(0, rows)
        pq.write_table(table, folder / "data" / "mnist" / f"{split}.parquet")
    environment = {
        key: value for key, value in (os.environ | hadoop.environment).items() if key not in _OF_TESTS
    }
    return Checkout(folder, hadoop, environment)
