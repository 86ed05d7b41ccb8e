"""Gathering of an evaluation: a worker evaluates one test shard at a time, and nobody waits for a late one.

A worker evaluates shards of its own host only.  When all are given, those without an answer are given to
others, too: equal weights and rows give equal sums, so the first answer counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sparksgd.engines.replies import Evaluation

__all__ = ["EvaluationGathering"]


class EvaluationGathering:
    """Decides who evaluates which test shard.

    Args:
        host_of: the host of each test shard.
    """

    def __init__(self, host_of: Mapping[int, str]) -> None:
        self._host_of = dict(sorted(host_of.items()))
        self._given: dict[int, set[int]] = {shard: set() for shard in self._host_of}
        self.found: dict[int, Evaluation | None] = {}
        """The sums of each shard that was answered; None: it has no rows."""

    @property
    def is_complete(self) -> bool:
        """Return whether all shards are answered."""
        return len(self.found) == len(self._host_of)

    def can_go_on(self, hosts: Collection[str]) -> bool:
        """Return whether workers on these hosts have all shards that are not answered yet."""
        return all(host in hosts for shard, host in self._host_of.items() if shard not in self.found)

    def give(self, worker: int, host: str) -> int | None:
        """Return the shard that a worker of a host evaluates next; None: nothing is left for it."""
        left = [
            shard
            for shard, where in self._host_of.items()
            if where == host and shard not in self.found and worker not in self._given[shard]
        ]
        if not left:
            return None
        shard = min(left, key=lambda one: len(self._given[one]))
        self._given[shard].add(worker)
        return shard

    def answered(self, shard: int, sums: Evaluation | None) -> None:
        """Take the sums of a shard; later ones of the same are ignored."""
        if shard in self._host_of:
            self.found.setdefault(shard, sums)

    def left(self, worker: int) -> None:
        """Give to others what a worker was given, who is gone."""
        for given in self._given.values():
            given.discard(worker)
