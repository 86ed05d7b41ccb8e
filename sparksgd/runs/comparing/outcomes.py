"""What a run gave, from the files of its folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparksgd.runs.json_files import read_record
from sparksgd.runs.metrics import read_metrics
from sparksgd.runs.names import METRICS, SUMMARY
from sparksgd.storage import Location

__all__ = ["Evaluated", "Outcome", "read_outcome"]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation, and what the run had spent until then."""

    virtual_s: float
    rows: int
    sent_bytes: float
    """Bytes on all links, as the simulated engine counts them."""

    loss: float
    accuracy: float | None

    @property
    def score(self) -> float:
        """Return the accuracy, or the negative loss where there is none; -infinity for no finite loss."""
        if not math.isfinite(self.loss):
            return -math.inf
        return -self.loss if self.accuracy is None else self.accuracy


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave."""

    folder: str
    """The name of its folder."""

    diverged: bool
    workers: int
    virtual_s: float
    """Of the whole run."""

    rows: int
    """Of the whole run."""

    turns: int
    """Of each shard, in the whole run."""

    evaluations: tuple[Evaluated, ...]
    staleness: Mapping[int, int]
    """How many messages of each staleness there were; empty where all are of the newest weights."""

    @property
    def score(self) -> float:
        """Return the lower score of the last two evaluations; -infinity if it diverged, or has only one."""
        last = [evaluation.score for evaluation in self.evaluations[-2:]]
        return -math.inf if self.diverged or len(last) < 2 else min(last)

    def reached(self, target: float) -> Evaluated | None:
        """Return the first evaluation whose score is at the target, and the next one's, too.

        None: there is none, or the run diverged, even if that was later.
        """
        if self.diverged:
            return None
        for evaluation, following in zip(self.evaluations, self.evaluations[1:], strict=False):
            if min(evaluation.score, following.score) >= target:
                return evaluation
        return None

    def time_to(self, target: float) -> float:
        """Return the virtual seconds until the target is reached; infinite if it never is."""
        evaluation = self.reached(target)
        return math.inf if evaluation is None else evaluation.virtual_s

    @cached_property
    def mean_staleness(self) -> float:
        """Return the mean of all messages; 0 where all are of the newest weights."""
        messages = sum(self.staleness.values())
        return sum(tau * count for tau, count in self.staleness.items()) / messages if messages else 0.0


def read_outcome(folder: Location) -> Outcome:
    """Read what a run gave.

    Raises:
        OSError, ValueError, LookupError, TypeError: the folder holds no such run.
    """
    summary, metrics = read_record(folder / SUMMARY), read_metrics(folder / METRICS)
    spent: dict[int, tuple[float, int, float]] = {}
    virtual_s, rows, sent, staleness = 0.0, 0, 0.0, Counter[int]()
    for step in metrics.steps:
        virtual_s, rows, sent = step["virtual_s"], rows + step["rows"], sent + step["sent_bytes"]
        spent[step["step"]] = virtual_s, rows, sent
        staleness.update(step.get("staleness", ()))
    return Outcome(
        folder=folder.name,
        diverged=summary["status"] != "finished",
        workers=summary["num_workers"],
        virtual_s=virtual_s,
        rows=rows,
        turns=summary["turns"],
        evaluations=tuple(_evaluated(line, *spent[line["step"]]) for line in metrics.evaluations),
        staleness=staleness,
    )


def _evaluated(line: Mapping[str, Any], virtual_s: float, rows: int, sent: float) -> Evaluated:
    loss = line["test_loss"]
    return Evaluated(
        virtual_s=virtual_s,
        rows=rows,
        sent_bytes=sent,
        loss=math.nan if loss is None else loss,
        accuracy=line.get("test_accuracy"),
    )
