"""Events and instructions of the gatherings that handle each shard by itself: arrivals and gossip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Back", "Begin", "Decided", "Deliver", "Drop", "Lost", "Pushed", "ShardState", "Start", "Turned"]


# Events


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A shard made the turn that it was started for last, and its message is there.

    The engine keeps back what comes from before a loss once the shard is there again.
    """

    shard: int


@dataclass(frozen=True, kw_only=True)
class Turned:
    """A shard made the turn that it was started for last, and has nothing to send after it."""

    shard: int


@dataclass(frozen=True, kw_only=True)
class Decided:
    """The centre decided which shards may go on."""

    answers: Mapping[int, int]
    """The version that each of these shards goes on from."""

    sender: int | None = None
    """The shard whose message caused it; None if no message did."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A shard is lost: no worker has it."""

    shard: int


@dataclass(frozen=True, kw_only=True)
class Back:
    """A lost shard is there again."""

    shard: int


# Instructions


@dataclass(frozen=True, kw_only=True)
class Start:
    """Let a shard make a turn."""

    shard: int
    turn: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Deliver:
    """Give a shard's message to the centre, or to another shard."""

    shard: int

    version: int
    """The version of the weights that it was computed from."""

    to: int | None = None
    """None: the centre."""


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Tell the centre that a shard is lost."""

    shard: int


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Ask the centre what a shard begins with."""

    shard: int


@dataclass(kw_only=True)
class ShardState:
    """Where a shard stands."""

    worker: int

    turn: int = 0
    """The turn that it makes now, or next."""

    version: int = 0
    """The version of the weights that it has."""

    is_computing: bool = False
    is_lost: bool = False
