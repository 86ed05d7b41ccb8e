"""Read the metrics of a run: a line for each step and each evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparksgd.imports import out_of_memory_told
from sparksgd.runs.names import METRICS
from sparksgd.storage import Location
from sparksgd.storage.json_text import parsed
from sparksgd.storage.reading import read_lines

__all__ = ["Metrics", "metrics_lines", "read_metrics"]

_MOST_BYTES = 16 << 20
"""Of a line: with a million shards it has 8 MB of those that took part."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The lines of a metrics.jsonl, in their order; `RunFolder` defines their fields."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def read_metrics(file: Location) -> Metrics:
    """Read all complete lines; if the run was killed, the last line may be incomplete.

    Raises:
        OSError: the file cannot be read, or has a line that is too long.
        ValueError: it holds something else than metrics.
        OutOfMemory: it has more lines than this process can hold.
    """
    steps, evaluations = [], []
    with out_of_memory_told(f"reading {file}"):
        for line in metrics_lines(file):
            if line["kind"] == "step":
                steps.append(line)
            elif line["kind"] == "evaluation":
                evaluations.append(line)
    return Metrics(steps=steps, evaluations=evaluations)


def metrics_lines(file: Location) -> Iterator[dict[str, Any]]:
    """Yield the complete lines one by one.

    Raises:
        OSError: the file cannot be read, or has a line that is too long.
        ValueError: it holds something else than metrics.
    """
    for text in read_lines(file, _MOST_BYTES):
        line = parsed(text)
        if not (isinstance(line, dict) and isinstance(line.get("kind"), str)):
            raise ValueError(f"{METRICS} has lines that are no objects with a kind")
        yield line
