"""What happens between a centre and its shards, whatever carries it: virtual time, or a wire.

engine:  an event ──> gathering ──> instructions ──> the centre decides, or the carrier acts
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from sparksgd.engines.gathering.arrivals import ArrivalGathering
from sparksgd.engines.gathering.shards import Back, Begin, Decided, Deliver, Drop, Lost, Pushed, Start, Turned
from sparksgd.engines.trace import TraceEvent
from sparksgd.errors import ClusterError
from sparksgd.solvers.arrivals import ArrivalSolver, ArrivalStep, Verdict
from sparksgd.solvers.protocol import Answer, Message

__all__ = ["ArrivalExchange", "Carrier", "all_are_held"]


def all_are_held(after: str) -> ClusterError:
    """Return the error of a run in which every shard waits for a step that none of them can cause."""
    return ClusterError(
        f"after {after} every shard waits, and no step can be made, because solver.name holds all of them "
        f"back: let more shards take part (train.num_shards), or fewer make a step"
    )


class Carrier(Protocol):
    """Carries answers to shards, and lets them compute."""

    def take(self, shard: int, answer: Answer) -> None:
        """Give a shard the centre's answer, before it starts its next turn."""
        ...

    def start(self, shard: int, turn: int) -> None:
        """Let a shard make a turn, from what it took last."""
        ...

    def forget(self, shard: int) -> None:
        """Let a shard that is lost begin anew when it is back."""
        ...


class ArrivalExchange:
    """Lets a centre and its shards exchange, in the order in which an engine tells what happened.

    Args:
        solver: the central half.
        worker_of: the worker of each shard that has rows.
        carrier: carries out what was decided.
        turns: where the run goes on from a checkpoint, the turn that each shard makes first.
    """

    def __init__(
        self,
        solver: ArrivalSolver,
        worker_of: Mapping[int, int],
        carrier: Carrier,
        turns: Mapping[int, int] | None = None,
    ) -> None:
        self._solver, self._carrier = solver, carrier
        self._gathering = ArrivalGathering(worker_of, turns)
        if turns is not None:
            self._gathering.trace.note("anew", turn=0, version=solver.version)
        self._messages: dict[int, Message] = {}
        self._steps: list[ArrivalStep] = []
        self.ignored = 0
        """How many messages were too old."""

    @property
    def has_steps(self) -> bool:
        """Return whether steps were made that nobody has taken."""
        return bool(self._steps)

    def take_steps(self) -> tuple[list[ArrivalStep], tuple[TraceEvent, ...]]:
        """Return the steps since the last call, and what chance decided."""
        steps, self._steps = self._steps, []
        return steps, self._gathering.trace.take()

    def begin(self) -> None:
        """Let all shards begin."""
        self._follow(self._gathering.begin())

    def back(self, shard: int) -> None:
        """Let a shard begin that some worker has now."""
        self._follow(self._gathering.handle(Back(shard=shard)))

    def lost(self, shard: int) -> None:
        """Go on without a shard, which no worker has any more."""
        self._messages.pop(shard, None)
        self._follow(self._gathering.handle(Lost(shard=shard)))

    def pushed(self, shard: int, message: Message) -> None:
        """Take the message that a shard sent after the turn that it was started for."""
        self._messages[shard] = message
        self._follow(self._gathering.handle(Pushed(shard=shard)))

    def turned(self, shard: int) -> None:
        """Note that a shard has made its turn, and sends nothing after it."""
        self._follow(self._gathering.handle(Turned(shard=shard)))

    def _follow(self, instructions: Iterable[Start | Deliver | Drop | Begin]) -> None:
        for told in instructions:
            if isinstance(told, Start):
                self._carrier.start(told.shard, told.turn)
            elif isinstance(told, Deliver):
                message = self._messages.pop(told.shard)
                self._decided(self._solver.arrived(told.shard, message, told.version), told.shard)
            elif isinstance(told, Drop):
                self._carrier.forget(told.shard)
                self._decided(self._solver.lost(told.shard), None)
            else:
                self._decided(Verdict(answers={told.shard: self._solver.begin(told.shard)}), None)

    def _decided(self, verdict: Verdict, sender: int | None) -> None:
        self._steps += verdict.steps
        self.ignored += verdict.is_ignored
        for shard, answer in verdict.answers.items():
            self._carrier.take(shard, answer)
        versions = {shard: answer.weights.version for shard, answer in verdict.answers.items()}
        self._follow(self._gathering.handle(Decided(answers=versions, sender=sender)))
