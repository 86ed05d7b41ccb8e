"""Files that a server of Spark Connect can read, copied to this machine: here is no JVM that reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sparksgd.errors import DataError, SparkSGDError
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
    with TemporaryDirectory(prefix="sparksgd-") as folder:
        try:
            _copy(session, path, Path(folder))
        except SparkSGDError:
            raise
        except Exception as error:
            raise DataError(
                f"the server of this Spark Connect session cannot read {path}: {error}"
            ) from error
        yield LocalLocation(Path(folder))


def _copy(session: SparkSession, path: str, folder: Path) -> None:
    as_written = re.sub(r"([][{}*?\\])", r"\\\1", path)  # not a pattern of several paths
    files = session.read.format("binaryFile").option("recursiveFileLookup", "true").load(as_written)
    lengths = {row.path: row.length for row in files.select("path", "length").collect()}
    parents = [PurePosixPath(file).parent for file in lengths]
    if not parents or any(".." in parent.parts for parent in parents):
        raise DataError(f"{path} has no files that the server of this Spark Connect session can read")
    root = os.path.commonpath(list(map(str, parents)))
    for file, length in lengths.items():
        copy = folder / PurePosixPath(file).relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Spark pushes down the length alone: without it, each slice would read all files.
        this = files.where((F.col("length") == length) & (F.col("path") == file))
        with copy.open("wb") as written:
            for start in range(0, length, _SLICE_BYTES):
                content = F.substring("content", start + 1, _SLICE_BYTES)
                (row,) = this.select(content.alias("content")).collect()
                written.write(row.content)
