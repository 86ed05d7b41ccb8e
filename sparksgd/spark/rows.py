"""A DataFrame's rows, dealt into shards on the executors.

    DataFrame ── checked, cast, hashed ── one shuffle by shard ── sorted by key ── shard files
                 (mapInArrow)                                                     (mapInArrow)

What Spark keeps is an RDD of descriptors with one partition per worker.  Its lineage writes a lost
worker's shards again, inside the very task that needs them.  With placement "in_place" there is no
shuffle: whole partitions are gathered to workers where they are.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
from pyspark import RDD, StorageLevel
from pyspark.errors import AnalysisException
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type
from rich.filesize import decimal

from sparksgd.errors import ClusterError, DataError
from sparksgd.rows import RowReport, RowSchema
from sparksgd.shard import Descriptor
from sparksgd.spark import row_tasks
from sparksgd.spark.cluster import Cluster, cleanup, spark_job, worker_of_partition, worker_shards

__all__ = ["DataFrameRows", "SparkShards", "read_parquet"]

log = logging.getLogger("sparksgd")

_BATCH_BYTES = 8 << 20
_KEYED = "shard int, key binary, record binary"


def read_parquet(session: SparkSession, path: str) -> DataFrame:
    """Return the DataFrame of a Parquet file or folder, or refuse the path."""
    try:
        return session.read.parquet(path)
    except AnalysisException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {path} as Parquet: {reason}") from error


class DataFrameRows:
    """Rows of a DataFrame.

    Args:
        frame: columns of features and of labels, and any others.
        cluster: where the workers are.
        placement: "hashed" or "in_place", as in the configuration.
    """

    def __init__(self, frame: DataFrame, cluster: Cluster, placement: str = "hashed") -> None:
        vectors = [f.name for f in frame.schema.fields if isinstance(f.dataType, VectorUDT)]
        self._frame = frame.withColumns(
            {name: vector_to_array(F.col(_quoted(name)), "float32") for name in vectors}
        )
        self._cluster = cluster
        self._placement = placement
        self._free_bytes: dict[str, int] = {}

    def first_rows(self, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
        """Return the schema of all columns, and the first rows without nulls in these."""
        types = {field.name: field.dataType for field in self._frame.schema.fields}
        wanted = [name for name in dict.fromkeys(columns) if name in types]
        fields = {name: _arrow_type(name, types[name]) for name in wanted}
        with spark_job(self._cluster.context, "reading the first rows"):
            rows = self._frame.select(*map(_quoted, wanted)).dropna().limit(count).collect()
        schema = pa.schema([(name, fields.get(name, pa.null())) for name in types])
        values = {name: pa.array([row[name] for row in rows], fields[name]) for name in wanted}
        return schema, pa.table(values)

    def inspect(self, schema: RowSchema) -> RowReport:
        """Read every row once, and report."""
        report = RowReport()
        with spark_job(self._cluster.context, "checking rows"), self._small_batches(schema):
            found = self._selected(schema).mapInArrow(partial(row_tasks.inspect, schema), "report string")
            for (text,) in found.collect():
                found_here = json.loads(text)
                self._free_bytes |= found_here["free_bytes"]
                report += RowReport.from_json(found_here["report"])
        return report

    def deal(self, schema: RowSchema, num_shards: int, expected: RowReport) -> SparkShards:
        """Write every good row to its shard."""
        self._announce(schema, expected)
        build = self._hashed if self._placement == "hashed" else self._in_place
        return SparkShards(self._cluster, partial(self._built, build, schema, num_shards))

    def _built(
        self,
        build: Callable[[RowSchema, int], RDD[Descriptor]],
        schema: RowSchema,
        num_shards: int,
    ) -> tuple[RDD[Descriptor], list[Descriptor]]:
        with spark_job(self._cluster.context, "dealing rows into shards"), self._small_batches(schema):
            descriptors = build(schema, num_shards)
            return descriptors, sorted(descriptors.collect(), key=lambda shard: shard.shard)

    def _hashed(self, schema: RowSchema, num_shards: int) -> RDD[Descriptor]:
        """Deal by content: one shuffle, each worker's shards in one partition."""
        workers = self._cluster.num_workers
        routes = F.array(*map(F.lit, self._routes(num_shards))).cast("array<long>")
        keyed = self._selected(schema).mapInArrow(partial(row_tasks.keyed, schema, num_shards), _KEYED)
        dealt = keyed.repartition(workers, F.element_at(routes, F.col("shard") + 1))
        return self._written(dealt, schema, num_shards).persist(StorageLevel.MEMORY_AND_DISK)

    def _in_place(self, schema: RowSchema, num_shards: int) -> RDD[Descriptor]:
        """Deal whole partitions to the workers, where they are.

        A barrier stage may not gather partitions, so its lineage is cut by a local checkpoint; what
        is lost is then dealt again as a whole.
        """
        workers, partitions = self._cluster.num_workers, self._frame.rdd.getNumPartitions()
        if partitions < workers:
            raise ClusterError(
                f'data.placement is "in_place", but the data has {partitions} partitions for {workers} '
                f"workers: set engine.num_workers={partitions}, or repartition the data"
            )
        log.warning(
            'data.placement is "in_place": the trajectory depends on the file layout (%d partitions) '
            "and on the %d workers, not on the rows alone",
            partitions,
            workers,
        )
        numbered = self._selected(schema).withColumn("(partition)", F.spark_partition_id())
        keyed = numbered.mapInArrow(partial(row_tasks.keyed, schema, None), _KEYED)
        dealt = self._written(keyed.coalesce(workers), schema, num_shards)
        dealt.persist(StorageLevel.MEMORY_AND_DISK)
        dealt.localCheckpoint()
        return dealt

    def _written(self, dealt: DataFrame, schema: RowSchema, num_shards: int) -> RDD[Descriptor]:
        write = partial(
            row_tasks.write,
            self._cluster.run_id,
            schema.record.itemsize,
            [
                (worker_shards(worker, self._cluster.num_workers, num_shards))
                for worker in worker_of_partition(self._cluster.num_workers)
            ],
            self._placement == "hashed",
        )
        described = dealt.sortWithinPartitions("shard", "key").mapInArrow(write, "descriptor string")
        return described.rdd.mapPartitions(row_tasks.descriptors)

    def _routes(self, num_shards: int) -> list[int]:
        """Return per shard a number that Spark's hash partitioning sends to its worker's partition."""
        workers = self._cluster.num_workers
        numbers = self._cluster.session.range(64 * workers)
        hashed = numbers.select("id", F.pmod(F.hash("id"), F.lit(workers)).alias("partition"))
        number_of = {row["partition"]: row["id"] for row in hashed.collect()}
        partition_of = {
            shard: partition
            for partition, worker in enumerate(worker_of_partition(workers))
            for shard in worker_shards(worker, workers, num_shards)
        }
        return [number_of[partition_of[shard]] for shard in range(num_shards)]

    def _selected(self, schema: RowSchema) -> DataFrame:
        return self._frame.select(*map(_quoted, schema.columns))

    def _announce(self, schema: RowSchema, expected: RowReport) -> None:
        size = expected.rows * schema.record.itemsize
        copies = 2 if self._placement == "hashed" else 1
        free = sum(self._free_bytes.values())
        log.info(
            "writing %s of shards%s to Spark's local directories; free there: %s",
            decimal(size),
            f", after a shuffle of {decimal(size)}" if copies == 2 else "",
            ", ".join(f"{decimal(v)} on {disk.rpartition(':')[0]}" for disk, v in self._free_bytes.items()),
        )
        if copies * size > free:
            raise ClusterError(
                f"the shards need {copies} x {decimal(size)} of local disk, but {decimal(free)} are free: "
                f'give spark.local.dir more, or set data.placement = "in_place", which needs one copy'
            )

    @contextmanager
    def _small_batches(self, schema: RowSchema) -> Iterator[None]:
        """Bound the memory of Arrow batches: 10,000 wide rows at a time would be gigabytes."""
        key, conf = "spark.sql.execution.arrow.maxRecordsPerBatch", self._cluster.session.conf
        before = conf.get(key)
        conf.set(key, str(max(16, min(10_000, _BATCH_BYTES // schema.record.itemsize))))
        try:
            yield
        finally:
            conf.set(key, str(before))


class SparkShards:
    """Shards on the executors' disks.

    `rdd` holds the descriptors, one partition per worker, cut off from what wrote them: every task of
    every step would carry that lineage (49 kB instead of 8, 6 ms a step).  Behind it stands the RDD that
    has it, and from which lost shards are written again.

    Args:
        cluster: where they are.
        build: writes them, and returns the RDD of descriptors with all descriptors in order.
    """

    def __init__(
        self, cluster: Cluster, build: Callable[[], tuple[RDD[Descriptor], list[Descriptor]]]
    ) -> None:
        self._cluster = cluster
        self._build = build
        self._written, self.table = build()
        self.rdd = self._cut_off()
        self._folders = {row_tasks.local_folder(shard) for shard in self.table}

    def moved(self, shard: Descriptor) -> None:
        """Note where a shard was written again."""
        self.table[shard.shard] = shard
        self._folders.add(row_tasks.local_folder(shard))

    def recover(self, *, files_missing: bool) -> None:
        """Write again what was lost.

        Args:
            files_missing: a file is gone though its descriptor is there, so no descriptor can be trusted;
                otherwise Spark knows what went with an executor, and writes only that.
        """
        self._cluster.context.setJobDescription("sparksgd: writing lost shards again")
        self.rdd.unpersist(blocking=True)
        if self._written.isLocallyCheckpointed():
            self._written.unpersist(blocking=True)
            self._written, _ = self._build()
        elif files_missing:
            self._written.unpersist(blocking=True)
            self._written.persist(StorageLevel.MEMORY_AND_DISK)
        self.rdd = self._cut_off()

    def _cut_off(self) -> RDD[Descriptor]:
        descriptors = self._written.mapPartitions(list)
        descriptors.persist(StorageLevel.MEMORY_AND_DISK)
        descriptors.localCheckpoint()
        descriptors.count()
        return descriptors

    def close(self) -> None:
        """Remove the files of all executors, the descriptors, and the shuffle behind them."""
        try:
            self._cluster.context.setJobDescription("sparksgd: removing shards")
            if self._cluster.slots():
                remove = partial(row_tasks.remove, sorted(self._folders), self._cluster.run_id)
                self.rdd.mapPartitions(remove).count()
        except Exception as error:
            log.warning("shard files remain until the application ends: %s", str(error).splitlines()[0])
        finally:
            with cleanup():
                self.rdd.unpersist()
                self._written.unpersist()
                del self.rdd, self._written, self._build
                gc.collect()  # lets go of the JVM's objects, whose shuffle files Spark then removes
                self._cluster.jvm.System.gc()


def _quoted(column: str) -> str:
    return "`" + column.replace("`", "``") + "`"


def _arrow_type(name: str, kind: Any) -> pa.DataType:
    try:
        return to_arrow_type(kind)
    except Exception as error:
        raise DataError(f"column {name!r} is {kind.simpleString()}, which Arrow has no type for") from error
