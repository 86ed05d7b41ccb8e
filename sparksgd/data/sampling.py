"""Which rows of which shard take part in which turn.

A shard's turn is the number of its piece; in synchronous SGD every shard is at the turn of the step.
An epoch has K = ceil(rows / rows_per_step) turns.  In each epoch a shard's n_s rows are shuffled, and cut
into K pieces of n_s // K rows.  The n_s mod K rows left over go one each to consecutive turns, and the next
shard's rows left over continue from there.  So every row takes part exactly once in an epoch, and every
turn has floor or ceil(rows / K) rows, even if shards are uneven or empty.

Legend: S shards, K turns per epoch, n_s rows of shard s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sparksgd.arithmetic.seeds import permutation

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which rows belong to which turn; a pure function of its fields.

    >>> sampling = Sampling(shard_rows=(5, 0, 4), rows_per_step=4, seed=1)
    >>> sampling.turns_per_epoch, [sampling.rows_of_turn(turn) for turn in range(3)]
    (3, [3, 3, 3])
    """

    shard_rows: tuple[int, ...]
    """Rows of each shard, [S]."""

    rows_per_step: int
    """The most rows of all shards that take part in one turn."""

    seed: int
    """The experiment's seed; it keys the shuffles."""

    @cached_property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(self.shard_rows)

    @cached_property
    def turns_per_epoch(self) -> int:
        """K."""
        return -(-self.rows // self.rows_per_step)

    @cached_property
    def _cursors(self) -> tuple[int, ...]:
        """The turn at which each shard's left-over rows begin, [S]."""
        cursors, cursor = [], 0
        for rows in self.shard_rows:
            cursors.append(cursor)
            cursor = (cursor + rows % self.turns_per_epoch) % self.turns_per_epoch
        return tuple(cursors)

    def epoch_of(self, turn: int) -> int:
        """Return the epoch (from 0) of a turn (from 0)."""
        return turn // self.turns_per_epoch

    def piece_bounds(self, shard: int, turn: int) -> tuple[int, int]:
        """Return where the piece starts and ends in the shard's shuffled order."""
        turns, position = self.turns_per_epoch, turn % self.turns_per_epoch
        share, left_over = divmod(self.shard_rows[shard], turns)
        cursor = self._cursors[shard]
        wrapped = max(0, cursor + left_over - turns)

        def extras_before(position: int) -> int:
            return min(position, wrapped) + min(max(0, position - cursor), left_over - wrapped)

        start = position * share + extras_before(position)
        return start, (position + 1) * share + extras_before(position + 1)

    def piece_rows(self, shard: int, turn: int) -> int:
        """Return how many rows of the shard take part in the turn."""
        start, end = self.piece_bounds(shard, turn)
        return end - start

    def rows_of_turn(self, turn: int, shards: Iterable[int] | None = None) -> int:
        """Return how many rows take part in the turn, floor or ceil(rows / K); or how many of some shards."""
        asked = range(len(self.shard_rows)) if shards is None else shards
        return sum(self.piece_rows(shard, turn) for shard in asked)

    def rows_of_round(self, turns: range, shards: Iterable[int] | None = None) -> int:
        """Return how many rows take part in some consecutive turns; or how many of some shards."""
        asked = range(len(self.shard_rows)) if shards is None else tuple(shards)
        rows, first = 0, turns.start
        while first < turns.stop:  # within an epoch pieces follow each other in the shard's order
            last = min(turns.stop, (self.epoch_of(first) + 1) * self.turns_per_epoch) - 1
            rows += sum(self.piece_bounds(s, last)[1] - self.piece_bounds(s, first)[0] for s in asked)
            first = last + 1
        return rows

    def piece_sizes(self) -> set[int]:
        """Return every number of rows, other than 0, that a piece can have."""
        sizes = set()
        for rows in self.shard_rows:
            share, left_over = divmod(rows, self.turns_per_epoch)
            sizes |= {share, share + 1} if left_over else {share}
        return sizes - {0}

    def shuffled(self, shard: int, epoch: int) -> npt.NDArray[np.uint32]:
        """Return the shard's row numbers in the order of an epoch, [n_s]."""
        return permutation(self.shard_rows[shard], self.seed, "shuffle", shard, epoch)
