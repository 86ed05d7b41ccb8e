"""The rows that the trial computes: few, that differ, with labels of all classes; and some that are made up.

Legend: B rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparksgd.data.schema import RowSchema

__all__ = ["CROSSED_ROWS", "DIFFERENT_ROWS", "FIRST_ROWS", "crossed", "distinct", "labelled_0", "varied"]

DIFFERENT_ROWS = 8
CROSSED_ROWS = 4
FIRST_ROWS = DIFFERENT_ROWS + CROSSED_ROWS


def varied(label: npt.NDArray[Any], output: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return labels of all classes, [B], if labels are numbers of classes: files are often sorted by them.

    Args:
        label: the labels.
        output: the shape of what the module gives.
    """
    if len(output) != 2 or output[1] < 2 or label.ndim != 1:
        return label
    if label.dtype.kind not in "iu" or label.min() < 0 or label.max() >= output[1]:
        return label
    return (np.arange(len(label)) % output[1]).astype(label.dtype)


def labelled_0(records: npt.NDArray[Any], schema: RowSchema, *, classifies: bool) -> npt.NDArray[Any]:
    """Return records whose classes, which may be out of range, are 0."""
    records = records.copy()
    if classifies:
        schema.label_array(records)[:] = 0
    return records


def distinct(records: npt.NDArray[Any], schema: RowSchema) -> npt.NDArray[Any]:
    """Return records with different features, [DIFFERENT_ROWS]; where there are too few, variants of them."""
    features = schema.feature_arrays(records).values()
    seen: dict[bytes, int] = {}
    for index in range(len(records)):
        seen.setdefault(b"".join(values[index].tobytes() for values in features), index)
    kept = list(seen.values())[:DIFFERENT_ROWS]
    rows = np.resize(records[kept], DIFFERENT_ROWS).copy()
    chance = np.random.default_rng(16)
    for column in schema.feature_arrays(rows).values():
        for number in range(len(kept), DIFFERENT_ROWS):
            values = column[number]
            if values.dtype.kind == "f":
                size = max(1.0, float(np.abs(values).max(initial=0)))
                column[number] = values + 0.1 * size * chance.standard_normal(values.shape)
            elif values.ndim:
                column[number] = chance.permutation(values)
    return rows


def crossed(records: npt.NDArray[Any], schema: RowSchema) -> npt.NDArray[Any]:
    """Return rows that are equal to others in each single column, and differ elsewhere, [CROSSED_ROWS].

    Two records exchange some of their values: so for any column, each of the two new rows has there what one
    of the records has.  The first pair exchanges single numbers, the second one every other column.

    Args:
        records: at least as many, that differ.
        schema: of a record.
    """
    rows = records[:CROSSED_ROWS].copy()
    chance = np.random.default_rng(17)
    columns = [*schema.feature_arrays(rows).values(), schema.label_array(rows)]
    for number, column in enumerate(columns):
        shape = column.shape[1:]
        for first, leaves in ((0, chance.random(shape) < 0.5), (2, np.full(shape, number % 2 == 0))):
            one, other = column[first].copy(), column[first + 1].copy()
            column[first], column[first + 1] = np.where(leaves, one, other), np.where(leaves, other, one)
    return rows
