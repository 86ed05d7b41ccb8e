"""The work of shards that make turns at their own pace: their halves, and what each was answered last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparksgd.data.shard import Descriptor
from sparksgd.engines.compute import Computer
from sparksgd.solvers.protocol import Answer, Gradient, Message, WorkerHalf

__all__ = ["ShardWork"]


class ShardWork:
    """Lets shards take answers, make turns, and send.

    Args:
        computer: computes gradients.
        table: all shards.
        gradients: whether gradients are computed; if not, all are zeros, and no row is read.
    """

    def __init__(self, computer: Computer, table: Sequence[Descriptor], *, gradients: bool = True) -> None:
        self._computer, self._table = computer, table
        self.make = computer.turn if gradients else self._turn_of_zeros
        """Makes a turn of a half; returns its gradient, or None if the piece has no rows."""

        self._halves: dict[int, WorkerHalf[Any]] = {}
        self._answers: dict[int, Answer] = {}

    def take(self, shard: int, answer: Answer) -> None:
        """Give a shard the centre's answer; the first one makes its half."""
        if shard not in self._halves:
            self._halves[shard] = self._computer.plan.halves.make(self._computer.flat, shard)
        self._halves[shard].take(answer)
        self._answers[shard] = answer

    def turn(self, shard: int, turn: int) -> Message | None:
        """Let a shard make a turn; return what it sends after it.

        Raises:
            SparkSGDError: its module, its loss, its rows, or what it computed.
        """
        half, answer = self._halves[shard], self._answers[shard]
        return None if self.make(self._table[shard], turn, half, answer) is None else half.send()

    def _turn_of_zeros(
        self, shard: Descriptor, turn: int, half: WorkerHalf[Any], answer: Answer
    ) -> Gradient | None:
        rows, weights = self._computer.plan.sampling.piece_rows(shard.shard, turn), answer.weights
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

    def forget(self, shard: int) -> None:
        """Let a shard that is lost begin anew."""
        self._halves.pop(shard, None)
        self._answers.pop(shard, None)
