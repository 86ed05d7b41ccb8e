"""The small JSON files of a run's folder, written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sparksgd.runs.names import RUN, RUN_BEFORE
from sparksgd.storage import Location

__all__ = ["finite", "parsed", "read_about_run", "write_json"]


def write_json(file: Location, values: Mapping[str, Any]) -> None:
    """Write an object, with indentation for people."""
    file.write_bytes((json.dumps(values, indent=2) + "\n").encode())


def parsed(text: bytes) -> Any:
    """Return the value that JSON text has.

    Raises:
        ValueError: it is not JSON, or its values are nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it has values within values, too deep to be read") from error


def read_about_run(folder: Location) -> Any:
    """Return what a run is, as its folder says.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON.
    """
    try:
        return parsed((folder / RUN).read_bytes())
    except FileNotFoundError as error:
        try:
            return parsed((folder / RUN_BEFORE).read_bytes())
        except FileNotFoundError:
            raise error from None


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None instead of infinity and NaN."""
    return value if math.isfinite(value) else None
