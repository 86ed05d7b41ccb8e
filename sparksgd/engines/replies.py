"""What workers reply to a request, and how replies are added on the way to the driver."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Self

from sparksgd.arithmetic.addition_tree import Addable, Partials, merge_partials
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.errors import NotFinite, ShardMissing, SparkSGDError, TrainingError, UpdateNotFinite
from sparksgd.models.metrics import Sums, add_sums
from sparksgd.solvers.protocol import added_weights

__all__ = ["Evaluation", "Reply", "WorkerReport", "failure_to_tell", "with_place"]


@dataclass(kw_only=True)
class Evaluation:
    """Sums over rows in evaluation mode."""

    loss: float
    """Sum of the loss, by weight."""

    correct: float | None
    """See `weight_of_hits`; None if there are neither classes nor several labels."""

    rows: int
    """How many rows."""

    weight: float | None = None
    """The sum of their weights; None: they have none, and each weighs 1."""

    sums: Sums = field(default_factory=dict)
    """What metrics are computed from."""

    def __iadd__(self, other: Self) -> Self:
        self.loss += other.loss
        if self.correct is not None and other.correct is not None:
            self.correct += other.correct
        self.rows += other.rows
        self.weight = added_weights(self.weight, other.weight)
        add_sums(self.sums, other.sums)
        return self


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """Which worker computed, and when, by the clock of its host."""

    worker: int
    host: str
    rows: int
    started_at_s: float
    ended_at_s: float

    numerics: Numerics
    """Its arithmetic, which may change when another executor takes its place."""

    @property
    def compute_s(self) -> float:
        """Seconds of work."""
        return self.ended_at_s - self.started_at_s


@dataclass(kw_only=True)
class Reply:
    """The reply of a worker to a request, or the sum of several replies."""

    leaves: int
    """S, the leaves of the addition tree."""

    partials: Partials = field(default_factory=dict)
    """The sums, by node of the tree."""

    workers: list[WorkerReport] = field(default_factory=list)
    """The workers that took part."""

    shards: list[int] = field(default_factory=list)
    """The shards that are in the sums."""

    failure: SparkSGDError | None = None
    """The error, as a value: what Spark does with a task that raises depends on the number of partitions."""

    def __iadd__(self, other: Self) -> Self:
        self.workers += other.workers
        self.shards += other.shards
        if self.failure is None or other.failure is None:
            self.failure = self.failure or other.failure
        else:
            self.failure = failure_to_tell(self.failure, other.failure)
        if self.failure is not None:
            self.partials = {}
        else:
            merge_partials(self.partials, other.partials, self.leaves)
        return self

    def total(self) -> Addable:
        """Return the sum over all shards.

        Raises:
            TrainingError: no shard sent a message.
        """
        total = self.partials[(0, self.leaves)]
        if total is None:
            raise TrainingError(
                f"none of the shards {sorted(self.shards)} sent a message: no step can be made"
            )
        return total


def failure_to_tell(one: SparkSGDError, other: SparkSGDError) -> SparkSGDError:
    """Return which of two failures to report; missing shards are reported together."""
    if isinstance(one, ShardMissing):
        return one + other if isinstance(other, ShardMissing) else other
    if isinstance(one, UpdateNotFinite) and isinstance(other, NotFinite):
        return other  # it may say that the weights themselves are of no use
    return one


def with_place(error: SparkSGDError, worker: int, doing: str) -> SparkSGDError:
    """Return an error that also says where it happened."""
    if isinstance(error, ShardMissing):
        return error
    return type(error)(f"{error}\n  in {doing}, on worker {worker} at {socket.gethostname()}")
