"""The small JSON files of a run's folder, written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sparksgd.runs.names import RUN, RUN_BEFORE
from sparksgd.storage import Location

__all__ = ["finite", "parsed", "read_about_run", "read_json", "write_json"]

_MOST_BYTES = 64 << 20


def write_json(file: Location, values: Mapping[str, Any]) -> None:
    """Write an object, with indentation for people."""
    file.write_bytes((json.dumps(values, indent=2) + "\n").encode())


def read_json(file: Location) -> Any:
    """Return what a file of JSON holds, if it is a regular file of a reasonable size.

    Raises:
        OSError: there is no such file, or it cannot be read, or it is too long.
        ValueError: it is not JSON, is nested too deeply, or has a key twice.
    """
    return parsed(file.read_bytes(_MOST_BYTES))


def parsed(text: bytes) -> Any:
    """Return the value that JSON text has.

    Raises:
        ValueError: it is not JSON, its values are nested too deeply, or a key is there twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_table)
    except RecursionError as error:
        raise ValueError("it has values within values, too deep to be read") from error


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it has a key twice")
    return table


def read_about_run(folder: Location) -> Any:
    """Return what a run is, as its folder says.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON.
    """
    try:
        return read_json(folder / RUN)
    except FileNotFoundError as error:
        try:
            return read_json(folder / RUN_BEFORE)
        except FileNotFoundError:
            raise error from None


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None instead of infinity and NaN."""
    return value if math.isfinite(value) else None
