"""The lines of a run's metrics.jsonl, for what reads them again.

`runs/folder.py` writes them, and defines their fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparksgd.storage import Location
from sparksgd.storage.json_text import parsed
from sparksgd.storage.reading import read_lines

__all__ = ["METRICS", "metrics_lines"]

METRICS = "metrics.jsonl"
"""A line for each step and each evaluation."""

_MOST_LINE_BYTES = 16 << 20
"""With a million shards a line has 8 MB of those that took part."""


def metrics_lines(file: Location) -> Iterator[dict[str, Any]]:
    """Yield the complete lines one by one.

    Raises:
        OSError: the file cannot be read, or has a line that is too long.
        ValueError: it holds something else than metrics.
    """
    for text in read_lines(file, _MOST_LINE_BYTES):
        line = parsed(text)
        if not (isinstance(line, dict) and isinstance(line.get("kind"), str)):
            raise ValueError(f"{METRICS} has lines that are no objects with a kind")
        yield line
