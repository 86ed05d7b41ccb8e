"""The small JSON files of a run's folder, written and read.

A record (run.json, summary.json) has the digest of its fields, as have model.json and the manifests of
checkpoints.  Those of the version before had neither "format" nor "sha256", and are still read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from sparksgd.errors import DataError
from sparksgd.imports import shown
from sparksgd.runs.names import RUN, RUN_BEFORE
from sparksgd.storage import Location
from sparksgd.storage.json_text import parsed, require_bounds

__all__ = ["digest_of", "finite", "read_about_run", "read_json", "read_record", "write_json", "write_record"]

_FORMAT = 1

_MOST_BYTES = 64 << 20
"""The model.json of a module of 14,000 tensors in 8,000 parts has 5 MB."""


def write_json(file: Location, values: Mapping[str, Any]) -> None:
    """Write an object, with indentation for people.

    Raises:
        OSError: it cannot be written.
        DataError: `read_json` would not read it; nothing is written.
    """
    data = (json.dumps(values, indent=2) + "\n").encode()
    if len(data) > _MOST_BYTES:
        raise DataError(
            f"{file} would have {len(data):,} bytes, but may have {_MOST_BYTES:,} at most: keep long lists "
            f"and texts out of what describes the run and its module"
        )
    try:
        require_bounds(data)
    except ValueError as error:
        raise DataError(f"{file} is not written, because nobody could read it: {error}") from error
    file.write_bytes(data)


def read_json(file: Location) -> Any:
    """Return what a file of JSON holds, if it is a regular file of a reasonable size.

    Raises:
        OSError: there is no such file, or it cannot be read, or it is too long.
        ValueError: see `parsed`.
    """
    return parsed(file.read_bytes(_MOST_BYTES))


def digest_of(values: Mapping[str, Any], *, in_order: bool = False) -> str:
    """Return the SHA-256 of values as JSON holds them, but for their own "sha256".

    Args:
        values: of a file.
        in_order: whether the order of the keys counts, as in model.json, where parts of modules have one.
    """
    plain = json.loads(json.dumps({key: value for key, value in values.items() if key != "sha256"}))
    text = json.dumps(plain, separators=(",", ":")) if in_order else json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_record(file: Location, values: Mapping[str, Any]) -> None:
    """Write an object with the digest of its fields.

    Raises:
        OSError, DataError: see `write_json`.
    """
    about = {"format": _FORMAT, **values}
    write_json(file, {**about, "sha256": digest_of(about)})


def read_record(file: Location) -> dict[str, Any]:
    """Return what `write_record` was given.

    Raises:
        OSError, ValueError: see `read_json`; or it is damaged, or of another version.
    """
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, but must hold a table: restore it")
    if not values.keys() & {"format", "sha256"}:
        return values  # the version before wrote neither
    number = values.get("format")
    if type(number) is int and number > _FORMAT:
        raise ValueError(
            f"{file} is of format {shown(number)}, but this version reads {_FORMAT}: read it with the "
            f"version that wrote it"
        )
    if number != _FORMAT or values.get("sha256") != digest_of(values):
        raise ValueError(
            f"{file} is damaged, or was changed by hand: its sha256 is not that of its fields. Restore it"
        )
    return {key: value for key, value in values.items() if key not in ("format", "sha256")}


def read_about_run(folder: Location) -> dict[str, Any]:
    """Return what a run is, as its folder says.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON, or damaged.
    """
    try:
        return read_record(folder / RUN)
    except FileNotFoundError as error:
        try:
            return read_record(folder / RUN_BEFORE)
        except FileNotFoundError:
            raise error from None


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None instead of infinity and NaN."""
    return value if math.isfinite(value) else None
