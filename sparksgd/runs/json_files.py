"""The small JSON files of a run's folder, written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sparksgd.errors import DataError
from sparksgd.runs.names import RUN, RUN_BEFORE
from sparksgd.storage import Location
from sparksgd.storage.json_text import parsed

__all__ = ["finite", "read_about_run", "read_json", "write_json"]

_MOST_BYTES = 16 << 20
"""The model.json of a module of 14,000 tensors in 8,000 parts has 5 MB; nothing else has more."""


def write_json(file: Location, values: Mapping[str, Any]) -> None:
    """Write an object, with indentation for people.

    Raises:
        OSError: it cannot be written.
        DataError: it would be longer than `read_json` reads; nothing is written.
    """
    data = (json.dumps(values, indent=2) + "\n").encode()
    if len(data) > _MOST_BYTES:
        raise DataError(
            f"{file} would have {len(data):,} bytes, but may have {_MOST_BYTES:,} at most: keep long lists "
            f"and texts out of what describes the run and its module"
        )
    file.write_bytes(data)


def read_json(file: Location) -> Any:
    """Return what a file of JSON holds, if it is a regular file of a reasonable size.

    Raises:
        OSError: there is no such file, or it cannot be read, or it is too long.
        ValueError: see `parsed`.
    """
    return parsed(file.read_bytes(_MOST_BYTES))


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
