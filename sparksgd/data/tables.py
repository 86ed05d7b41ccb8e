"""Folders whose Parquet may not be read file by file: tables with a log, and files that Spark leaves out.

    a table of       what lies at its top
    Delta Lake       _delta_log/
    Apache Iceberg   metadata/v3.metadata.json, or metadata/00003-<uuid>.metadata.json
    Apache Hudi      .hoodie/hoodie.properties
    Spark's streams  _spark_metadata/

The log of such a table says which files hold its rows now.  Others hold rows that were deleted, replaced, or
never committed, so all files together are another data set.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from sparksgd.errors import DataError
from sparksgd.storage import Location, location, unanswered

__all__ = ["refuse_tables", "table_of"]


@dataclass(frozen=True)
class _Format:
    """How a kind of table is recognised, and read."""

    name: str
    log: str
    """A pattern of what lies at its top."""

    file: re.Pattern[str]
    """What the name of a match of the pattern must be."""

    reader: str
    """The call that reads it, with the table's path as {}."""


_FORMATS = (
    _Format("a Delta table", "_delta_log", re.compile("_delta_log"), 'spark.read.format("delta").load("{}")'),
    _Format(
        "an Iceberg table",
        "metadata/*.metadata.json*",
        re.compile(r"(v\d+|\d+-[0-9a-f-]{36})(\.gz)?\.metadata\.json(\.gz)?"),
        'spark.read.format("iceberg").load("{}")',
    ),
    _Format(
        "a Hudi table",
        ".hoodie/hoodie.properties",
        re.compile("hoodie.properties"),
        'spark.read.format("hudi").load("{}")',
    ),
)
_STREAM = _Format(
    "the output of a stream", "_spark_metadata", re.compile("_spark_metadata"), 'spark.read.parquet("{}")'
)


def refuse_tables(path: str, *, by_spark: bool) -> None:
    """Refuse a path of Parquet that is, or lies in, a table with a log; or that Spark would read in part.

    Args:
        path: a path, URI or pattern; it need not exist.
        by_spark: Spark reads it: the whole output of a stream is read by its log then.

    Raises:
        DataError: the message names the table, its log, and the call that reads it.
        ClusterError: the file system does not answer.
    """
    place = location(path)
    try:
        if found := table_of(path, by_spark=by_spark):
            raise DataError(found)
        _refuse_parts(path, place)
    except OSError as error:
        raise unanswered(error, DataError(f"cannot read {path} as Parquet: {error.strerror}")) from error


def table_of(path: str, *, by_spark: bool) -> str | None:
    """Return of which table with a log a path is, as an error says it; None if of none.

    Raises:
        OSError: the file system does not answer.
    """
    place = location(path)
    by_log = by_spark and place.exists() and bool(place.names_of(_STREAM.log))
    for folder in place.with_parents():
        for table in _FORMATS if by_log else (*_FORMATS, _STREAM):
            if any(map(table.file.fullmatch, _names(folder, table.log))):
                return _described(path, folder, table)
    return None


def _names(folder: Location, pattern: str) -> list[str]:
    try:
        return folder.names_of(pattern)
    except OSError as error:
        if isinstance(unanswered(error, DataError()), DataError):
            return []  # a folder around the data that may not be looked into
        raise


def _described(path: str, folder: Location, table: _Format) -> str:
    log = table.log.rpartition("/")[0] or table.log
    return (
        f"{path} is of {table.name}: {folder}/{log} is its log. Its Parquet files hold other rows, too: "
        f"deleted, replaced or never committed ones. Read it by its own reader, and pass the DataFrame: "
        f"sparksgd.train(config, {table.reader.format(folder)}). For a job, write that DataFrame as Parquet "
        f"to another folder, and name that"
    )


def _refuse_parts(path: str, place: Location) -> None:
    """Refuse Parquet in plain sub-folders, or beside those of partitions: Spark would leave it out."""
    folders = {file.path: PurePosixPath(file.path).parts[:-1] for file in place.files()}
    parquet = {file: parts for file, parts in folders.items() if file.endswith(".parquet")}
    partitioned = {file for file, parts in parquet.items() if any("=" in part for part in parts)}
    left_out = [file for file, parts in parquet.items() if file not in partitioned and (parts or partitioned)]
    if left_out:
        raise DataError(
            f"{path} holds {left_out[0]}, which Spark would leave out: it reads the files of one folder, or "
            f"of sub-folders that name a column's value, such as day=1. Move it, or name what to read by a "
            f"pattern, such as {path.rstrip('/')}/*/*.parquet"
        )
