"""Counts which shards took part in steps, and when workers answered, for reports and for the deal."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from sparksgd.engines.protocol import StepReport

__all__ = ["Participation"]

_KEPT = 10_000  # the quantiles are of this many last arrivals of a worker
_LEAST_SHARE = 0.5  # a shard that takes part in a smaller share of an epoch's steps is starved
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Participation:
    """Counts in how many steps each shard took part, and when workers answered.

    Args:
        num_shards: S.
    """

    def __init__(self, num_shards: int) -> None:
        self._steps = 0
        self._of_shard = [0] * num_shards
        self._epoch_steps = 0
        self._epoch_of_shard = [0] * num_shards
        self._late: dict[int, int] = defaultdict(int)
        self._answers: dict[int, int] = defaultdict(int)
        self._arrivals_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self.staleness: Counter[int] = Counter()
        """How many messages had each staleness, where shards make turns at their own pace."""

        self.ignored = 0
        """How many messages were too old to be used."""

        self.lost_workers = 0
        """How many workers were lost, in virtual time or from the server."""

        self._next_turns = [0] * num_shards
        self._server_s = self._server_busy_s = 0.0
        self._turns_s = self._waits_s = 0.0

    def add(self, report: StepReport) -> None:
        """Note a step."""
        self.staleness.update(report.staleness)
        self.ignored += report.ignored
        for event in report.trace:
            if event.kind == "push" and event.shard is not None:
                self._next_turns[event.shard] = event.turn + 1
        if report.virtual is not None:
            self.lost_workers += report.virtual.lost_workers
        if report.server is not None:
            self.lost_workers += report.server.lost_workers
            self._server_s += report.timing.total
            self._server_busy_s += report.server.busy_s
            self._turns_s += report.server.computed_s
            self._waits_s += report.server.waited_s
        self._steps += 1
        self._epoch_steps += not report.staleness  # shards at their own pace are not starved of steps
        for shard in report.took_part:
            self._of_shard[shard] += 1
            self._epoch_of_shard[shard] += 1
        for worker in report.late:
            self._late[worker] += 1
        for arrival in report.arrivals:
            self._answers[arrival.worker] += 1
            self._arrivals_s[arrival.worker].append(arrival.arrived_s)

    def starved(self) -> dict[int, float]:
        """Return the starved shards of this epoch so far, and in which share of its steps each took part."""
        if not self._epoch_steps:
            return {}  # the run ended between the end of an epoch and its checkpoint
        steps_made = self._epoch_steps
        shares = {shard: steps / steps_made for shard, steps in enumerate(self._epoch_of_shard)}
        return {shard: share for shard, share in shares.items() if share < _LEAST_SHARE}

    def begin_epoch(self) -> None:
        """Begin to count the steps of a new epoch."""
        self._epoch_steps = 0
        self._epoch_of_shard = [0] * len(self._of_shard)

    def memory(self) -> dict[str, Any]:
        """Return the counts, without the times, which are those of one process."""
        return {
            "steps": self._steps,
            "of_shard": list(self._of_shard),
            "epoch_steps": self._epoch_steps,
            "epoch_of_shard": list(self._epoch_of_shard),
            "late": dict(self._late),
            "answers": dict(self._answers),
            "staleness": dict(self.staleness),
            "ignored": self.ignored,
            "lost_workers": self.lost_workers,
            "next_turns": list(self._next_turns),
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the counts that `memory` returned."""
        self._steps, self._epoch_steps = memory["steps"], memory["epoch_steps"]
        self._of_shard, self._epoch_of_shard = list(memory["of_shard"]), list(memory["epoch_of_shard"])
        self._late.update(memory["late"])
        self._answers.update(memory["answers"])
        if "next_turns" in memory:  # of a checkpoint before these, in which shards had no pace of their own
            self.staleness.update(memory["staleness"])
            self.ignored, self.lost_workers = memory["ignored"], memory["lost_workers"]
            self._next_turns = list(memory["next_turns"])

    def next_turns(self) -> dict[int, int]:
        """Return, where shards make turns at their own pace, each one's turn after its last message."""
        return dict(enumerate(self._next_turns))

    @property
    def mean_staleness(self) -> float:
        """Return the mean staleness of all messages; 0 where all are of the newest weights."""
        messages = self.staleness.total()
        return sum(age * count for age, count in self.staleness.items()) / messages if messages else 0.0

    def server(self) -> dict[str, float] | None:
        """Return how busy the server was, and how long workers waited for it; None: there was none.

        Both are shares: of the time of all steps, and of the time of all turns and waits.
        """
        if not self._server_s:
            return None
        return {
            "busy_share": self._server_busy_s / self._server_s,
            "waiting_share": self._waits_s / max(self._turns_s + self._waits_s, 1e-9),
        }

    def shares(self) -> list[float]:
        """Return in which share of all steps each shard took part."""
        return [steps / max(1, self._steps) for steps in self._of_shard]

    def by_worker(self) -> dict[int, dict[str, float | None]]:
        """Return figures of each worker that answers by itself.

        They are the number of its answers, the share of steps that ended without it, and quantiles of the
        arrival times of its last answers, in seconds.
        """
        return {
            worker: {
                "answers": self._answers.get(worker, 0),
                "late_share": self._late.get(worker, 0) / self._steps,
                **_quantiles_s(self._arrivals_s.get(worker)),
            }
            for worker in sorted(self._answers.keys() | self._late.keys())
        }


def _quantiles_s(seconds: Iterable[float] | None) -> dict[str, float | None]:
    return {
        f"arrival_{name}_s": float(np.quantile(list(seconds), share)) if seconds else None
        for name, share in _QUANTILES.items()
    }
