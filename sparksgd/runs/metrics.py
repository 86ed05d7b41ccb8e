"""Read the metrics of a run: a line for each step and each evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparksgd.imports import out_of_memory_told
from sparksgd.storage import Location
from sparksgd.storage.metrics_lines import metrics_lines

__all__ = ["Metrics", "read_metrics"]


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
