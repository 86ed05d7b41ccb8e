"""Shard files: records of one size on a local disk, each followed by its checksum.

    record 0 | checksum | record 1 | checksum | ...

Files are read with preadv, and not mapped.  YARN counts the touched pages of a mapping as memory of the
container, and kills containers for it.

A checksum is the CRC-32 of a record, begun with a number that follows from the file's name and the record's
number.  So a record that lies in another place, or in another file, is noticed like one with other bits.
"""

from __future__ import annotations

import errno
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import numpy as np
import numpy.typing as npt

from sparksgd.data.row_reading import HASH_BYTES, digest_of
from sparksgd.data.row_report import add_digests
from sparksgd.errors import ShardMissing
from sparksgd.storage.scratch import PREFIX

__all__ = ["Descriptor", "ShardWriter", "deal_folder", "read_records", "stored"]

_WRITE_BYTES = 1 << 16  # of a call; a worker writes all its shards at once
_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """Where a shard is, and what it holds.  Spark keeps nothing else of a shard."""

    shard: int
    """Its number, from 0."""

    host: str
    """The host that has its file."""

    path: str
    """Its file."""

    rows: int
    """How many records."""

    repeats: int
    """How many of its rows have the same hash as another one: the same features, or the same id."""

    row_digest: tuple[int, int]
    """Digest of the rows, whatever their order."""

    digest: str
    """Digest of the records' bytes, in their order."""


def deal_folder(local_folder: str, deal_id: str) -> Path:
    """Return the folder of the shard files of a deal, below one of Spark's local directories."""
    return Path(local_folder) / f"{PREFIX}{deal_id}"


def stored(record: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of what a file has for each record: the record and its checksum."""
    return np.dtype([("record", record), ("checksum", "<u4")])


def _for_us_alone(path: str, flags: int) -> int:
    """Open a file that other users cannot read."""
    return os.open(path, flags, 0o600)


class ShardWriter:
    """Writes the file of a shard, under a unique name: two attempts never write the same file.

    Args:
        folder: the deal's folder on a local disk.
        shard: the shard's number.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._shard = shard
        self._path = folder / f"shard-{shard:05d}-{uuid.uuid4().hex[:8]}.records"
        self._file = open(self._path, "wb", _WRITE_BYTES, opener=_for_us_alone)  # noqa: SIM115  # closed in close()
        self._start = _start_of(str(self._path))
        self._digest = blake2b(digest_size=16)
        self._rows = 0
        self._repeats = 0
        self._row_digest = (0, 0)
        self._last_dealt_by = b""

    def append(self, keys: npt.NDArray[np.uint8], records: npt.NDArray[np.uint8]) -> None:
        """Append records, uint8[B, record_bytes], sorted by their keys, uint8[B, K]."""
        if not len(records):
            return
        content = np.ascontiguousarray(records)
        for row, record in enumerate(content, self._rows):
            self._file.write(record)
            self._file.write(crc32(record, self._start + row & _32_BITS).to_bytes(4, "little"))
        self._digest.update(content.data)
        self._rows += len(records)
        self._row_digest = add_digests(self._row_digest, digest_of(keys))
        dealt_by = keys[:, :HASH_BYTES]
        self._repeats += int((dealt_by[1:] == dealt_by[:-1]).all(axis=1).sum())
        self._repeats += dealt_by[0].tobytes() == self._last_dealt_by
        self._last_dealt_by = dealt_by[-1].tobytes()

    def close(self) -> Descriptor:
        """Finish the file and describe it."""
        self._file.close()
        return Descriptor(
            shard=self._shard,
            host=socket.gethostname(),
            path=str(self._path),
            rows=self._rows,
            repeats=self._repeats,
            row_digest=self._row_digest,
            digest=self._digest.hexdigest(),
        )

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.discard()


@contextmanager
def _opened(shard: Descriptor, file_bytes: int) -> Iterator[int]:
    """Open the file of a shard, which must have so many bytes."""
    try:
        file = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if (found := os.fstat(file).st_size) != file_bytes:
                raise _missing(shard, f"{found:,} bytes, but {shard.rows:,} records need {file_bytes:,}")
            yield file
        finally:
            os.close(file)
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):  # of this process, not of the file
            raise
        raise _missing(shard, error.strerror or str(error)) from error


def read_records(
    shard: Descriptor, rows: npt.NDArray[np.integer] | range, record: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Read records by their row numbers, which must ascend, because disks are faster then.

    Args:
        shard: which file.
        rows: row numbers, ascending, [B].
        record: the type of a record.

    Returns:
        Records, [B].

    Raises:
        ShardMissing: the file is not there, has not as many bytes as its descriptor's rows need, or has not
            the records that were written.
    """
    lines = np.empty(len(rows), stored(record))
    width, data = lines.itemsize, memoryview(lines.view(np.uint8).data)
    numbers = rows if isinstance(rows, range) else rows.tolist()
    with _opened(shard, shard.rows * width) as file:
        start = 0
        while start < len(numbers):
            first, stop = numbers[start], start + 1
            while stop < len(numbers) and numbers[stop] - first == stop - start:
                stop += 1
            wanted = data[start * width : stop * width]
            done = os.preadv(file, [wanted], first * width)
            while done < len(wanted):  # one call reads less than 2 GiB
                more = os.preadv(file, [wanted[done:]], first * width + done)
                if not more:
                    raise _missing(shard, "it was cut off while it was read")
                done += more
            start = stop
    _require_written(shard, numbers, lines)
    return lines["record"]


def _require_written(shard: Descriptor, numbers: Sequence[int], lines: npt.NDArray[Any]) -> None:
    """Refuse records that do not have their checksums.

    Args:
        shard: which file.
        numbers: of its rows, [B].
        lines: what was read of them, [B].

    Raises:
        ShardMissing: with the number of the first one.
    """
    width, inner = lines.itemsize, lines.dtype["record"].itemsize
    data, begun_with = memoryview(lines.view(np.uint8).data), _start_of(shard.path)
    found = [
        crc32(data[start : start + inner], begun_with + row & _32_BITS)
        for row, start in zip(numbers, range(0, len(data), width), strict=True)
    ]
    if found != (written := lines["checksum"].tolist()):
        row = next(row for row, one, other in zip(numbers, found, written, strict=True) if one != other)
        raise _missing(shard, f"record {row} is not what was written there")


def _start_of(file: str) -> int:
    """Return what the checksums of a file begin with.  Its name is unique: it has random digits."""
    return crc32(os.path.basename(file).encode())  # noqa: PTH119  # a Path costs six times as much, for each step


def _missing(shard: Descriptor, why: str) -> ShardMissing:
    where = f"shard {shard.shard}: {shard.path} on {socket.gethostname()}"
    return ShardMissing(f"{where}: {why}", (shard.shard,))
