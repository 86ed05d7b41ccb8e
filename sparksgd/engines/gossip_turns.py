"""The turns of a gossip solver in one process: all shards' halves, and the messages between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from sparksgd.data.shard import Descriptor
from sparksgd.engines.compute import Computer
from sparksgd.engines.shard_work import MakeTurn
from sparksgd.solvers.gossip import GossipHalf, GossipSolver
from sparksgd.solvers.protocol import Gradient, Message, StepOutcome

__all__ = ["GossipTurns", "TurnMade"]


@dataclass(frozen=True, kw_only=True)
class TurnMade:
    """A turn that all shards have made."""

    outcome: StepOutcome
    total: Message
    shards: int
    """How many shards' pieces had rows."""


class GossipTurns:
    """Makes turns of all shards.

    Args:
        computer: has the halves' shapes.
        make: makes a turn.
        table: all shards.
        solver: says who sends to whom.
    """

    def __init__(
        self, computer: Computer, make: MakeTurn, table: Sequence[Descriptor], solver: GossipSolver
    ) -> None:
        self._make, self._table, self._solver = make, table, solver
        answer = solver.answer()
        self.halves: dict[int, GossipHalf] = {}
        """The half of each shard."""

        for shard in range(len(table)):
            self.halves[shard] = cast(GossipHalf, computer.plan.halves.make(computer.flat, shard))
            self.halves[shard].begin(answer.weights)

    @property
    def lag(self) -> int:
        """Whether the exchange runs beside the computing."""
        return self.halves[0].lag

    def next(self) -> TurnMade:
        """Let every shard make a turn, and send and take its messages.

        Raises:
            SparkSGDError: its module, its loss, its rows, or what it computed.
        """
        solver, answer = self._solver, self._solver.answer()
        turn, sent = answer.turn, dict[int, Message | None]()
        made: list[Gradient] = []
        for shard, half in self.halves.items():
            if half.lag:
                sent[shard] = half.send()
            gradient = self._make(self._table[shard], turn, half, answer)
            if gradient is not None:
                made.append(gradient)
            if not half.lag:
                sent[shard] = half.send()
        mail: list[dict[int, Message]] = [{} for _ in self.halves]
        for shard, message in sent.items():
            for peer in solver.peers(turn, shard) if message is not None else ():
                mail[peer][shard] = message  # type: ignore[assignment]  # it is not None
        for half, taken in zip(self.halves.values(), mail, strict=True):
            half.take(taken)
        total = Message.of(made, {})
        outcome = solver.turned((half.share for half in self.halves.values()), total)
        return TurnMade(outcome=outcome, total=total, shards=len(made))
