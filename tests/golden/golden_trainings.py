"""How golden_runs.py trains: the one file of the golden digests that names sparksgd's modules."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

from golden_runs import DEALS, TOOK_PART, tables
from pyspark.sql import SparkSession

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.spark.train import train as train_on_spark
from sparksgd.training.loop import train as train_inline
from sparksgd.training.replay import Replay


def replay_of(config: Config, data_digest: str) -> Replay | None:
    """Return the made-up run that the experiment with backup workers repeats; None for others."""
    if "backup_workers" not in config.solver.arguments:
        return None
    return Replay(
        config=config.to_dict(), data_digest=data_digest, model_name=config.model.name, took_part=TOOK_PART,
        deals=DEALS, parameters_sha256=None,
    )  # fmt: skip


def run(path: str, engine: str, workers: int, experiment: str) -> tuple[str, str]:
    """Train; return the digests of parameters and buffers."""
    config = Config.from_dict(tables(experiment))
    replay = replay_of(config, digest_of(path))
    if engine == "inline":
        training = train_inline(
            config, rows=ParquetRows(path), test=None, make_engine=InlineEngine, replay=replay
        )
    else:
        settings = replace(
            config.engine,
            name="tree" if engine == "stages" else engine,
            barrier=engine != "stages",
            num_workers=workers,
        )
        rows = session().read.parquet(path)
        training = train_on_spark(session(), replace(config, engine=settings), rows, replay=replay)
    return training.flat.parameters_sha256(), training.flat.buffers_sha256()


@cache
def digest_of(path: str) -> str:
    """Return the digest of the rows, as a training finds it."""
    config = Config.from_dict(tables("synchronous"))
    config = replace(config, train=replace(config.train, steps=1))
    return train_inline(config, rows=ParquetRows(path), test=None, make_engine=InlineEngine).rows.data_digest


@cache
def session() -> SparkSession:
    """Return the one session of this program."""
    return (
        SparkSession.builder.master("local[4]")
        .config("spark.ui.enabled", "false")
        .config("spark.log.level", "ERROR")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.python.daemon.module", "daemon_with_torch")
        .getOrCreate()
    )


def numerics() -> dict[str, object]:
    """Return what the bits depend on beside the experiment."""
    found = asdict(Numerics.here(1))
    return {key: found[key] for key in ("torch", "instruction_set", "arithmetic")}
