"""A DataFrame's rows, dealt into shards on the executors.

    DataFrame ── checked, cast, hashed ── one shuffle by shard ── sorted by key ── shard files
                 (mapInArrow)                                                     (mapInArrow)

What Spark keeps is an RDD of descriptors with one partition per worker, whose lineage writes lost
shards again.  With placement "in_place" there is no shuffle: whole partitions are gathered into shards,
and shards to workers, where they are.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark import RDD, StorageLevel
from pyspark.errors import AnalysisException
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type
from rich.filesize import decimal

from sparksgd.errors import ClusterError, ConfigError, DataError, ShardChanged
from sparksgd.ranges import balanced_range
from sparksgd.rows import RowReport, RowSchema
from sparksgd.shard import Descriptor
from sparksgd.spark import row_tasks
from sparksgd.spark.cluster import Cluster, cleanup, gist, spark_job, worker_of_partition
from sparksgd.storage import has_scheme

__all__ = [
    "DataFrameRows",
    "SparkShards",
    "first_rows",
    "read_parquet",
    "selected",
    "small_batches",
    "without_vectors",
]

log = logging.getLogger("sparksgd")

_BATCH_BYTES = 8 << 20
_INPUT_GONE = re.compile(r"FILE_NOT_EXIST|PATH_NOT_FOUND|underlying files have been updated")
_ROW_OVERHEAD_BYTES = 88  # shard, key of two hashes, and how Spark's rows hold them
_KEYED = "shard int, key binary, record binary"


def read_parquet(session: SparkSession, path: str) -> DataFrame:
    """Return the DataFrame of a Parquet file or folder, or refuse the path.

    Args:
        session: reads it.
        path: of this machine where it has no scheme, as every path here, whatever fs.defaultFS is.
    """
    uri = path if has_scheme(path) else f"file:{Path(path).absolute()}"
    with spark_job(session.sparkContext, f"reading the columns of {path}"):
        try:
            return session.read.parquet(uri)
        except AnalysisException as error:
            reason = str(error).splitlines()[0]
            default = session.sparkContext._jsc.hadoopConfiguration().get("fs.defaultFS", "file:///")
            if uri != path and not default.startswith("file:"):
                reason += f". A path without a scheme is of the driver's machine; else write {default}/..."
            raise DataError(f"cannot read {path} as Parquet: {reason}") from error


def without_vectors(frame: DataFrame) -> DataFrame:
    """Return the frame with Spark ML's vectors as arrays."""
    vectors = [f.name for f in frame.schema.fields if isinstance(f.dataType, VectorUDT)]
    return frame.withColumns({name: vector_to_array(F.col(_quoted(name)), "float32") for name in vectors})


