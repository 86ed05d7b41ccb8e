"""Weights of rows are read, checked, and part of what a shard holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from sparksgd.config import Config
from sparksgd.data.row_reading import Rows, read_rows
from sparksgd.data.schema import RowSchema
from sparksgd.errors import ConfigError, DataError


def batch_of(weights: pa.Array | Sequence[float | None]) -> pa.RecordBatch:
    count = len(weights)
    return pa.record_batch(
        {"x": pa.array([[float(n), 1.0] for n in range(count)]), "y": [0] * count, "w": pa.array(weights)}
    )


def read(batch: pa.RecordBatch, weight: str | None = "w") -> Rows:
    schema = RowSchema.of(
        batch.schema, {"x": [0.0, 0.0]}, features=("x",), label="y", id=None, weight=weight, whole_labels=True
    )
    return read_rows(batch, schema)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (pa.array([0.1, 2.5]), [np.float32(0.1), 2.5]),
        (pa.array([1, 3], pa.int64()), [1, 3]),
        (pa.array([True, True]), [1, 1]),
        (pa.array([Decimal("1.5"), Decimal("2.25")]), [1.5, 2.25]),
    ],
)
def test_numbers_of_any_type_are_weights(column: pa.Array, values: list[float]) -> None:
    rows = read(batch_of(column))
    assert rows.records["(weight)"].tolist() == values
    assert rows.records["(weight)"].dtype == np.float32


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e300, 1.1e12, 0.9e-12, None])
def test_a_weight_that_is_not_above_0_makes_a_bad_row(bad: float | None) -> None:
    rows = read(batch_of([1.0, bad, 2.0]))
    assert rows.records["(weight)"].tolist() == [1.0, 2.0]
    (reason,) = rows.report.bad
    assert reason == ("null in 'w'" if bad is None else "a weight that is not from 1e-12 to 1e+12 in 'w'")
    assert rows.report.examples[reason] == [repr(bad)]


def test_a_weight_moves_no_row_to_another_shard_but_changes_what_was_read() -> None:
    one, other, none = read(batch_of([1.0, 2.0])), read(batch_of([1.0, 3.0])), read(batch_of([1, 1]), None)
    assert one.shards(5).tolist() == other.shards(5).tolist() == none.shards(5).tolist()
    assert len({rows.report.digest for rows in (one, other, none)}) == 3


def test_a_feature_may_have_the_name_of_the_weight_in_a_record() -> None:
    batch = pa.record_batch({"(weight)": [1.5], "y": [0], "w": [2.0]})
    schema = RowSchema.of(
        batch.schema, {}, features=("(weight)",), label="y", id=None, weight="w", whole_labels=True
    )
    records = read_rows(batch, schema).records
    assert schema.feature_arrays(records)["(weight)"].tolist() == [1.5]
    weights = schema.weight_array(records)
    assert weights is not None
    assert weights.tolist() == [2.0]


def test_a_column_of_weights_must_be_there_and_hold_numbers() -> None:
    with pytest.raises(DataError, match="the data has no column 'v'"):
        read(batch_of([1.0]), "v")
    with pytest.raises(DataError, match=r"weight column 'x' is list<.*>, but must be a number per row"):
        read(batch_of([1.0]), "x")


@pytest.mark.parametrize("key", ["label", "features", "id"])
def test_a_weight_is_a_column_of_its_own(key: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.weight is 'a', which is a feature, the label or data\.id"):
        Config.load(None, ["model.name=lenet", f"data.{key}=a", "data.weight=a"])
    with pytest.raises(ConfigError, match=r"data\.validation_column is 'a', which is .*data\.weight"):
        Config.load(None, ["model.name=lenet", "data.validation_column=a", "data.weight=a"])
