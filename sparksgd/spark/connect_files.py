"""Files that a server of Spark Connect can read, copied to this machine: here is no JVM that reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sparksgd.errors import DataError
from sparksgd.storage import LocalLocation, Location

__all__ = ["copied"]

_SLICE_BYTES = 32 << 20
"""A message of Spark Connect holds 128 MiB."""


@contextmanager
def copied(session: SparkSession, path: str) -> Iterator[Location]:
    """Give the copy of a folder, for as long as the block runs.

    Args:
        session: of Spark Connect.
        path: of a folder, as the server resolves it; files whose names begin with "_" or "." are left out.

    Raises:
        DataError: it is not there, is empty, or cannot be read.
    """
    try:
        files = session.read.format("binaryFile").option("recursiveFileLookup", "true").load(path)
        lengths = {row.path: row.length for row in files.select("path", "length").collect()}
    except Exception as error:
        raise DataError(f"the server of this Spark Connect session cannot read {path}: {error}") from error
    if not lengths:
        raise DataError(f"{path} has no files that the server of this Spark Connect session can read")
    root = os.path.commonpath([str(PurePosixPath(file).parent) for file in lengths])
    with TemporaryDirectory(prefix="sparksgd-") as folder:
        for file, length in lengths.items():
            copy = Path(folder) / PurePosixPath(file).relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with copy.open("wb") as written:
                for start in range(0, length, _SLICE_BYTES):
                    written.write(_slice_of(files, file, start))
        yield LocalLocation(Path(folder))


def _slice_of(files: DataFrame, file: str, start: int) -> bytes:
    content = F.substring("content", start + 1, _SLICE_BYTES)
    (row,) = files.where(F.col("path") == file).select(content.alias("content")).collect()
    return bytes(row.content)