def first_rows(frame: DataFrame, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
    """Return the schema of all columns, and the first rows without nulls in these."""
    types = {field.name: field.dataType for field in frame.schema.fields}
    wanted = [name for name in dict.fromkeys(columns) if name in types]
    fields = {name: _arrow_type(name, types[name]) for name in wanted}
    with spark_job(frame.sparkSession.sparkContext, "reading the first rows"):
        complete = frame.select(*map(_quoted, wanted))
        for name in wanted:
            complete = complete.where(F.col(_quoted(name)).isNotNull())  # dropna() trips over dots in names
        rows = complete.limit(count).collect()
    schema = pa.schema([(name, fields.get(name, pa.null())) for name in types])
    return schema, pa.table({name: pa.array([row[name] for row in rows], fields[name]) for name in wanted})


def selected(frame: DataFrame, schema: RowSchema) -> DataFrame:
    """Return the schema's columns, by their numbers: mapInArrow trips over dots in names."""
    return frame.select(
        *(F.col(_quoted(name)).alias(str(number)) for number, name in enumerate(schema.columns))
    )


@contextmanager
def small_batches(session: SparkSession, schema: RowSchema) -> Iterator[None]:
    """Bound the memory of Arrow batches: 10,000 wide rows at a time would be gigabytes."""
    key = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before, context = session.conf.get(key), session.sparkContext
    rows = str(max(16, min(10_000, _BATCH_BYTES // schema.record.itemsize)))
    session.conf.set(key, rows)
    context.setLocalProperty(key, rows)  # what tasks before a shuffle see, where an RDD's job runs them
    try:
        yield
    finally:
        session.conf.set(key, str(before))
        context.setLocalProperty(key, None)  # type: ignore[arg-type]  # clears it; pyspark's type says str


class DataFrameRows:
    """Rows of a DataFrame.

    Args:
        frame: columns of features and of labels, and any others.
        cluster: where the workers are.
        placement: "hashed" or "in_place", as in the configuration.
    """

    def __init__(self, frame: DataFrame, cluster: Cluster, placement: str = "hashed") -> None:
        self._frame = without_vectors(frame)
        self._cluster = cluster
        self._placement = placement

    def first_rows(self, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
        """Return the schema of all columns, and the first rows without nulls in these."""
        with self._cluster.job_watch.over(1):
            return first_rows(self._frame, columns, count)

    def inspect(self, schema: RowSchema, num_shards: int) -> RowReport:
        """Read every row once, and report."""
        report = RowReport()
        dealt_into = num_shards if self._placement == "hashed" else None
        with self._job("checking rows"), small_batches(self._cluster.session, schema):
            found = selected(self._frame, schema).mapInArrow(
                partial(row_tasks.inspect, schema, dealt_into), "report string"
            )
            for (text,) in found.collect():
                report += RowReport.from_json(json.loads(text))
        return report

    def deal(self, schema: RowSchema, num_shards: int, expected: RowReport, deal: int = 0) -> SparkShards:
        """Write every good row to its shard."""
        self._announce(schema, expected)
        hashed = self._placement == "hashed"
        write = partial(self._hashed, deal) if hashed else self._in_place
        deal_id = f"{self._cluster.run_id}-{uuid.uuid4().hex[:6]}"
        with self._job("dealing rows into shards"), small_batches(self._cluster.session, schema):
            return SparkShards(
                self._cluster, write(schema, num_shards, deal_id), schema, deal_id, shuffled=hashed
            )

    def _hashed(self, deal: int, schema: RowSchema, num_shards: int, deal_id: str) -> RDD[Descriptor]:
        """Deal by content: one shuffle, each worker's shards in one partition."""
        workers = self._cluster.num_workers
        routes = F.array(*map(F.lit, self._routes(num_shards))).cast("array<long>")
        dealt = self._keyed(selected(self._frame, schema), schema, num_shards, deal).repartition(
            workers, F.element_at(routes, F.col("shard") + 1)
        )
        owned = [balanced_range(worker, workers, num_shards) for worker in worker_of_partition(workers)]
        return self._written(dealt, schema, owned, deal_id).mapPartitions(row_tasks.descriptors)

    def _in_place(self, schema: RowSchema, num_shards: int, deal_id: str) -> RDD[Descriptor]:
        """Deal whole partitions, gathered where they are: each shard first, then each worker's shards."""
        gathered = selected(self._frame, schema).coalesce(num_shards)
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
        return rows.mapInArrow(partial(row_tasks.keyed, schema, num_shards, deal), _KEYED)

    def _written(
        self, dealt: DataFrame, schema: RowSchema, owned: list[range] | None, deal_id: str
    ) -> RDD[Row]:
        write = partial(row_tasks.write, deal_id, schema.record.itemsize, owned)
        return dealt.sortWithinPartitions("shard", "key").mapInArrow(write, "descriptor string").rdd

    def _routes(self, num_shards: int) -> list[int]:
        """Return per shard a number that Spark's hash partitioning sends to its worker's partition."""
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
        """Say what will be written where, and refuse what cannot fit."""
        size = expected.rows * schema.record.itemsize
        passing = size + expected.rows * _ROW_OVERHEAD_BYTES
        way = "a shuffle" if self._placement == "hashed" else "a sort"
        with spark_job(self._cluster.context, "looking for free space"):
            free_bytes = dict(self._cluster.visit(row_tasks.free_bytes))
        free = sum(free_bytes.values())
        log.info(
            "writing %s of shards, after %s of %s, to Spark's local directories; free there: %s",
            decimal(size),
            way,
            decimal(passing),
            ", ".join(f"{decimal(v)} on {disk.rpartition(':')[0]}" for disk, v in free_bytes.items()),
        )
        if size + passing > free:
            raise ClusterError(
                f"the shards need {decimal(size)} of local disk, and {way} before them "
                f"{decimal(passing)}, but {decimal(free)} are free: give spark.local.dir more"
            )

    @contextmanager
    def _job(self, doing: str) -> Iterator[None]:
        with spark_job(self._cluster.context, doing), self._cluster.job_watch.over(1):
            yield


class SparkShards:
    """Shards on the executors' disks.

    `rdd` holds the descriptors, one partition per worker, cut off from what wrote them: every task of
    every step would carry that lineage (49 kB instead of 8, 6 ms a step), and a barrier stage may not
    gather partitions.  Behind it stands the RDD that has it, from which lost shards are written again.

    Args:
        cluster: where they are.
        written: writes the shards as its partitions are computed, and holds their descriptors.
        schema: what its rows are.
        deal_id: names the folders of their files.
        shuffled: whether the last shuffle behind it is ours, and goes with the shards.
    """

    def __init__(
        self, cluster: Cluster, written: RDD[Descriptor], schema: RowSchema, deal_id: str, *, shuffled: bool
    ) -> None:
        self._cluster = cluster
        self._schema = schema
        self._deal_id = deal_id
        self._shuffled = shuffled
        self._written = written.persist(StorageLevel.MEMORY_AND_DISK)
        self._partition_of: dict[int, int] = {}
        self.table: list[Descriptor] = []
        try:
            self.rdd, self.table = self._cut_off()
        except BaseException:
            self.close()
            raise

    @property
    def partition_of(self) -> dict[int, int]:
        """Which partition each shard is in."""
        return dict(self._partition_of)

    def places(self) -> list[str | None]:
        """Return where each partition's shards are, as Spark names places; None where it does not know."""
        return [self._cluster.place_of(self.rdd, number) for number in range(self.rdd.getNumPartitions())]

    def recover(self, missing: Collection[int]) -> int:
        """Write again what was lost, and return how many shards that were.

        Args:
            missing: shards whose file is gone though Spark still has their descriptor; what went with
                an executor Spark knows itself.

        Raises:
            ShardChanged: a shard now holds other rows, or its input is gone.
        """
        self._cluster.context.setJobDescription("sparksgd: writing lost shards again")
        self._cluster.unpersist(self.rdd)
        for partition in {self._partition_of[shard] for shard in missing}:
            self._cluster.drop_block(self._written, partition)
        before = self.table
        lost = [
            shard
            for shard, partition in sorted(self._partition_of.items())
            if not self._cluster.has_block(self._written, partition)
        ]
        try:
            with small_batches(self._cluster.session, self._schema):
                self.rdd, self.table = self._cut_off()
        except Exception as error:
            if _INPUT_GONE.search(str(error)) is None:
                raise
            raise ShardChanged(
                f"shard {', '.join(map(str, lost))} was lost, and cannot be written again: files of the "
                f"input are gone. Something rewrote the table while training ran: train on a copy of it"
            ) from error
        moved = []
        for old, new in zip(before, self.table, strict=True):
            if new.digest != old.digest:
                raise ShardChanged(
                    f"shard {new.shard} was lost and written again, but now holds other rows: "
                    f"{new.rows:,} (digest {new.digest}) where it held {old.rows:,} (digest "
                    f"{old.digest}). The input changed while training ran, or gives other rows on "
                    f"every reading: write it to Parquet first, and train on that"
                )
            if new.path != old.path:
                moved.append(old)
        if moved:
            with cleanup():
                self._remove(partial(row_tasks.remove, [shard.path for shard in moved]), moved)
        return len(moved)

    def close(self) -> None:
        """Remove the files of all executors, the descriptors, and the shuffle behind them."""
        if self._cluster.is_stopped():
            return  # and Spark removes its local directories
        try:
            self._cluster.context.setJobDescription("sparksgd: removing shards")
            folders = sorted({str(Path(shard.path).parent) for shard in self.table})
            self._remove(partial(row_tasks.remove_deal, self._deal_id, folders), self.table)
        except Exception as error:
            if self._cluster.is_stopped():
                return
            log.warning("shard files remain until the application ends: %s", gist(str(error)))
        with cleanup():
            if self.table:
                self._cluster.unpersist(self.rdd)
            self._cluster.unpersist(self._written)
            if self._shuffled:
                self._cluster.remove_shuffle(self._written)

    def _cut_off(self) -> tuple[RDD[Descriptor], list[Descriptor]]:
        """Return the short copy of the descriptors, writing what is not there, and all of them in order."""
        descriptors = self._written.mapPartitions(list)
        descriptors.persist(StorageLevel.MEMORY_AND_DISK)
        descriptors.localCheckpoint()
        partitions = descriptors.glom().collect()
        self._partition_of = {
            shard.shard: number for number, shards in enumerate(partitions) for shard in shards
        }
        return descriptors, sorted(chain.from_iterable(partitions), key=lambda shard: shard.shard)

    def _remove(self, task: Callable[[Iterable[int]], Iterator[str]], shards: Sequence[Descriptor]) -> None:
        hosts = set(self._cluster.visit(task))
        left = sorted({shard.host for shard in shards} - hosts)
        if left:
            log.warning(
                "shard files remain on %s until the application ends: no slot was free there", ", ".join(left)
            )


def _quoted(column: str) -> str:
    """Return a column's name as Spark's expressions take it, dots and all."""
    return "`" + column.replace("`", "``") + "`"


def _arrow_type(name: str, kind: Any) -> pa.DataType:
    try:
        return to_arrow_type(kind)
    except Exception as error:
        raise DataError(f"column {name!r} is {kind.simpleString()}, which Arrow has no type for") from error
