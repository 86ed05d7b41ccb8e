"""The first rows: what a row is, and some rows to try a module on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from typing import Any

import numpy.typing as npt

from sparksgd.config import DataConfig
from sparksgd.data.held_out import check_column
from sparksgd.data.row_reading import read_rows
from sparksgd.data.schema import RowSchema
from sparksgd.data.source import RowSource
from sparksgd.errors import DataError
from sparksgd.models.losses import LossKind, is_of_classes

__all__ = ["first_records", "typical_row"]

_FIRST_ROWS = 64


def first_records(
    data: DataConfig, rows: RowSource, kind: LossKind | None
) -> tuple[RowSchema, npt.NDArray[Any]]:
    """Return the schema of a row, from the first rows, and the good ones of these rows.

    Args:
        data: names the columns.
        rows: rows to train on.
        kind: of the loss.

    Raises:
        DataError: a column is missing or of a type that cannot be trained on, or there is no row.
    """
    also = [name for name in (data.id, data.weight, data.validation_column) if name is not None]
    columns = [*data.features, data.label, *also]
    arrow_schema, first = rows.first_rows(columns, _FIRST_ROWS)
    check_column(data, arrow_schema)
    complete = first.to_pylist()
    if not complete and set(columns) <= set(arrow_schema.names):
        raise DataError(
            f"there is no row to train on: the data is empty, or every row has a null in {', '.join(columns)}"
        )
    schema = RowSchema.of(
        arrow_schema,
        typical_row(complete, (*data.features, data.label)) if complete else {},
        features=data.features,
        label=data.label,
        id=data.id,
        weight=data.weight,
        whole_labels=is_of_classes(kind),
        several_labels=kind == "several labels",
    )
    if schema.num_labels == 0:
        raise DataError(f"label column {data.label!r} has empty lists, but must have a 0 or 1 for each label")
    return schema, read_rows(first.select(schema.columns).combine_chunks().to_batches()[0], schema).records


def typical_row(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Return the first row whose lists have the commonest lengths, so that a bad row decides nothing."""

    def lengths(row: dict[str, Any]) -> tuple[int, ...]:
        return tuple(len(row[name]) if isinstance(row.get(name), Sized) else 0 for name in columns)

    (common, _), *_ = Counter(map(lengths, rows)).most_common(1)
    return next(row for row in rows if lengths(row) == common)
