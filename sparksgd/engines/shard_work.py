"""The work of shards that make turns at their own pace: their halves, and what each was answered last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparksgd.data.sampling import Sampling
from sparksgd.data.shard import Descriptor
from sparksgd.engines.compute import Computer
from sparksgd.solvers.protocol import Answer, Gradient, Message, WorkerHalf

__all__ = ["MakeTurn", "ShardWork", "zeros_of"]

MakeTurn = Callable[[Descriptor, int, WorkerHalf[Any], Answer], Gradient | None]
"""Lets a shard's half make a turn; returns its gradient, or None if the piece has no rows."""


class ShardWork:
    """Lets shards take answers, make turns, and send.

    Args:
        computer: knows the halves, and the module's shapes.
        table: the shards, by their numbers.
        make: makes a turn.
    """

    def __init__(
        self, computer: Computer, table: Sequence[Descriptor] | Mapping[int, Descriptor], make: MakeTurn
    ) -> None:
        self._computer, self._table, self._make = computer, table, make
        self._halves: dict[int, WorkerHalf[Any]] = {}
        self._answers: dict[int, Answer] = {}
        self._due: dict[int, Answer] = {}  # of halves with a lag: what is taken after the next turn
        self._computed: dict[int, tuple[int, bool]] = {}  # turns that are computed, and not ended yet

    def take(self, shard: int, answer: Answer) -> None:
        """Give a shard the centre's answer; the first one makes its half."""
        is_new = shard not in self._halves
        if is_new:
            self._halves[shard] = self._computer.plan.halves.make(self._computer.flat, shard)
        if is_new or not self._halves[shard].lag:
            self._take(shard, answer)
        else:
            self._due[shard] = answer

    def _take(self, shard: int, answer: Answer) -> None:
        self._halves[shard].take(answer)
        self._answers[shard] = answer

    def turn(self, shard: int, turn: int) -> Message | None:
        """Let a shard make a turn, unless it is computed already; return what it sends after it.

        Raises:
            SparkSGDError: its module, its loss, its rows, or what it computed.
        """
        if self._computed.get(shard, (None, False))[0] != turn:
            self.compute(shard, turn)
        _, has_rows = self._computed.pop(shard)
        if shard in self._due:
            self._take(shard, self._due.pop(shard))
        return self._halves[shard].send() if has_rows else None

    def compute(self, shard: int, turn: int) -> None:
        """Compute a turn, which `turn` ends: a half with a lag may do so before the answer is there."""
        gradient = self._make(self._table[shard], turn, self._halves[shard], self._answers[shard])
        self._computed[shard] = turn, gradient is not None

    def may_compute_ahead(self, shard: int) -> bool:
        """Return whether a shard computes its next turn while its message is on its way."""
        return bool(self._halves[shard].lag)

    def round(self, shard: int, answer: Answer) -> Message | None:
        """Let a shard make the turns of a round; return what it sends at its end."""
        self.take(shard, answer)
        for turn in range(answer.turn, answer.turn + answer.turns):
            self._make(self._table[shard], turn, self._halves[shard], answer)
        return self._halves[shard].send()

    def forget(self, shard: int) -> None:
        """Let a shard that is lost begin anew."""
        for known in (self._halves, self._answers, self._due, self._computed):
            known.pop(shard, None)


def zeros_of(sampling: Sampling) -> MakeTurn:
    """Return what makes turns whose gradients are zeros, without reading a row."""

    def make(shard: Descriptor, turn: int, half: WorkerHalf[Any], answer: Answer) -> Gradient | None:
        rows, weights = sampling.piece_rows(shard.shard, turn), answer.weights
        if not rows:
            return None
        gradient = Gradient(
            vector=np.zeros_like(weights.parameters),
            statistics=weights.statistics,
            counters=weights.counters,
            loss=0.0,
            rows=rows,
            shard=shard.shard,
            turn=turn,
        )
        half.turn(gradient, answer.settings[0] if answer.settings else {})
        return gradient

    return make
