"""Arm: backup workers against stragglers, and against Spark's own answer to them, on a standalone cluster.

Four hosts of one slot with names of their own, as speculation needs them; on one of them workers sleep
a second before some of their gradients, or before each.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
from measuring import LEARNING_RATE, MOMENTUM, Block, Task, answer
from product import Stopwatch
from pyspark.sql import SparkSession

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / "hosts"), str(_TESTS / "modules")]

import servers  # noqa: E402  # tests/hosts
from stragglers import SLOW_HOST, SlowHost  # noqa: E402  # tests/modules

from sparksgd.config import Config  # noqa: E402
from sparksgd.spark.frame_rows import read_parquet  # noqa: E402
from sparksgd.spark.session import SETTINGS  # noqa: E402
from sparksgd.spark.train import train  # noqa: E402
from sparksgd.training.state import Probe  # noqa: E402

WORKERS = 4
ROWS = 6_000
COLD_STEPS = 150  # of a new session, before anything in it is timed
DELAY_S = 1.0
SOMETIMES = 0.3

_SPECULATION = {
    "spark.speculation": "true",
    "spark.speculation.interval": "50ms",
    "spark.speculation.quantile": "0.5",
    "spark.speculation.multiplier": "1.5",
    "spark.speculation.minTaskRuntime": "50ms",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train beside one kind of straggler."""

    what: str
    share: float = 0.0
    """Of the straggler's steps, in which it sleeps."""

    backups: int = 0
    barrier: bool = True
    conf: Mapping[str, str] = field(default_factory=dict)


CASES = (
    Case(what="undisturbed, b = 0"),
    Case(what="undisturbed, b = 1", backups=1),
    Case(what="sometimes late, b = 0", share=SOMETIMES),
    Case(what="sometimes late, b = 0, speculation", share=SOMETIMES, barrier=False, conf=_SPECULATION),
    Case(what="sometimes late, b = 1", share=SOMETIMES, backups=1),
    Case(what="always late, b = 0", share=1.0),
    Case(what="always late, b = 0, speculation", share=1.0, barrier=False, conf=_SPECULATION),
    Case(what="always late, b = 1", share=1.0, backups=1),
)


@contextmanager
def standalone(folder: Path) -> Iterator[str]:
    """Give the address of a master with four workers of one core, for the time of the block."""
    modules = os.pathsep.join([str(_TESTS / "modules"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": modules}
    hosts = [f"127.0.0.{number}" for number in range(1, 1 + WORKERS)]
    slow = {hosts[-1]: {SLOW_HOST: "1"}}
    with servers.standalone(
        folder, environment=environment, hosts=hosts, memory="1g", of_host=slow
    ) as cluster:
        yield cluster.address


@contextmanager
def session_with(conf: Mapping[str, str], master: str) -> Iterator[SparkSession]:
    """Give a session with sparksgd's settings and some more, for the time of the block."""
    ours = {setting.key: setting.value for setting in SETTINGS}
    builder = SparkSession.builder.master(master).config("spark.executor.memory", "512m")
    for key, value in {**ours, **conf}.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    try:
        yield session
    finally:
        session.stop()


def timed(case: Case, task: Task, rows: str, session: SparkSession) -> list[Block]:
    """Train; return the blocks after the warm-up."""
    config = Config.from_dict(
        {
            "data": {"features": "image", "label": "label"},
            "model": {"maps": [4, 8], "hidden": 32},
            "optimizer": {"lr": LEARNING_RATE, "momentum": MOMENTUM},
            "engine": {"barrier": case.barrier, "num_workers": WORKERS},
            "solver": {"backup_workers": case.backups},
            "train": {
                "epochs": 1_000,
                "steps": task.warmup_steps + task.blocks * task.block_steps,
                "rows_per_step": task.rows_per_step,
                "num_shards": WORKERS,
            },
        }
    )
    clock = Stopwatch(task, case.what)
    slow = SlowHost(DELAY_S, case.share) if case.share else None
    train(session, config, read_parquet(session, rows), observers=[clock], probe=Probe(before_gradients=slow))
    return clock.blocks


def measure(task: Task) -> list[Block]:
    """Time every case."""
    blocks = []
    with tempfile.TemporaryDirectory() as folder, standalone(Path(folder)) as master:
        rows = str(Path(folder, "rows.parquet"))
        pq.write_table(pq.read_table(task.data).slice(0, ROWS), rows)
        for conf in ({}, _SPECULATION):
            with session_with(conf, master) as session:
                timed(CASES[0], replace(task, block_steps=COLD_STEPS), rows, session)
                for case in CASES:
                    if case.conf == conf:
                        blocks += timed(case, task, rows, session)
    return blocks


if __name__ == "__main__":
    answer(measure)
