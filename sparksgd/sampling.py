"""Which rows of which shard take part in which step.

An epoch is K = ceil(rows / rows_per_step) steps.  Each shard's n_s rows, shuffled anew every epoch,
are cut into K pieces of n_s // K; the n_s mod K left over go one each to consecutive steps, by one
cursor that runs on across the shards.  So every row takes part exactly once an epoch, and every
step takes floor or ceil(rows / K) rows, however uneven or empty the shards.

Legend: S shards, K steps per epoch, n_s rows of shard s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sparksgd.seeds import permutation

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The deal of rows to steps; a pure function of its fields.

    >>> sampling = Sampling(shard_rows=(5, 0, 4), rows_per_step=4, seed=1)
    >>> sampling.steps_per_epoch, [sampling.rows_of_step(step) for step in range(3)]
    (3, [3, 3, 3])
    """

    shard_rows: tuple[int, ...]
    """Rows of each shard, [S]."""

    rows_per_step: int
    """At most so many rows take part in one step."""

    seed: int
    """The experiment's seed; it keys the shuffles."""

    @cached_property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(self.shard_rows)

    @cached_property
    def steps_per_epoch(self) -> int:
        """K."""
        return -(-self.rows // self.rows_per_step)

    @cached_property
    def _cursors(self) -> tuple[int, ...]:
        """The step at which each shard's left-over rows begin, [S]."""
        cursors, cursor = [], 0
        for rows in self.shard_rows:
            cursors.append(cursor)
            cursor = (cursor + rows % self.steps_per_epoch) % self.steps_per_epoch
        return tuple(cursors)

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 0) of a step (from 0)."""
        return step // self.steps_per_epoch

    def piece_bounds(self, shard: int, step: int) -> tuple[int, int]:
        """Return where the piece starts and ends in the shard's shuffled order."""
        steps, position = self.steps_per_epoch, step % self.steps_per_epoch
        share, left_over = divmod(self.shard_rows[shard], steps)
        cursor = self._cursors[shard]
        wrapped = max(0, cursor + left_over - steps)

        def extras_before(position: int) -> int:
            return min(position, wrapped) + min(max(0, position - cursor), left_over - wrapped)

        start = position * share + extras_before(position)
        return start, (position + 1) * share + extras_before(position + 1)

    def piece_rows(self, shard: int, step: int) -> int:
        """Return how many rows of the shard take part in the step."""
        start, end = self.piece_bounds(shard, step)
        return end - start

    def rows_of_step(self, step: int, shards: Iterable[int] | None = None) -> int:
        """Return how many rows take part in the step, floor or ceil(rows / K); or those of some shards."""
        asked = range(len(self.shard_rows)) if shards is None else shards
        return sum(self.piece_rows(shard, step) for shard in asked)

    def piece_sizes(self) -> set[int]:
        """Return every number of rows, other than 0, that a piece can have."""
        sizes = set()
        for rows in self.shard_rows:
            share, left_over = divmod(rows, self.steps_per_epoch)
            sizes |= {share, share + 1} if left_over else {share}
        return sizes - {0}

    def shuffled(self, shard: int, epoch: int) -> npt.NDArray[np.uint32]:
        """Return the shard's row numbers in the order of an epoch, [n_s]."""
        return permutation(self.shard_rows[shard], self.seed, "shuffle", shard, epoch)
