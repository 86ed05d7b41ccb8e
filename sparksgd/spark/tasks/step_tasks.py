"""What executors run at each step: make the computer once, reply with partial sums.

No pyspark at module level: executors import this as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sparksgd.arithmetic.flat import Weights
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.arithmetic.scripted import forget_all_optimised
from sparksgd.data.shard import Descriptor
from sparksgd.engines.compute import Computer
from sparksgd.engines.freed_memory import keep_freed_memory_until_exit
from sparksgd.engines.replies import Reply
from sparksgd.errors import ClusterError
from sparksgd.imports.same_code import Pickled
from sparksgd.peers.mesh import Meeting
from sparksgd.peers.replica import Replica, Segment, SegmentAnswer
from sparksgd.solvers.protocol import Answer, SolverState
from sparksgd.solvers.without_compiler import without_compiler
from sparksgd.spark.tasks.worker_exit import leave_quietly

if TYPE_CHECKING:
    from pyspark import Broadcast

__all__ = ["Round", "ShippedPlan", "add", "contact", "evaluate", "make_round", "meet", "segment"]


class ShippedPlan:
    """A plan on its way to the workers; each process that gets it makes one computer of it."""

    def __init__(self, pickled: Pickled) -> None:
        self._pickled = pickled

    @cached_property
    def computer(self) -> Computer:
        """The process's computer, kept as long as Spark keeps the broadcast."""
        leave_quietly()
        without_compiler()
        keep_freed_memory_until_exit()
        forget_all_optimised()
        computer = Computer(self._pickled.load())
        gc.collect()
        gc.freeze()  # PySpark's daemon collects after every task: over all of torch, 20 to 60 ms
        return computer

    @cached_property
    def replica(self) -> Replica:
        """The process's part in all-reduce, kept likewise."""
        return Replica(self.computer)

    def __getstate__(self) -> dict[str, Any]:
        return {"_pickled": self._pickled}


def contact(
    shipped: Broadcast[ShippedPlan], workers: list[int], partition: int, shards: Iterable[Descriptor]
) -> Iterator[tuple[int, Numerics]]:
    """Task: make the computer, and yield this worker's number and numerics."""
    list(shards)
    yield workers[partition], shipped.value.computer.numerics


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a step asks for."""

    answer: Answer
    """What the round begins with."""

    asked: frozenset[int]
    """The shards that take part."""


def make_round(
    shipped: Broadcast[ShippedPlan],
    asked: Broadcast[Round],
    workers: list[int],
    partition: int,
    shards: Iterable[Descriptor],
) -> Iterator[Reply]:
    """Task: make a round's turns.

    Args:
        shipped: the plan.
        asked: the round.
        workers: which worker each partition is.
        partition: this task's.
        shards: the partition's.
    """
    yield shipped.value.computer.round(workers[partition], shards, asked.value.answer, asked.value.asked)


def evaluate(
    shipped: Broadcast[ShippedPlan],
    weights: Broadcast[Weights],
    workers: list[int],
    partition: int,
    shards: Iterable[Descriptor],
) -> Iterator[Reply]:
    """Task: evaluate weights on the partition's shards; arguments as above."""
    yield shipped.value.computer.evaluations(workers[partition], shards, weights.value)


def meet(
    shipped: Broadcast[ShippedPlan],
    meeting: Meeting,
    workers: list[int],
    partition: int,
    shards: Iterable[Descriptor],
) -> Iterator[ClusterError | None]:
    """Task: meet the other workers, and yield what was in the way."""
    list(shards)
    yield shipped.value.replica.meet(workers[partition], meeting)


def segment(
    shipped: Broadcast[ShippedPlan],
    state: Broadcast[SolverState] | None,
    asked: Segment,
    workers: list[int],
    partition: int,
    shards: Iterable[Descriptor],
) -> Iterator[SegmentAnswer]:
    """Task: make the steps of a segment with the other workers.

    Args:
        shipped: the plan.
        state: the solver's, at the first step; None where the workers should have kept it.
        asked: what to do.
        workers: which worker each partition is.
        partition: this task's.
        shards: the partition's.
    """
    load = None if state is None else lambda: state.value
    yield shipped.value.replica.run(workers[partition], shards, asked, load)


def add(into: Reply | None, other: Reply) -> Reply:
    """Merge two replies, as treeAggregate wants it; None is the empty one."""
    if into is None:
        return other
    into += other
    return into
