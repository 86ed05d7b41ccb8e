"""Read the metrics of a run: a line for each step and each evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparksgd.runs.json_files import parsed
from sparksgd.runs.names import METRICS
from sparksgd.storage import Location

__all__ = ["Metrics", "read_metrics"]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The lines of a metrics.jsonl, in their order; `RunFolder` defines their fields."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def read_metrics(file: Location) -> Metrics:
    """Read all complete lines; if the run was killed, the last line may be incomplete.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else than metrics.
    """
    lines = file.read_bytes().splitlines(keepends=True)
    whole = [parsed(line) for line in lines if line.endswith(b"\n")]
    if not all(isinstance(line, dict) and isinstance(line.get("kind"), str) for line in whole):
        raise ValueError(f"{METRICS} has lines that are no objects with a kind")
    return Metrics(
        steps=[line for line in whole if line["kind"] == "step"],
        evaluations=[line for line in whole if line["kind"] == "evaluation"],
    )
