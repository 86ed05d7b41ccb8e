"""A DataFrame's rows, dealt into shards on the executors.

    DataFrame ── checked, cast, hashed ── one shuffle by shard ── sorted by key ── shard files
                 (mapInArrow)                                                     (mapInArrow)

Spark keeps an RDD of descriptors with one partition for each worker.  Its lineage writes lost shards again.
With placement "in_place" there is no shuffle: whole partitions become shards where they are, and shards of
one place are gathered to a worker.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark import RDD
from pyspark.errors import AnalysisException
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type
from pyspark.sql.types import (
    ArrayType,
    ByteType,
    IntegerType,
    ShortType,
    StructField,
    StructType,
    TimestampType,
)
from rich.filesize import decimal

from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.data.held_out import Side
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.data.shard import Descriptor, stored
from sparksgd.data.tables import refuse_tables, table_of
from sparksgd.errors import ClusterError, ConfigError, DataError
from sparksgd.spark.cluster.arrow_batches import small_batches
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.jobs import spark_job
from sparksgd.spark.cluster.placement import worker_of_partition
from sparksgd.spark.cluster.shards import SparkShards
from sparksgd.spark.tasks import row_tasks
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.storage import has_scheme
from sparksgd.storage.processes import this_process
from sparksgd.storage.scratch import remove_left

__all__ = [
    "DataFrameRows",
    "array_of_vector",
    "arrow_type",
    "disk_bytes",
    "first_rows",
    "namesakes",
    "quoted",
    "read_parquet",
    "refuse_namesakes",
    "require_disk",
    "selected",
    "without_vectors",
]

log = logging.getLogger("sparksgd")

_ROW_OVERHEAD_BYTES = 88  # shard, key of two hashes, record; and the same as a Spark schema
_LEAVES_OUT = ("spark.sql.files.ignoreCorruptFiles", "spark.sql.files.ignoreMissingFiles")
_ROOTS_LOOKED_AT = 8
_KEYED = "shard int, key binary, record binary"


def read_parquet(session: SparkSession, path: str) -> DataFrame:
    """Return the DataFrame of a Parquet file or folder, or refuse the path.

    Args:
        session: reads it.
        path: a path without a scheme is on this machine, whatever fs.defaultFS is.

    Raises:
        DataError: it is no Parquet, or a table with a log, see `refuse_tables`.
    """
    lead_to_hadoop()
    refuse_tables(path, by_spark=True)
    uri = path if has_scheme(path) else f"file:{Path(path).absolute()}"
    with spark_job(session.sparkContext, f"reading the columns of {path}"):
        try:
            frame = session.read.parquet(uri)
            columns = _without_small_integers(frame.schema)
            return frame if columns == frame.schema else session.read.schema(columns).parquet(uri)
        except AnalysisException as error:
            reason = str(error).splitlines()[0]
            default = session.sparkContext._jsc.hadoopConfiguration().get("fs.defaultFS", "file:///")
            if uri != path and not default.startswith("file:"):
                reason += f". A path without a scheme is of the driver's machine; else write {default}/..."
            raise DataError(f"cannot read {path} as Parquet: {reason}") from error


def _without_small_integers(columns: StructType) -> StructType:
    """Return the columns with bytes and shorts as integers.

    If the first file of a folder has bytes where another has integers, Spark reads the lowest bits of these.
    """
    small = (ByteType, ShortType)
    wide = []
    for field in columns.fields:
        kind = field.dataType
        if isinstance(kind, small):
            kind = IntegerType()
        elif isinstance(kind, ArrayType) and isinstance(kind.elementType, small):
            kind = ArrayType(IntegerType(), kind.containsNull)
        wide.append(StructField(field.name, kind, field.nullable, field.metadata))
    return StructType(wide)


def without_vectors(frame: DataFrame) -> DataFrame:
    """Return the frame with its Spark ML vectors turned into arrays."""
    vectors = [
        field.name
        for field in frame.schema.fields
        if isinstance(field.dataType, VectorUDT) and len(namesakes(frame, field.name)) == 1
    ]
    return frame.withColumns({name: array_of_vector(F.col(quoted(name))) for name in vectors})


def array_of_vector(column: Column) -> Column:
    """Return a column of Spark ML vectors as arrays of floats."""
    return F.when(column.isNotNull(), vector_to_array(column, "float32"))  # it raises where one is null


def first_rows(frame: DataFrame, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
    """Return the schema of all columns, and the first rows without nulls in these.

    Raises:
        DataError: the frame is a stream, or has several columns of one of these names.
    """
    if frame.isStreaming:
        raise DataError(
            "the DataFrame is a stream, but every row must be read more than once: write it to a table, and "
            "train on that, or call train() from foreachBatch"
        )
    refuse_namesakes(frame, columns)
    _warn_of_tables(frame)
    types = {field.name: field.dataType for field in frame.schema.fields}
    wanted = [name for name in dict.fromkeys(columns) if name in types]
    fields = {name: arrow_type(name, types[name]) for name in wanted}
    with spark_job(frame.sparkSession.sparkContext, "reading the first rows"):
        complete = frame.select(*map(quoted, wanted))
        for name in wanted:
            complete = complete.where(F.col(quoted(name)).isNotNull())  # dropna() fails on dots in names
        rows = complete.limit(count).collect()
    schema = pa.schema([(name, fields.get(name, pa.null())) for name in types])
    return schema, pa.table({name: pa.array([row[name] for row in rows], fields[name]) for name in wanted})


def refuse_namesakes(frame: DataFrame, columns: Iterable[str]) -> None:
    """Refuse a frame that has several columns of one of these names."""
    for name in columns:
        if len(found := namesakes(frame, name)) > 1:
            raise DataError(
                f"the data has {len(found)} columns of the name {name!r}: "
                f"{', '.join(map(repr, found))}. Spark tells upper from lower case only if "
                f"spark.sql.caseSensitive is true. Rename all but one"
            )


def selected(frame: DataFrame, schema: RowSchema, more: Iterable[str] = ()) -> DataFrame:
    """Return the columns of the schema and some more, as numbers: mapInArrow fails on dots in names."""
    columns = enumerate([*schema.columns, *more])
    return frame.select(*(F.col(quoted(name)).alias(str(number)) for number, name in columns))


def _warn_of_tables(frame: DataFrame) -> None:
    """Warn of files of a table with a log that the frame reads as plain Parquet.

    It is the caller's own reading, and may be meant, so it is not refused.
    """
    for path in _plain_parquet(frame)[:_ROOTS_LOOKED_AT]:
        try:
            found = table_of(path, by_spark=True)
        except OSError:
            continue  # Spark will say so
        if found is not None:
            log.warning("the DataFrame reads plain Parquet, but %s", found)


def _plain_parquet(frame: DataFrame) -> list[str]:
    """Return the paths that a frame reads as plain Parquet, without any table's log."""
    paths = []
    leaves = frame._jdf.queryExecution().analyzed().collectLeaves()
    for leaf in map(leaves.apply, range(leaves.size())):
        if leaf.getClass().getSimpleName() != "LogicalRelation":
            continue
        relation = leaf.relation()
        if relation.getClass().getSimpleName() != "HadoopFsRelation":
            continue
        kinds = (
            relation.location().getClass().getSimpleName(),
            relation.fileFormat().getClass().getSimpleName(),
        )
        if kinds == ("InMemoryFileIndex", "ParquetFileFormat"):
            roots = relation.location().rootPaths()
            paths += [str(root.toString()) for root in map(roots.apply, range(roots.size()))]
    return paths


