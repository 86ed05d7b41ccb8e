"""Shard files: fixed-size records on a local disk, read row by row into reused memory.

Files are read with preadv, and not mapped.  YARN counts the touched pages of a mapping as memory of the
container, and kills containers for it.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sparksgd.data.schema import HASH_BYTES, add_digests, digest_of
from sparksgd.errors import ShardMissing

__all__ = ["Descriptor", "ShardWriter", "deal_folder", "read_records"]


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
    """Digest of the file's bytes."""


def deal_folder(local_folder: str, deal_id: str) -> Path:
    """Return the folder of the shard files of a deal, below one of Spark's local directories."""
    return Path(local_folder) / f"sparksgd-{deal_id}"


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
        self._file = self._path.open("wb")
        self._digest = blake2b(digest_size=16)
        self._rows = 0
        self._repeats = 0
        self._row_digest = (0, 0)
        self._last_dealt_by = b""

    def append(self, keys: npt.NDArray[np.uint8], records: npt.NDArray[np.uint8]) -> None:
        """Append records, uint8[B, record_bytes], sorted by their keys, uint8[B, K]."""
        if not len(records):
            return
        data = np.ascontiguousarray(records).data
        self._file.write(data)
        self._digest.update(data)
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
def _opened(shard: Descriptor) -> Iterator[int]:
    try:
        file = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        why = f"shard {shard.shard}: {shard.path} on {socket.gethostname()}: {error.strerror}"
        raise ShardMissing(why, (shard.shard,)) from error
    try:
        yield file
    finally:
        os.close(file)


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
        ShardMissing: the file is not there, or shorter than its descriptor says.
    """
    records = np.empty(len(rows), record)
    width = record.itemsize
    target = memoryview(records.view(np.uint8).data)
    with _opened(shard) as file:
        for start, first, count in _stretches(rows):
            wanted = target[start * width : (start + count) * width]
            if os.preadv(file, [wanted], first * width) != len(wanted):
                why = f"shard {shard.shard}: {shard.path} is shorter than {shard.rows} records"
                raise ShardMissing(why, (shard.shard,))
    return records


def _stretches(rows: npt.NDArray[np.integer] | range) -> Iterator[tuple[int, int, int]]:
    """Yield (position, first row, count) of each run of consecutive row numbers."""
    if isinstance(rows, range):
        yield 0, rows.start, len(rows)
        return
    if not len(rows):
        return
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    firsts = rows.tolist()
    for start, end in pairwise(edges):
        yield start, firsts[start], end - start
