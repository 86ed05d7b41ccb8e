"""What executors run on rows: check them, key them, write them to shard files.

No pyspark at module level, and no torch: executors import this before they know of either.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparksgd.rows import RowReport, RowSchema, read_rows
from sparksgd.shard import Descriptor, ShardWriter, remove_run, run_folder
from sparksgd.spark.quiet import leave_quietly

if TYPE_CHECKING:
    from pyspark.sql import Row

__all__ = ["descriptors", "inspect", "keyed", "local_folder", "remove", "texts", "write"]


def inspect(schema: RowSchema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Task: report on a partition's rows, and on the free bytes of this host's local disks."""
    leave_quietly()
    report = RowReport()
    for batch in batches:
        report += read_rows(batch, schema).report
    free = {
        f"{socket.gethostname()}:{Path(folder).stat().st_dev}": shutil.disk_usage(folder).free
        for folder in _local_folders()
    }
    yield texts("report", [json.dumps({"report": report.to_json(), "free_bytes": free})])


def keyed(
    schema: RowSchema, num_shards: int | None, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Task: turn rows into (shard, key, record); without a number of shards, the last column is it."""
    leave_quietly()
    for batch in batches:
        if not batch.num_rows:
            continue
        rows = read_rows(batch.select(schema.columns), schema)
        if num_shards is None:
            shards = np.full(len(rows.records), batch.column(batch.num_columns - 1)[0].as_py(), np.int32)
        else:
            shards = rows.shards(num_shards)
        yield pa.RecordBatch.from_arrays(
            [pa.array(shards), _binary(rows.keys), _binary(_packed(rows.records))],
            ["shard", "key", "record"],
        )


def write(
    run_id: str,
    record_bytes: int,
    shards_of_partition: list[range],
    hashed: bool,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Task: write a worker's shards from rows sorted by shard and key; yield their descriptors.

    Rows come with the number of their shard, or (not hashed) of the partition that they were in:
    then whole partitions go to the worker's shards in turn.
    """
    from pyspark import TaskContext

    leave_quietly()
    context = TaskContext.get()
    assert context is not None
    owned = shards_of_partition[context.partitionId()]
    folders = _local_folders()
    seen: list[int] = []
    with ExitStack() as writers:
        writer_of = {
            shard: writers.enter_context(
                ShardWriter(run_folder(folders[shard % len(folders)], run_id), shard)
            )
            for shard in owned
        }
        for batch in batches:
            numbers = batch.column("shard").to_numpy()
            keys = _unpacked(batch.column("key"))
            records = _unpacked(batch.column("record"), record_bytes)
            for number in np.unique(numbers):
                if number not in seen:
                    seen.append(number)
                shard = int(number) if hashed else owned[seen.index(number) % len(owned)]
                mine = numbers == number
                writer_of[shard].append(keys[mine], records[mine])
        described = [json.dumps(asdict(writer.close())) for writer in writer_of.values()]
    yield texts("descriptor", described)


def descriptors(rows: Iterable[Row]) -> Iterator[Descriptor]:
    """Task: turn rows of one JSON column into descriptors."""
    for (text,) in rows:
        values = json.loads(text)
        yield Descriptor(**values | {"row_digest": tuple(values["row_digest"])})


def remove(folders: list[str], run_id: str, shards: Iterable[Descriptor]) -> Iterator[None]:
    """Task: remove the run's files from this host."""
    remove_run({*folders, *map(local_folder, shards)}, run_id)
    return iter(())


def _local_folders() -> list[str]:
    """Return Spark's local directories as this executor has them."""
    return os.environ.get("SPARK_LOCAL_DIRS", tempfile.gettempdir()).split(",")


def local_folder(shard: Descriptor) -> str:
    """Return which of Spark's local directories a shard lies in."""
    return str(Path(shard.path).parent.parent)


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
    start, end = np.frombuffer(column.buffers()[1], np.int32)[[column.offset, column.offset + len(column)]]
    return np.frombuffer(column.buffers()[2], np.uint8)[start:end].reshape(len(column), -1)


def texts(column: str, values: list[str]) -> pa.RecordBatch:
    """Return a batch of one column of texts."""
    return pa.RecordBatch.from_arrays([pa.array(values, pa.string())], [column])
