"""Gossip in virtual time: when every shard has made its turn, and has what its peers have sent.

Nothing waits for more than its own peers, so a slow shard delays its neighbours first, and all others later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparksgd.engines.simulated.costs import Costs, Link
from sparksgd.solvers.gossip import GossipSolver

__all__ = ["VirtualGossip"]


class VirtualGossip:
    """Counts the virtual seconds of the turns.

    Args:
        costs: of the cluster.
        worker_of: the worker of each shard.
        rows_of: returns the rows of a shard's turn.
        lag: 1: a message leaves before the gradient of its turn is computed; 0: after it.
    """

    def __init__(
        self, costs: Costs, worker_of: Mapping[int, int], rows_of: Callable[[int, int], int], lag: int
    ) -> None:
        self._costs, self._worker_of, self._rows_of, self._lag = costs, worker_of, rows_of, lag
        self._ready_s = dict.fromkeys(worker_of, 0.0)
        self._free_s = dict.fromkeys(worker_of.values(), 0.0)
        self._links = {worker: Link() for worker in self._free_s}
        self.sent_bytes = 0
        """Bytes of vectors between workers."""

    def turn(self, solver: GossipSolver, turn: int) -> float:
        """Let every shard make a turn; return when the last one has what its peers have sent."""
        config, free_s = self._costs.config, self._free_s
        has_all_s: dict[int, float] = {}
        sent_s: dict[int, float] = {}
        for shard, worker in sorted(self._worker_of.items()):
            begins_s = max(self._ready_s[shard], free_s[worker])
            ends_s = begins_s + self._costs.turn_s(worker, shard, turn, self._rows_of(shard, turn))
            free_s[worker] = has_all_s[shard] = ends_s
            sent_s[shard] = begins_s if self._lag else ends_s
        for shard, at_s in sorted(sent_s.items(), key=lambda one: (one[1], one[0])):
            worker = self._worker_of[shard]
            for peer in solver.peers(turn, shard):
                arrives_s = at_s
                if self._worker_of[peer] != worker:
                    self.sent_bytes += self._costs.vector_bytes
                    arrives_s = self._links[worker].carry(at_s, self._costs.vectors_s(1)) + config.latency_s
                has_all_s[peer] = max(has_all_s[peer], arrives_s)
        self._ready_s = has_all_s
        return max(has_all_s.values())
