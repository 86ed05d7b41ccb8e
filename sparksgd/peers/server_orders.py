"""Which orders the workers of the server have not answered: each answers its own one after the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sparksgd.peers.frames import Frame
from sparksgd.peers.server_desk import Came, Joined, Left
from sparksgd.peers.server_frames import EVALUATED, MISSING, SENT, TURNED

__all__ = ["ANSWERS_OF_EVALUATIONS", "ANSWERS_OF_TURNS", "EvaluationOrder", "Orders", "TurnOrder"]

ANSWERS_OF_TURNS, ANSWERS_OF_EVALUATIONS = (SENT, TURNED), (EVALUATED, MISSING)
"""Kinds of frames."""


@dataclass(frozen=True, kw_only=True)
class TurnOrder:
    """Make a turn."""

    shard: int
    turn: int

    def is_answered_by(self, frame: Frame) -> bool:
        """Return whether a frame is the answer."""
        told = frame.fields.get("shard"), frame.fields.get("turn")
        return frame.kind in ANSWERS_OF_TURNS and told == (self.shard, self.turn)


@dataclass(frozen=True, kw_only=True)
class EvaluationOrder:
    """Evaluate a test shard."""

    evaluation: int
    """The number of the evaluation."""

    shard: int
    version: int
    """Of the weights."""

    def is_answered_by(self, frame: Frame) -> bool:
        """Return whether a frame is the answer."""
        told = frame.fields.get("shard"), frame.fields.get("version")
        return frame.kind in ANSWERS_OF_EVALUATIONS and told == (self.shard, self.version)


class Orders:
    """The orders that are not answered, of each worker and each of its seats.

    A worker with an order is busy: another one would wait behind it, with a vector for each.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[int, int], deque[TurnOrder | EvaluationOrder]] = {}
        self._evaluations = 0

    def next_evaluation(self) -> int:
        """Return the number of another evaluation."""
        self._evaluations += 1
        return self._evaluations

    def give(self, worker: int, seat: int, order: TurnOrder | EvaluationOrder) -> None:
        """Note an order that a worker gets."""
        self._given.setdefault((worker, seat), deque()).append(order)

    def is_free(self, worker: int, seat: int) -> bool:
        """Return whether a worker has answered all orders."""
        return (worker, seat) not in self._given

    def note(self, event: Joined | Left | Came | None) -> TurnOrder | EvaluationOrder | None:
        """Note what happened, once; return the order that it answers."""
        if isinstance(event, Joined):
            for worker, seat in list(self._given):
                if worker == event.worker:
                    del self._given[worker, seat]
        elif isinstance(event, Left):
            self._given.pop((event.worker, event.seat), None)
        elif isinstance(event, Came):
            given = self._given.get((event.worker, event.seat))
            if given and given[0].is_answered_by(event.frame):
                order = given.popleft()
                if not given:
                    del self._given[event.worker, event.seat]
                return order
        return None
