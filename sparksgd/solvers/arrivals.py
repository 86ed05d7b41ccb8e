"""The central half of a solver of arrivals, and what it decides after each message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.solvers.protocol import Answer, CentralSolver, Message, StepOutcome

__all__ = ["ArrivalSolver", "ArrivalStep", "Verdict"]


@dataclass(frozen=True, kw_only=True)
class ArrivalStep:
    """A step that the centre of an arrivals solver made, and the messages that it used."""

    outcome: StepOutcome
    rows: int

    weight: float
    """Of these rows; how many, if they have none."""

    loss: float
    """The mean of their losses, by weight."""

    shards: tuple[int, ...]
    """The sender of each message."""

    staleness: tuple[int, ...]
    """How many steps were made since each sender had read its weights."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the centre of an arrivals solver decides after a message."""

    answers: Mapping[int, Answer] = field(default_factory=dict)
    """The shards that may go on now, and their answers.  A sender that is not among them is held back."""

    steps: tuple[ArrivalStep, ...] = ()
    """The steps that it made; none if the message is used later."""

    is_ignored: bool = False
    """Whether the message was too old to be used."""


class ArrivalSolver(CentralSolver, Protocol):
    """The central half of a solver whose messages arrive one by one."""

    flat: FlatModule | FlatStrip
    """The module, whose parameters are the solver's."""

    def begin(self, shard: int) -> Answer:
        """Return what a shard begins with, at the start or after a loss."""
        ...

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Take a shard's message, computed from the weights of a version; it belongs to the solver then."""
        ...

    def lost(self, shard: int) -> Verdict:
        """Continue without a shard; return which shards may go on, because they no longer wait for it."""
        ...
