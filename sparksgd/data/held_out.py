"""Rows that are held out of a training, to be evaluated on.

A row is held out by a boolean column, or by a hash: of its id if there is one, else of its features.  So it
does not matter how the files lie, and rows of one id, or else of equal features, are all on one side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sparksgd.config import DataConfig
from sparksgd.data.hashes import leading_words, stirred
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import require_column
from sparksgd.errors import ConfigError, DataError

__all__ = ["Side", "check_column", "sides_of"]

_APART = 0xA0761D6478BD642F
"""Mixed into a hash first, because the hash itself assigns the row to a shard."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of the rows: what is trained on, or what is held out."""

    is_held_out: bool
    """Which of the two."""

    fraction: float | None = None
    """How much is held out, by a hash."""

    column: str | None = None
    """The boolean column that is true where a row is held out."""

    @property
    def columns(self) -> list[str]:
        """Return the columns that must be read for it."""
        return [] if self.column is None else [self.column]

    def by_column(self, batch: pa.RecordBatch, report: RowReport) -> pa.RecordBatch:
        """Return the rows of a batch that are on this side by the column; nulls are bad rows to train on."""
        if self.column is None:
            return batch
        is_held_out = batch.column(self.column)
        if not self.is_held_out:
            report.found(f"null in {self.column!r}", [None] * is_held_out.null_count)
            is_held_out = pc.invert(is_held_out)
        return batch.filter(is_held_out, null_selection_behavior="drop")

    def by_hash(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return which rows are on this side by their hash, bool[B].

        Args:
            keys: as `Rows` has them, uint8[B, K].
        """
        if self.fraction is None:
            return np.ones(len(keys), bool)
        numbers = stirred(leading_words(keys) ^ np.uint64(_APART))
        is_held_out: npt.NDArray[np.bool_] = numbers < np.uint64(int(self.fraction * 2.0**64))
        return is_held_out if self.is_held_out else ~is_held_out


def sides_of(data: DataConfig, *, has_test: bool) -> tuple[Side | None, Side | None]:
    """Return the side that is trained on, and the one that is held out; None: all rows, and no rows.

    Args:
        data: may hold rows out.
        has_test: whether there are other rows to evaluate on.

    Raises:
        ConfigError: both are given.
    """
    if data.held_out_by is None:
        return None, None
    if has_test:
        raise ConfigError(
            f"test is given, but {data.held_out_by} is set: a run evaluates on one set of rows; unset one "
            f"of them, and evaluate the trained model on the other"
        )
    by = {"fraction": data.validation_fraction, "column": data.validation_column}
    return Side(is_held_out=False, **by), Side(is_held_out=True, **by)  # type: ignore[arg-type]  # each value is of its own type


def check_column(data: DataConfig, columns: pa.Schema) -> None:
    """Refuse a column that cannot say which rows are held out.

    Args:
        data: may name it.
        columns: of the rows.

    Raises:
        DataError: there is no such column, or it is not boolean.
    """
    name = data.validation_column
    if name is None:
        return
    require_column(name, columns)
    kind = columns.field(name).type
    if not pa.types.is_boolean(kind):
        raise DataError(
            f"data.validation_column is {name!r}, which is {kind}, but must be boolean: true where a row is "
            f"held out"
        )
