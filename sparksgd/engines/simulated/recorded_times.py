"""How long turns took in a run that was made, so that turns in virtual time take as long.

A run's metrics.jsonl has, in each step, how long each worker computed.  On the server engine that is one turn
of a shard; else the turns of all its shards in a round, which count as equally long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sparksgd.errors import DataError
from sparksgd.imports import shortened
from sparksgd.storage import location
from sparksgd.storage.metrics_lines import METRICS, metrics_lines

__all__ = ["recorded_turns_s"]

_FEWEST = 20


def recorded_turns_s(folder: str) -> list[npt.NDArray[np.float64]]:
    """Return the seconds of the turns of each worker of a run, in the order of the workers' numbers.

    Args:
        folder: of the run, a path or URI.

    Raises:
        DataError: it has no metrics, or a worker has too few turns.
    """
    file = location(folder) / METRICS
    found: dict[int, list[float]] = {}
    turn: int | None = None
    try:
        for step in metrics_lines(file):
            if step["kind"] == "step":
                before = 0 if step.get("step") == 1 else turn
                turn = int(step["turn"])
                _add(step, before, found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"cluster.recorded is {folder!r}, but {file} holds no steps of a run: {type(error).__name__}: "
            f"{shortened(str(error), 400)}. Name the folder that jobs/train.py --out wrote"
        ) from error
    fewest = min((len(seconds) for seconds in found.values()), default=0)
    if fewest < _FEWEST:
        raise DataError(
            f"cluster.recorded is {folder!r}, but its run tells of {fewest} turns of a worker, and {_FEWEST} "
            f"at least are needed: name a longer run, on Spark (inline has no workers)"
        )
    return [np.array(seconds) for _, seconds in sorted(found.items())]


def _add(step: Mapping[str, Any], before: int | None, found: dict[int, list[float]]) -> None:
    """Add the times of a step; before: the turn of the step before it, None if that is not known."""
    workers, turns = step["timing"]["workers"], 1.0
    if "staleness" not in step:
        if before is None or step["turn"] <= before:
            return  # the run went on from a checkpoint
        turns = (step["turn"] - before) * max(1.0, len(step["took_part"]) / max(1, len(workers)))
    for worker in workers:
        seconds = float(worker["compute"]) / turns
        if not 0 <= seconds < 1e9:
            raise ValueError(f"{seconds} is no time")
        found.setdefault(int(worker["worker"]), []).append(seconds)
