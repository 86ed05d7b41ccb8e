"""What executors run on rows: check them, key them, write them to shard files.

No pyspark and no torch at module level: executors import this before either.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparksgd.data.held_out import Side
from sparksgd.data.row_reading import Rows, read_rows
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.data.shard import Descriptor, ShardWriter, deal_folder
from sparksgd.spark.tasks.environment_tasks import free_bytes, local_folders
from sparksgd.spark.tasks.worker_exit import leave_quietly
from sparksgd.storage.processes import Process
from sparksgd.storage.scratch import PREFIX, claim, remove_left

if TYPE_CHECKING:
    from pyspark.sql import Row

__all__ = [
    "descriptors",
    "inspect",
    "keyed",
    "look_at_disks",
    "numbered",
    "remove",
    "remove_deal",
    "rows_of",
    "texts",
    "write",
]

_OF_SPARK = re.compile(r"(blockmgr|executor|spark)-[0-9a-f-]{36}")
"""How Spark names its local directories."""


def inspect(
    schema: RowSchema, side: Side | None, num_shards: int | None, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Task: report on a partition's rows, with the digest of each shard; num_shards None: it is one shard."""
    leave_quietly()
    report = RowReport()
    for rows in rows_of(schema, batches, side):
        report += rows.report
        if num_shards is not None:
            report += RowReport(shard_digests=rows.shard_digests(num_shards))
    if num_shards is None:
        report.shard_digests[_this_partition()] = report.digest
    yield texts("report", [json.dumps(report.to_json())])


def look_at_disks(_: Iterable[int]) -> Iterator[tuple[str, int, int]]:
    """Task: remove what killed runs left on the disks of this executor's local directories.

    Yield each directory's disk, its free bytes, and how many folders were removed.
    """
    remove_left()
    left = [remove_left(_ours_beside(Path(folder))) for folder in local_folders()]
    for (disk, free), removed in zip(free_bytes(()), left, strict=True):
        yield disk, free, removed


def keyed(
    schema: RowSchema, side: Side | None, num_shards: int, deal: int, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Task: turn rows into (shard, key, record)."""
    leave_quietly()
    for rows in rows_of(schema, batches, side):
        yield pa.RecordBatch.from_arrays(
            [pa.array(rows.shards(num_shards, deal)), _binary(rows.keys), _binary(_packed(rows.records))],
            ["shard", "key", "record"],
        )


def write(
    driver: Process,
    application: str,
    deal_id: str,
    record_bytes: int,
    shards_of_partition: list[range] | None,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Task: write a partition's shards from rows sorted by shard and key; yield their descriptors.

    Args:
        driver: needs the shards.
        application: Spark's name of it.
        deal_id: names the folder.
        record_bytes: size of a record.
        shards_of_partition: the shards of each partition; None: only shard 0, to be renumbered later.
        batches: (shard, key, record).
    """
    leave_quietly()
    partition, folders = _this_partition(), local_folders()
    owned = range(1) if shards_of_partition is None else shards_of_partition[partition]
    folder_of = {shard: deal_folder(folders[(partition + shard) % len(folders)], deal_id) for shard in owned}
    for folder in set(folder_of.values()):
        claim(folder, driver, application)
    with ExitStack() as writers:
        writer_of = {
            shard: writers.enter_context(ShardWriter(folder, shard)) for shard, folder in folder_of.items()
        }
        for batch in batches:
            numbers = batch.column("shard").to_numpy()
            keys = _unpacked(batch.column("key"))
            records = _unpacked(batch.column("record"), record_bytes)
            for shard in np.unique(numbers).tolist():
                mine = numbers == shard
                writer_of[shard].append(keys[mine], records[mine])
        described = [json.dumps(asdict(writer.close())) for writer in writer_of.values()]
    yield texts("descriptor", described)


def descriptors(rows: Iterable[Row]) -> Iterator[Descriptor]:
    """Task: turn rows of one JSON column into descriptors."""
    for (text,) in rows:
        values = json.loads(text)
        yield Descriptor(**values | {"row_digest": tuple(values["row_digest"])})


def numbered(partition: int, rows: Iterable[Row]) -> Iterator[Descriptor]:
    """Task: turn the one row of a partition that is a shard into its descriptor."""
    for shard in descriptors(rows):
        yield replace(shard, shard=partition)


def remove_deal(deal_id: str, folders: list[str], _: Iterable[int]) -> Iterator[str]:
    """Task: remove all files of a deal from this host, also those of lost executors."""
    for folder in {*map(Path, folders), *(deal_folder(local, deal_id) for local in local_folders())}:
        shutil.rmtree(folder, ignore_errors=True)
    yield socket.gethostname()


def remove(paths: list[str], _: Iterable[int]) -> Iterator[str]:
    """Task: remove shard files from this host; yield its name."""
    for path in map(Path, paths):
        path.unlink(missing_ok=True)
    yield socket.gethostname()


def rows_of(schema: RowSchema, batches: Iterable[pa.RecordBatch], side: Side | None = None) -> Iterator[Rows]:
    """Yield the rows of batches whose columns come in the order of schema and side, under any names."""
    columns = [*schema.columns, *(side.columns if side else [])]
    for batch in batches:
        yield read_rows(batch.rename_columns(columns), schema, side)


def _this_partition() -> int:
    """Return which partition this task computes."""
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    return context.partitionId()


def _ours_beside(local_folder: Path) -> Iterator[Path]:
    """Yield what may be of ours in the local directories of this executor, and of others beside it.

    They are blockmgr-UUID, also in spark-UUID or in spark-UUID/executor-UUID.  What is on YARN is in a folder
    of the application, which YARN removes.
    """
    root = local_folder
    while _OF_SPARK.fullmatch(root.name):
        root = root.parent
    for above in ("", "blockmgr-*/", "spark-*/blockmgr-*/", "spark-*/executor-*/blockmgr-*/"):
        yield from root.glob(f"{above}{PREFIX}*")


def _packed(records: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.ascontiguousarray(records).view(np.uint8).reshape(-1, records.dtype.itemsize)


def _binary(rows: np.ndarray[Any, np.dtype[np.uint8]]) -> pa.Array:
    """Return an Arrow binary column of equally long rows, uint8[B, N], without copying."""
    count, width = rows.shape
    offsets = np.arange(0, (count + 1) * width, width or 1, dtype=np.int32)[: count + 1]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.binary(), count, buffers)


def _unpacked(column: pa.Array, width: int | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an Arrow binary column of equally long rows as uint8[B, N]."""
    if not len(column):
        return np.empty((0, width or 0), np.uint8)
    wide = pa.types.is_large_binary(column.type)  # spark.sql.execution.arrow.useLargeVarTypes
    offsets = np.frombuffer(column.buffers()[1], np.int64 if wide else np.int32)
    start, end = offsets[[column.offset, column.offset + len(column)]]
    return np.frombuffer(column.buffers()[2], np.uint8)[start:end].reshape(len(column), width or -1)


def texts(column: str, values: list[str]) -> pa.RecordBatch:
    """Return a batch of one column of texts."""
    return pa.RecordBatch.from_arrays([pa.array(values, pa.string())], [column])