def namesakes(frame: DataFrame, name: str) -> list[str]:
    """Return the columns that Spark takes for one of this name."""
    if str(frame.sparkSession.conf.get("spark.sql.caseSensitive")).lower() == "true":
        return [column for column in frame.columns if column == name]
    return [column for column in frame.columns if column.lower() == name.lower()]


class DataFrameRows:
    """Rows of a DataFrame.

    Args:
        frame: has the columns of features and label, and maybe others.
        cluster: where the workers are.
        placement: "hashed" or "in_place", as in the configuration.
        side: the only rows of it that count; None: all of them.
    """

    def __init__(
        self, frame: DataFrame, cluster: Cluster, placement: str = "hashed", side: Side | None = None
    ) -> None:
        self._frame = without_vectors(frame)
        self._cluster = cluster
        self._placement = placement
        self._side = side

    def first_rows(self, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
        """Return the schema of all columns, and the first rows without nulls in these."""
        with self._cluster.job_watch.over(1):
            return first_rows(self._frame, columns, count)

    def inspect(self, schema: RowSchema, num_shards: int) -> RowReport:
        """Read every row once; return the report."""
        for key in _LEAVES_OUT:
            if str(self._cluster.session.conf.get(key, "false")).lower() == "true":
                log.warning("%s is true: Spark leaves out files that it cannot read, and says nothing", key)
        report = RowReport()
        rows, dealt_into = self._selected(schema), num_shards if self._placement == "hashed" else None
        if dealt_into is None:
            rows = rows.coalesce(num_shards)  # as they are dealt
        with self._job("checking rows"), small_batches(self._cluster.session, schema):
            found = rows.mapInArrow(
                partial(row_tasks.inspect, schema, self._side, dealt_into), "report string"
            )
            for (text,) in found.collect():
                report += RowReport.from_json(json.loads(text))
        if dealt_into is None and self._is_cached():
            report.shard_digests.clear()  # Spark gathers cached partitions by where they lie then
        return report

    def _is_cached(self) -> bool:
        """Return whether some of the rows come from Spark's cache."""
        plan = self._frame._jdf.queryExecution().withCachedData()
        return "InMemoryRelation" in str(plan.toString())

    def deal(self, schema: RowSchema, num_shards: int, expected: RowReport, deal: int = 0) -> SparkShards:
        """Write every good row to its shard."""
        self._announce(schema, expected)
        hashed = self._placement == "hashed"
        write = partial(self._hashed, deal) if hashed else self._in_place
        deal_id = f"{self._cluster.run_id}-{uuid.uuid4().hex[:6]}"
        with self._job("dealing rows into shards"), small_batches(self._cluster.session, schema):
            written = write(schema, num_shards, deal_id)
            shards = SparkShards(self._cluster, written, schema, deal_id, shuffled=hashed)
            shards.write()
        return shards

    def _hashed(self, deal: int, schema: RowSchema, num_shards: int, deal_id: str) -> RDD[Descriptor]:
        """Deal the rows by their content, in one shuffle; each worker's shards are in one partition."""
        workers = self._cluster.num_workers
        routes = F.array(*map(F.lit, self._routes(num_shards))).cast("array<long>")
        dealt = self._keyed(self._selected(schema), schema, num_shards, deal).repartition(
            workers, F.element_at(routes, F.col("shard") + 1)
        )
        owned = [balanced_range(worker, workers, num_shards) for worker in worker_of_partition(workers)]
        return self._written(dealt, schema, owned, deal_id).mapPartitions(row_tasks.descriptors)

    def _in_place(self, schema: RowSchema, num_shards: int, deal_id: str) -> RDD[Descriptor]:
        """Deal whole partitions, without a shuffle: gather each shard, then the shards of each worker."""
        gathered = self._selected(schema).coalesce(num_shards)
        written = self._written(self._keyed(gathered, schema, 1, 0), schema, None, deal_id)
        if (partitions := written.getNumPartitions()) < num_shards:
            raise ConfigError(
                f'data.placement is "in_place", but the data has {partitions} partitions for '
                f"{num_shards} shards: set train.num_shards={partitions}, or repartition the data"
            )
        log.warning(
            'data.placement is "in_place": the trajectory depends on how the files lie, and on how many '
            "cores Spark splits them for, not on the rows alone",
        )
        return written.mapPartitionsWithIndex(row_tasks.numbered).coalesce(self._cluster.num_workers)

    def _keyed(self, rows: DataFrame, schema: RowSchema, num_shards: int, deal: int) -> DataFrame:
        return rows.mapInArrow(partial(row_tasks.keyed, schema, self._side, num_shards, deal), _KEYED)

    def _selected(self, schema: RowSchema) -> DataFrame:
        return selected(self._frame, schema, self._side.columns if self._side else ())

    def _written(
        self, dealt: DataFrame, schema: RowSchema, owned: list[range] | None, deal_id: str
    ) -> RDD[Row]:
        of_driver = (this_process(), self._cluster.context.applicationId)
        write = partial(row_tasks.write, *of_driver, deal_id, schema.record.itemsize, owned)
        return dealt.sortWithinPartitions("shard", "key").mapInArrow(write, "descriptor string").rdd

    def _routes(self, num_shards: int) -> list[int]:
        """Return for each shard a number that Spark's hash partitioning sends to the worker's partition."""
        workers = self._cluster.num_workers
        numbers = self._cluster.session.range(64 * workers)
        hashed = numbers.select("id", F.pmod(F.hash("id"), F.lit(workers)).alias("partition"))
        number_of = {row["partition"]: row["id"] for row in hashed.collect()}
        partition_of = {
            shard: partition
            for partition, worker in enumerate(worker_of_partition(workers))
            for shard in balanced_range(worker, workers, num_shards)
        }
        return [number_of[partition_of[shard]] for shard in range(num_shards)]

    def _announce(self, schema: RowSchema, expected: RowReport) -> None:
        """Log what will be written and where, and refuse what cannot fit."""
        size, passing = disk_bytes(schema, expected.rows)
        with spark_job(self._cluster.context, "looking for free space"):
            disks = self._cluster.visit(row_tasks.look_at_disks)
        free_bytes = {disk: free for disk, free, _ in disks}
        left = remove_left() + sum(count for _, _, count in disks)
        if left:
            log.info("removed %d folders that killed runs had left on local disks", left)
        log.info(
            "writing %s of shards, after %s of %s, to Spark's local directories; free there: %s",
            decimal(size),
            _way(self._placement),
            decimal(passing),
            ", ".join(f"{decimal(v)} on {disk.rpartition(':')[0]}" for disk, v in free_bytes.items()),
        )
        require_disk(size, passing, sum(free_bytes.values()), self._placement)

    @contextmanager
    def _job(self, doing: str) -> Iterator[None]:
        with spark_job(self._cluster.context, doing), self._cluster.job_watch.over(1):
            yield


def disk_bytes(schema: RowSchema, rows: int) -> tuple[int, int]:
    """Return what shards of these rows take on the executors' disks, and what passes there before them."""
    return rows * stored(schema.record).itemsize, rows * (schema.record.itemsize + _ROW_OVERHEAD_BYTES)


def require_disk(size: int, passing: int, free: int, placement: str) -> None:
    """Refuse shards that do not fit on the executors' disks.

    Args:
        size: bytes of the shards.
        passing: bytes of the shuffle or sort before them.
        free: bytes that are free there.
        placement: hashed, by a shuffle, or in_place, by a sort.

    Raises:
        ClusterError: with the arithmetic.
    """
    if size + passing > free:
        raise ClusterError(
            f"the shards need {decimal(size)} of local disk, and {_way(placement)} before them "
            f"{decimal(passing)}, but {decimal(free)} are free: give spark.local.dir more"
        )


def _way(placement: str) -> str:
    return "a shuffle" if placement == "hashed" else "a sort"


def quoted(column: str) -> str:
    """Return a column's name for an expression of Spark, quoted, because it may have dots."""
    return "`" + column.replace("`", "``") + "`"


def arrow_type(name: str, kind: Any) -> pa.DataType:
    if isinstance(kind, TimestampType):
        return pa.timestamp("us", "UTC")
    try:
        return to_arrow_type(kind)
    except Exception as error:
        raise DataError(f"column {name!r} is {kind.simpleString()}, which Arrow has no type for") from error
