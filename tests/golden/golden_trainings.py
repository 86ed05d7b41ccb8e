"""How golden_runs.py trains: the one file of the golden digests that names sparksgd's modules."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

from golden_runs import DEALS, TOOK_PART, tables
from pyspark.sql import SparkSession

from sparksgd.config import Config
from sparksgd.engines.inline import InlineEngine
from sparksgd.local_rows import ParquetRows
from sparksgd.numerics import Numerics
from sparksgd.participation import Record
from sparksgd.spark.training import train as train_on_spark
from sparksgd.training import train as train_inline


def record_of(config: Config, data_digest: str) -> Record | None:
    """Return the made-up record of the experiment with backup workers; None for others."""
    if not config.solver.backup_workers:
        return None
    return Record(
        config=config.to_dict(), data_digest=data_digest, model_name=config.model.name, took_part=TOOK_PART,
        deals=DEALS, parameters_sha256=None,
    )  # fmt: skip


def run(path: str, engine: str, workers: int, experiment: str) -> tuple[str, str]:
    """Train; return the digests of parameters and buffers."""
    config = Config.from_dict(tables(experiment))
    record = record_of(config, digest_of(path))
    if engine == "inline":
        training = train_inline(
            config, rows=ParquetRows(path), test=None, make_engine=InlineEngine, record=record
        )
    else:
        settings = replace(
            config.engine,
            name="tree" if engine == "stages" else engine,
            barrier=engine != "stages",
            num_workers=workers,
        )
        rows = session().read.parquet(path)
        training = train_on_spark(session(), replace(config, engine=settings), rows, record=record)
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
        .getOrCreate()
    )


def numerics() -> dict[str, object]:
    """Return what the bits depend on beside the experiment."""
    found = asdict(Numerics.here(1))
    return {key: found[key] for key in ("torch", "instruction_set", "arithmetic")}
