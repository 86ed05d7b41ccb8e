"""The rows that a caller gives: a DataFrame, or a path of Parquet; anything else is refused.

For a path, Spark is not imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparksgd.errors import ConfigError
from sparksgd.imports import shown

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from sparksgd.spark.shared_rows import SharedRows

__all__ = ["described_value", "frame_or_path", "rows_of_training"]

_ADVICE = {
    "pyspark.pandas": "pass {argument}.to_spark()",
    "pandas": "pass spark.createDataFrame({argument}), or the path of {argument}.to_parquet(path)",
    "pyarrow": "pass the path of pyarrow.parquet.write_table({argument}, path)",
    "polars": "pass the path of {argument}.write_parquet(path)",
}
"""What to do with tables of other libraries, by the beginning of the module of their class."""


def frame_or_path(argument: str, rows: object, *, takes_connect: bool = False) -> DataFrame | str:
    """Return rows that can be read: an unchanged DataFrame, or a path as text.

    Args:
        argument: the name of the argument, for errors.
        rows: its value.
        takes_connect: whether a DataFrame of Spark Connect will do, of Spark 4 or later.

    Raises:
        ConfigError: they are neither a DataFrame nor a path, or the path is empty.
        ClusterError: the DataFrame is Spark Connect's.
    """
    if isinstance(rows, Path):
        return str(rows.absolute())
    if isinstance(rows, str):
        if not rows.strip():
            raise ConfigError(f"{argument} is {rows!r}, but must name a file or folder of Parquet")
        return rows
    if _is_of("pyspark.sql", rows):
        from pyspark.sql import DataFrame

        from sparksgd.spark.cluster.cluster import refuse_connect

        if not (takes_connect and isinstance(rows, DataFrame)):
            refuse_connect(rows)
        if isinstance(rows, DataFrame):
            return rows
    advice = "pass one of the two" if rows is None else "make one of the two of it"
    for home, words in _ADVICE.items():
        if _is_of(home, rows):
            advice = words.format(argument=argument)
            break
    raise ConfigError(
        f"{argument} is {described_value(rows)}, but must be a Spark DataFrame, or the path of Parquet, as "
        f"str or Path: {advice}"
    )


def rows_of_training(argument: str, rows: object) -> DataFrame | str | SharedRows:
    """Return what `frame_or_path` does, or rows that trainings share, as `sparksgd.deal` gives them."""
    if _is_of("sparksgd.spark.shared_rows", rows):
        shared: SharedRows = rows  # type: ignore[assignment]  # its module has no other class that is public
        return shared
    return frame_or_path(argument, rows)


def _is_of(package: str, value: Any) -> bool:
    """Return whether a value's class, or one that it extends, is defined in a package."""
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in type(value).__mro__)


def described_value(value: object) -> str:
    """Return how an error names a value: short values literally, others by their type.

    >>> described_value(None), described_value(3), described_value([0] * 100)
    ('None', '3', 'of type list')
    """
    if value is None or isinstance(value, str | int | float | type):
        return shown(value)
    kind = type(value)
    home = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"of type {home}{kind.__qualname__}"
