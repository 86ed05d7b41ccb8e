"""`sparksgd.deal`: rows that several trainings share, which are checked and dealt only once.

    with sparksgd.deal(frame) as rows:
        for lr in (0.01, 0.1):
            sparksgd.train({"optimizer": {"lr": lr}}, rows, module=make())

The first training deals the rows; the next ones that ask for the same shards take these.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
from pyspark.sql import DataFrame

from sparksgd.config import TrainConfig
from sparksgd.data.held_out import Side
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.data.source import Shards
from sparksgd.errors import ConfigError
from sparksgd.spark.frame_rows import DataFrameRows, read_parquet
from sparksgd.spark.given_rows import frame_or_path
from sparksgd.spark.session import start_session

if TYPE_CHECKING:
    from sparksgd.spark.cluster.cluster import Cluster
    from sparksgd.spark.cluster.shards import SparkShards

__all__ = ["SharedRows", "deal"]

log = logging.getLogger("sparksgd")


class SharedRows:
    """Rows of a DataFrame that trainings in its session share, until `close` or the end of a `with` block.

    Shards are kept apart by what shapes them: columns, the side that is held out, placement, the number of
    shards and of workers.

    Args:
        frame: the rows; it must give the same ones on every reading, as for one training.
    """

    def __init__(self, frame: DataFrame) -> None:
        self.frame = frame
        self._lock = RLock()
        self._reports: dict[tuple[Any, ...], RowReport] = {}
        self._shards: dict[tuple[Any, ...], SparkShards] = {}
        self._is_closed = False

    def source(self, cluster: Cluster, placement: str = "hashed", side: Side | None = None) -> _Source:
        """Return the rows for one training.

        Raises:
            ConfigError: they are closed.
        """
        if self._is_closed:
            raise ConfigError(
                "rows are of a sparksgd.deal(...) that is closed: train inside its `with` block"
            )
        return _Source(self, cluster, placement, side)

    def close(self) -> None:
        """Remove the shards; the rows can be trained on no more."""
        with self._lock:
            self._is_closed = True
            while self._shards:
                self._shards.popitem()[1].remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Source:
    """Shared rows, as one training reads and deals them."""

    def __init__(self, shared: SharedRows, cluster: Cluster, placement: str, side: Side | None) -> None:
        self._shared, self._rows = shared, DataFrameRows(shared.frame, cluster, placement, side)
        self._how = placement, side
        self._workers = cluster.num_workers

    def first_rows(self, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
        """Return the schema of all columns, and the first rows without nulls in these."""
        return self._rows.first_rows(columns, count)

    def inspect(self, schema: RowSchema, num_shards: int) -> RowReport:
        """Return the report on every row; they are read the first time."""
        key, known = (schema, num_shards, *self._how), self._shared._reports
        with self._shared._lock:
            if key not in known:
                known[key] = self._rows.inspect(schema, num_shards)
            return copy.deepcopy(known[key])

    def deal(self, schema: RowSchema, num_shards: int, expected: RowReport, deal: int = 0) -> Shards:
        """Return the shards; they are written the first time, and where starved rows are dealt anew."""
        if deal:
            return self._rows.deal(schema, num_shards, expected, deal)
        key, known = (schema, num_shards, self._workers, *self._how), self._shared._shards
        with self._shared._lock:
            if key in known:
                log.info("these rows were dealt before: their shards are used again")
            else:
                known[key] = self._rows.deal(schema, num_shards, expected)
                known[key].is_shared = True
            return known[key]


def deal(rows: DataFrame | str | Path) -> SharedRows:
    """Return rows that several trainings share: they are checked and dealt into shards only once.

    Pass the result to `sparksgd.train`, as rows or as test, inside its `with` block, at whose end the shards
    are removed.  A training that asks for other columns, or another number of shards, deals them once more.

    Args:
        rows: a DataFrame, or a path or URI of Parquet, which is read in the active session; if there is none,
            one is started, and left running.

    Raises:
        ConfigError: rows is something else.
        DataError: the Parquet cannot be read.
        ClusterError: the session is Spark Connect.
    """
    given = frame_or_path("rows", rows)
    if isinstance(given, str):
        given = read_parquet(start_session("sparksgd", TrainConfig()), given)
    return SharedRows(given)
