"""Rows of Parquet files on this machine, dealt into shards without Spark: the data of the inline engine."""

from __future__ import annotations

import logging
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from sparksgd.data.held_out import Side
from sparksgd.data.row_reading import HASH_BYTES, Rows, read_rows
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.data.shard import Descriptor, ShardWriter
from sparksgd.errors import ClusterError, DataError, ShardMissing
from sparksgd.storage.scratch import in_temporary_folder, make_scratch, remove_left, remove_scratch

__all__ = ["LocalShards", "ParquetRows"]

log = logging.getLogger("sparksgd")

_BATCH_ROWS = 4096


class LocalShards:
    """Shards in a temporary folder of this machine."""

    def __init__(self, table: list[Descriptor], folder: Path) -> None:
        self.table = table
        self._folder = folder

    def close(self) -> None:
        """Remove the files."""
        remove_scratch(self._folder)


class ParquetRows:
    """Rows of a Parquet file or folder.

    Args:
        path: the file or folder.
        side: the only rows of it that count; None: all of them.
    """

    def __init__(self, path: str, side: Side | None = None) -> None:
        self._path, self._side = path, side
        try:
            self._dataset = ds.dataset(path, format="parquet")
            self._schema = self._dataset.schema
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"cannot read {path} as Parquet: {error}") from error

    def first_rows(self, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
        """Return the schema, and the first rows in which none of the columns is null.

        Raises:
            DataError: Spark would read a column otherwise.
        """
        self._check(columns)
        known = [name for name in columns if name in self._schema.names]
        complete = None
        for name in known:
            valid = ds.field(name).is_valid()
            complete = valid if complete is None else complete & valid
        return self._schema, self._dataset.head(count, columns=known, filter=complete)

    def _check(self, columns: list[str]) -> None:
        """Refuse columns that Spark reads from the names of folders, or that other files have as booleans."""
        top = Path(self._path).absolute()
        booleans = [
            field.name for field in self._schema if field.name in columns and field.type == pa.bool_()
        ]
        for fragment in self._dataset.get_fragments():
            file = Path(fragment.path)
            for part in file.relative_to(top).parts[:-1] if file.is_relative_to(top) else ():
                key, equals, _ = part.partition("=")
                if equals and key.lower() in (name.lower() for name in columns):
                    raise DataError(
                        f"column {key!r} is in the names of folders ({part}), which the inline engine does "
                        f"not read: use an engine on Spark, or write the column into the files"
                    )
            for name in booleans:  # Arrow makes every other number of another file true
                kinds = [field.type for field in fragment.physical_schema if field.name == name]
                if kinds and kinds != [pa.bool_()]:
                    raise DataError(
                        f"column {name!r} is {kinds[0]} in {file.name}, but bool in other files: write them "
                        f"anew, with one type"
                    )

    def inspect(self, schema: RowSchema, num_shards: int) -> RowReport:
        """Read every row once; return the report."""
        report = RowReport()
        for rows in self._rows(schema):
            report += rows.report
            report += RowReport(shard_digests=rows.shard_digests(num_shards))
        return report

    def deal(self, schema: RowSchema, num_shards: int, expected: RowReport, deal: int = 0) -> LocalShards:
        """Write every good row to its shard.

        Each shard is first written unsorted.  Then one shard at a time is sorted in memory.

        Raises:
            ShardMissing: an unsorted shard is read back other than it was written.
            ClusterError: the disk is full, or cannot be written.
        """
        if left := remove_left():
            log.info("removed %d folders that killed runs had left in %s", left, tempfile.gettempdir())
        try:
            folder = make_scratch()
            with in_temporary_folder(), ExitStack() as unless_written:
                unless_written.callback(remove_scratch, folder)
                shards = LocalShards(self._written(folder, schema, num_shards, deal), folder)
                unless_written.pop_all()
                return shards
        except OSError as error:
            raise ClusterError(f"the shards cannot be written: {error.strerror}") from error

    def _written(self, target: Path, schema: RowSchema, num_shards: int, deal: int) -> list[Descriptor]:
        unsorted = [target / f"unsorted-{shard}" for shard in range(num_shards)]
        checksums = [0] * num_shards
        for file in unsorted:
            file.touch()
        width = HASH_BYTES
        for rows in self._rows(schema):
            lines = np.hstack([rows.keys, _bytes(rows)])
            width = rows.keys.shape[1]
            shards = rows.shards(num_shards, deal)
            for shard in np.unique(shards):
                mine = lines[shards == shard].tobytes()
                checksums[shard] = zlib.crc32(mine, checksums[shard])
                with unsorted[shard].open("ab") as opened:
                    opened.write(mine)
        table = []
        for shard, file in enumerate(unsorted):
            content = np.fromfile(file, np.uint8)
            if zlib.crc32(content.data) != checksums[shard]:
                raise ShardMissing(
                    f"shard {shard}: {file} on {socket.gethostname()} is not what was written there a moment "
                    f"ago: run again, and test this disk if it happens again",
                    (shard,),
                )
            lines = content.reshape(-1, width + schema.record.itemsize)
            keys = np.ascontiguousarray(lines[:, :width])
            order = np.lexsort(keys.view(">u8").T[::-1])
            with ShardWriter(target, shard) as writer:
                writer.append(keys[order], lines[order, width:])
                table.append(writer.close())
            file.unlink()
        return table

    def _rows(self, schema: RowSchema) -> Iterator[Rows]:
        try:
            columns = [*schema.columns, *(self._side.columns if self._side else [])]
            for batch in self._dataset.to_batches(columns=columns, batch_size=_BATCH_ROWS):
                yield read_rows(batch, schema, self._side)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"cannot read {self._path} as Parquet: {error}") from error


def _bytes(rows: Rows) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    width = rows.records.dtype.itemsize
    return np.ascontiguousarray(rows.records).view(np.uint8).reshape(-1, width)
