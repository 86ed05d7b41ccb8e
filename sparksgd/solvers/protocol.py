"""What a solver is: a central half that owns the parameters, and a worker half.

The central half takes what workers send and gives new weights; the worker half says what a worker
sends of a fresh gradient.  Both are pure: same inputs, same bits; no clock, I/O, thread, Spark or
global random number.  A solver decides; an engine carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from sparksgd.flat import Weights

__all__ = ["GradientSum", "Solver", "StepOutcome", "WorkerHalf"]


@dataclass(kw_only=True)
class GradientSum:
    """Sums over the rows of a piece, or of all pieces below a node of the addition tree.

    Legend: P parameters, Q running statistics, C counters.
    """

    gradient: npt.NDArray[np.floating]
    """Sum of the gradients of the loss over the rows, float32[P]."""

    statistics: npt.NDArray[np.floating]
    """Sum over the rows of the running statistics that their piece left behind, float32[Q]."""

    counters: npt.NDArray[np.int64]
    """Batch-norm's counters, the largest of any piece, int64[C]."""

    loss: float
    """Sum of the loss over the rows."""

    rows: int
    """How many rows."""

    shards: int = 1
    """How many shards took part."""

    def __iadd__(self, other: Self) -> Self:
        self.gradient += other.gradient
        self.statistics += other.statistics
        np.maximum(self.counters, other.counters, out=self.counters)
        self.loss += other.loss
        self.rows += other.rows
        self.shards += other.shards
        return self


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one update did."""

    lr: float
    """The learning rate that it used (of the first parameter group)."""

    gradient_norm: float | None
    """Euclidean norm of the mean gradient before clipping; None where no norm was asked for."""


class WorkerHalf(Protocol):
    """The part of a solver that runs beside the gradients; it must pickle."""

    def outgoing(self, fresh: GradientSum) -> GradientSum | None:
        """Return what to send of a shard's fresh gradient; None sends nothing this time."""
        ...


class Solver(Protocol):
    """The central half: owner of parameters, optimiser and step count."""

    step: int
    """Updates so far: the version of the weights."""

    def worker_half(self) -> WorkerHalf:
        """Return the worker half, to be shipped once."""
        ...

    def weights(self) -> Weights:
        """Return the weights to compute the next gradients from."""
        ...

    def receive(self, arrived: GradientSum) -> StepOutcome:
        """Take the sum that arrived and make one step, or raise and stay as before."""
        ...
