"""Read the metrics of a run: a line for each step and each evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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
        ValueError, KeyError, TypeError: it holds something else than metrics.
    """
    lines = file.read_regular().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return Metrics(
        steps=[line for line in whole if line["kind"] == "step"],
        evaluations=[line for line in whole if line["kind"] == "evaluation"],
    )
