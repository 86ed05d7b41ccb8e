"""A row is checked, cast and keyed by its content, whatever Arrow type and layout brought it."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from decimal import Decimal
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.data.row_reading import Rows, read_rows
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import BadRows, DataError

calm = settings(deadline=None, derandomize=True, database=None)  # no clock, no chance

NAN, INF = math.nan, math.inf


def batch_of(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch({name: pa.array(column) for name, column in columns.items()})


def schema_of(
    batch: pa.RecordBatch,
    *,
    features: tuple[str, ...] = ("x",),
    id: str | None = None,
    whole_labels: bool = True,
    classes: int | None = None,
) -> RowSchema:
    first = {
        name: next((v for v in batch.column(name).to_pylist() if v), None) for name in batch.schema.names
    }
    schema = RowSchema.of(batch.schema, first, features=features, label="y", id=id, whole_labels=whole_labels)
    return replace(schema, classes=classes)


def read(batch: pa.RecordBatch, **options: Any) -> Rows:
    return read_rows(batch, schema_of(batch, **options))


def hashed(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


# What a column becomes


@pytest.mark.parametrize(
    ("column", "dtype", "values"),
    [
        (pa.array([b"\x00\xff", b"ab"], pa.binary()), "uint8", [[0, 255], [97, 98]]),
        (pa.array([b"\x00\xff", b"ab"], pa.large_binary()), "uint8", [[0, 255], [97, 98]]),
        (pa.array([b"\x00\xff", b"ab"], pa.binary(2)), "uint8", [[0, 255], [97, 98]]),
        (pa.array([[1.5, 2], [3, -4]], pa.list_(pa.float32())), "float32", [[1.5, 2], [3, -4]]),
        (pa.array([[1.5, 2], [3, -4]], pa.list_(pa.float64())), "float32", [[1.5, 2], [3, -4]]),
        (pa.array([[1.5, 2], [3, -4]], pa.list_(pa.float16())), "float32", [[1.5, 2], [3, -4]]),
        (pa.array([[1.5, 2], [3, -4]], pa.large_list(pa.float32())), "float32", [[1.5, 2], [3, -4]]),
        (pa.array([[1.5, 2], [3, -4]], pa.list_(pa.float32(), 2)), "float32", [[1.5, 2], [3, -4]]),
        (pa.array([[1, 2], [3, -4]], pa.list_(pa.int8())), "int64", [[1, 2], [3, -4]]),
        (pa.array([[1, 2], [3, 255]], pa.list_(pa.uint8(), 2)), "int64", [[1, 2], [3, 255]]),
        (pa.array([[True, False], [False, True]]), "int64", [[1, 0], [0, 1]]),
        (pa.array([[Decimal("1.25")], [Decimal("-2")]]), "float32", [[1.25], [-2]]),
        (pa.array([1.5, -4], pa.float64()), "float32", [1.5, -4]),
        (pa.array([Decimal("1.25"), Decimal("-2.00")]), "float32", [1.25, -2]),
        (pa.array([Decimal("1.25"), Decimal("-2")], pa.decimal256(50, 2)), "float32", [1.25, -2]),
        (pa.array([7, -4], pa.int16()), "int64", [7, -4]),
        (pa.array([True, False]), "int64", [1, 0]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_column_becomes_numbers_of_its_record_s_type(
    column: pa.Array, dtype: str, values: list[Any]
) -> None:
    padded = pa.concat_arrays([column[1:], column, column[:1]])
    for batch in (
        batch_of(x=column, y=[0, 1]),
        pa.record_batch({"x": padded, "y": pa.array([9, 0, 1, 9])}).slice(1, 2),  # a slice of a longer one
    ):
        schema = schema_of(batch)
        (feature,) = schema.features
        rows = read_rows(batch, schema)
        found = schema.feature_arrays(rows.records)["x"]
        assert feature.dtype == dtype == found.dtype
        assert feature.shape == np.shape(values[0])
        assert found.tolist() == values
        assert schema.label_array(rows.records).tolist() == [0, 1]


def test_a_batch_without_rows_is_no_rows() -> None:
    batch = batch_of(x=pa.array([b"ab"], pa.binary()), y=[1])
    rows = read_rows(batch.slice(0, 0), schema_of(batch))
    assert (len(rows.records), rows.keys.shape, rows.report) == (0, (0, 32), RowReport())


def test_several_columns_become_several_arrays() -> None:
    batch = batch_of(width=[1.0, 2.0], y=[0, 1], pixels=[b"abc", b"def"])
    schema = schema_of(batch, features=("pixels", "width"))
    arrays = schema.feature_arrays(read_rows(batch, schema).records)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "pixels": [[97, 98, 99], [100, 101, 102]],
        "width": [1.0, 2.0],
    }
    assert schema.columns == ["pixels", "width", "y"]


@pytest.mark.parametrize(
    ("column", "whole_labels", "dtype"),
    [
        ([1, 0], True, "int64"),
        ([1.0, 0.0], True, "int64"),
        ([True, False], True, "int64"),
        ([1.0, 0.0], False, "float32"),
        ([1, 0], False, "int64"),
        ([Decimal("1.0"), Decimal("0.0")], False, "float32"),
    ],
)
def test_labels_are_class_numbers_or_numbers(column: list[Any], whole_labels: bool, dtype: str) -> None:
    batch = batch_of(x=[1.0, 2.0], y=column)
    schema = schema_of(batch, whole_labels=whole_labels)
    labels = schema.label_array(read_rows(batch, schema).records)
    assert (labels.tolist(), labels.dtype) == ([1, 0], dtype)


# Columns that cannot be trained on


@pytest.mark.parametrize(
    ("columns", "phrases"),
    [
        ({"xx": [1.0], "y": [0]}, ["no column 'x'", "did you mean xx?"]),
        ({"picture": [1.0], "y": [0]}, ["no column 'x'", "valid: picture, y"]),
        ({"x": [1.0], "label": [0]}, ["no column 'y'"]),
        ({"x": ["one"], "y": [0]}, ["'x' is string", "cast it", "data.features"]),
        ({"x": [["one"]], "y": [0]}, ["'x' is", "string", "flat list of numbers"]),
        ({"x": [[[1.0]]], "y": [0]}, ["'x' is list<item: list<item: double>>", "flat list of numbers"]),
        ({"x": [{"a": 1}], "y": [0]}, ["'x' is struct<a: int64>"]),
        ({"x": [1.0], "y": ["cat"]}, ["'y' is string"]),
        ({"x": [1.0], "y": [[1, 2]]}, ["label column 'y' is list<item: int64>", "a number per row"]),
        ({"x": [1.0], "y": [b"1"]}, ["label column 'y' is binary", "a number per row"]),
    ],
)
def test_a_column_that_is_missing_or_of_a_wrong_type_is_refused(
    columns: dict[str, list[Any]], phrases: list[str]
) -> None:
    batch = batch_of(**columns)
    with pytest.raises(DataError) as refused:
        RowSchema.of(
            batch.schema,
            {name: values[0] for name, values in columns.items()},
            features=("x",),
            label="y",
            id=None,
            whole_labels=True,
        )
    for phrase in phrases:
        assert phrase in str(refused.value)


def test_a_missing_identity_column_is_refused() -> None:
    with pytest.raises(DataError, match=r"no column 'key' \(did you mean keys\?\)"):
        schema_of(batch_of(x=[1.0], y=[0], keys=[1]), id="key")


# Rows that cannot be trained on


@pytest.mark.parametrize(
    ("x", "y", "reason", "example"),
    [
        ([[1.0, 2], None], [0, 0], "null in 'x'", "None"),
        ([[1.0, 2], [3, 4]], [0, None], "null in 'y'", "None"),
        ([[1.0, 2], [3, None]], [0, 0], "null inside the list in 'x'", "None"),
        (
            [[1.0, 2], [3]],
            [0, 0],
            "a number of values other than 2 (most rows') in 'x'",
            "1",
        ),
        (
            [b"ab", b"abc"],
            [0, 0],
            "a number of values other than 2 (most rows') in 'x'",
            "3",
        ),
        ([[1.0, 2], [3, NAN]], [0, 0], "NaN or infinity (as float32) in 'x'", "nan"),
        ([[1.0, 2], [3, -INF]], [0, 0], "NaN or infinity (as float32) in 'x'", "-inf"),
        ([[1.0, 2], [3, 4e38]], [0, 0], "NaN or infinity (as float32) in 'x'", "inf"),
        ([1.0, INF], [0, 0], "NaN or infinity (as float32) in 'x'", "inf"),
        ([1.0, 2.0], [0, 10], "a label outside 0..9", "10"),
        ([1.0, 2.0], [0, -1], "a label outside 0..9", "-1"),
        ([1.0, 2.0], [0, INF], "a label outside 0..9", "inf"),
        ([1.0, 2.0], [0, 0.5], "a label that is no whole number in 'y'", "0.5"),
        ([1.0, 2.0], [0, NAN], "a label that is no whole number in 'y'", "nan"),
    ],
)
def test_a_bad_row_is_left_out_and_counted_with_an_example(
    x: list[Any], y: list[Any], reason: str, example: str
) -> None:
    for bad_first in (False, True):
        order = [1, 0] if bad_first else [0, 1]
        batch = batch_of(x=[x[i] for i in order], y=pa.array(y).take(order))
        schema = schema_of(batch_of(x=x, y=y), classes=10)
        rows = read_rows(batch, schema)
        assert rows.report.bad == {reason: 1}
        assert rows.report.examples == {reason: [example]}
        assert rows.report.rows == len(rows.records) == len(rows.keys) == 1
        found = schema.feature_arrays(rows.records)["x"].tolist()
        assert found == [list(x[0]) if isinstance(x[0], list | bytes) else x[0]]


@pytest.mark.parametrize("label", [NAN, -INF, 1e39])
def test_a_label_of_a_regression_must_be_finite_as_float32(label: float) -> None:
    rows = read(batch_of(x=[1.0, 2.0], y=[0.5, label]), whole_labels=False)
    assert rows.report.bad == {"a label that is NaN or infinite in 'y'": 1}


def test_a_null_identity_is_a_bad_row() -> None:
    rows = read(batch_of(x=[1.0, 2.0], y=[0, 0], key=["a", None]), id="key")
    assert (rows.report.rows, rows.report.bad) == (1, {"null in 'key'": 1})


def test_a_row_that_is_bad_in_every_way_counts_once() -> None:
    rows = read(batch_of(x=[[1.0, 2], [NAN, None]], y=[0, 99]), classes=10)
    assert (rows.report.rows, rows.report.bad.total()) == (1, 1)


values = st.one_of(st.floats(width=64), st.none())
lists = st.one_of(st.none(), st.lists(values, min_size=2, max_size=2), st.lists(values, max_size=3))
labels = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.5, -1.0, NAN]))


@calm
@given(st.lists(st.tuples(lists, labels), max_size=12).map(lambda rows: [*rows, ([1.0, 2.0], 0.0)]))
def test_the_good_rows_are_those_that_a_person_would_keep_one_by_one(
    rows: list[tuple[list[float | None] | None, float | None]],
) -> None:
    def good(x: list[float | None] | None, y: float | None) -> bool:
        if x is None or y is None or len(x) != 2 or None in x:
            return False
        return all(abs(np.float32(value)) < INF for value in x) and y in (0, 1, 2)

    batch = pa.record_batch(
        {
            "x": pa.array([x for x, _ in rows], pa.list_(pa.float64())),
            "y": pa.array([y for _, y in rows], pa.float64()),
        }
    )
    schema = RowSchema(
        features=(Feature(name="x", dtype="float32", length=2),), label="y", label_dtype="int64", classes=3
    )
    with np.errstate(over="ignore"):
        kept = [(np.float32(x).tolist(), y) for x, y in rows if good(x, y)]
    read = read_rows(batch, schema)
    assert [(x.tolist(), y) for x, y in read.records.tolist()] == kept
    assert read.report.rows == len(kept)
    assert read.report.bad.total() == len(rows) - len(kept)


# Reports


def test_bad_rows_are_an_error_that_counts_them_and_says_what_to_do() -> None:
    batch = batch_of(x=[1.0, None, NAN, NAN, 2.0, INF, -INF], y=[0, 0, 0, 0, 7, 0, 0])
    report = read(batch, classes=5).report
    with pytest.raises(BadRows) as refused:
        report.check("error", 100)
    assert str(refused.value) == (
        "6 of 7 rows cannot be trained on: 4 with NaN or infinity (as float32) in 'x' (such as nan, nan, "
        "inf); 1 with null in 'x' (such as None); 1 with a label outside 0..4 (such as 7). Next: if "
        'your classes are numbered from 1, subtract 1; else mend the data, or set data.on_bad_row = "skip" '
        "and data.max_bad_rows"
    )


def test_bad_rows_may_be_skipped_up_to_a_number() -> None:
    report = read(batch_of(x=[1.0, NAN, NAN], y=[0, 0, 0])).report
    report.check("skip", 2)
    with pytest.raises(BadRows, match=r"2 of 3 rows .* more than data.max_bad_rows = 1: mend the data"):
        report.check("skip", 1)
    read(batch_of(x=[1.0], y=[0])).report.check("error", 0)


def test_reports_add_up() -> None:
    batch = batch_of(x=[1.0, NAN, 2.0, None, 3.0, NAN, NAN, NAN], y=[0] * 8)
    schema = schema_of(batch)
    total = RowReport()
    for start in range(0, 8, 3):
        total += read_rows(batch.slice(start, 3), schema).report
    assert total == read_rows(batch, schema).report
    assert total.bad == {"null in 'x'": 1, "NaN or infinity (as float32) in 'x'": 4}
    assert total.examples["NaN or infinity (as float32) in 'x'"] == ["nan", "nan", "nan"]


def test_a_report_survives_json() -> None:
    rows = read(batch_of(x=[1.0, NAN, None], y=[0, 0, 0]))
    report = rows.report
    report += RowReport(shard_digests=rows.shard_digests(5))
    assert list(report.shard_digests.values()) == [report.digest]
    back = RowReport.from_json(json.loads(json.dumps(report.to_json())))
    assert back == report
    back += report  # and still adds up
    assert (back.rows, back.bad.total()) == (2, 4)


# Keys


def test_a_key_is_the_hash_of_the_features_then_of_features_and_label() -> None:
    rows = read(batch_of(x=[[1.5, -2.0]], y=[3]))
    features, label = np.array([1.5, -2.0], "<f4").tobytes(), (3).to_bytes(8, "little")
    assert rows.keys.tobytes() == hashed(features) + hashed(features + label)


@pytest.mark.parametrize(
    ("column", "text"),
    [(["cat"], b"cat"), ([17], b"17"), ([b"\x00\x01"], b"\x00\x01")],
)
def test_an_identity_column_leads_the_key(column: list[Any], text: bytes) -> None:
    batch = batch_of(x=[1.5], y=[3], key=column)
    keys = read(batch, id="key").keys
    assert keys.tobytes() == hashed(text) + read(batch).keys.tobytes()


def test_zero_and_negative_zero_are_one_row() -> None:
    rows = read(batch_of(x=[[0.0, 1.0], [-0.0, 1.0]], y=[0, 0]))
    assert rows.keys[0].tobytes() == rows.keys[1].tobytes()
    assert rows.records[0].tobytes() == rows.records[1].tobytes()


def test_doubles_that_are_one_float32_are_one_row() -> None:
    tenth = float(np.float32(0.1))
    rows = read(batch_of(x=pa.array([[0.1], [tenth], [0.1 + 1e-6]], pa.list_(pa.float64())), y=[0, 0, 0]))
    assert rows.keys[0].tobytes() == rows.keys[1].tobytes() != rows.keys[2].tobytes()


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2), pa.list_(pa.float16())],
    ids=str,
)
def test_one_row_has_one_key_however_its_list_was_stored(kind: pa.DataType) -> None:
    content = [[0.5, 1.0], [-2.0, 0.25]]
    stored = read(batch_of(x=pa.array(content, kind), y=[0, 1]))
    assert (
        stored.keys.tobytes()
        == read(batch_of(x=pa.array(content, pa.list_(pa.float32())), y=[0, 1])).keys.tobytes()
    )


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary(2)], ids=str)
def test_one_row_has_one_key_however_its_bytes_were_stored(kind: pa.DataType) -> None:
    stored = read(batch_of(x=pa.array([b"ab", b"cd"], kind), y=[0, 1]))
    assert stored.keys.tobytes() == read(batch_of(x=[b"ab", b"cd"], y=[0, 1])).keys.tobytes()


@calm
@given(st.lists(st.integers(3, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_keys_do_not_depend_on_how_rows_lie_in_batches(lengths: list[int], skipped: int) -> None:
    count = skipped + sum(lengths)
    pixels = [None if row % 7 == 3 else bytes([row, row * 3 % 251]) for row in range(count)]
    weights = [None if row % 5 == 4 else [row / 3, -row] for row in range(count)]
    table = batch_of(a=pixels, b=weights, y=pa.array(range(count)))
    schema = RowSchema(
        features=(Feature(name="a", dtype="uint8", length=2), Feature(name="b", dtype="float32", length=2)),
        label="y",
        label_dtype="int64",
    )
    ends = list(itertools.accumulate(lengths, initial=skipped))
    parts = [table.slice(start, end - start) for start, end in itertools.pairwise(ends)]
    in_parts = b"".join(read_rows(part, schema).keys.tobytes() for part in parts)
    alone = [
        read_rows(batch_of(**{k: [v] for k, v in row.items()}), schema)
        for row in table.to_pylist()
        if row["a"] is not None and row["b"] is not None and row["y"] >= skipped
    ]
    assert in_parts == b"".join(rows.keys.tobytes() for rows in alone)


def test_the_order_of_columns_is_the_configuration_s_not_the_table_s() -> None:
    one, two = batch_of(a=[1.0], b=[2.0], y=[0]), batch_of(b=[2.0], y=[0], a=[1.0])
    in_order = read(one, features=("a", "b")).keys.tobytes()
    assert read(two, features=("a", "b")).keys.tobytes() == in_order
    assert read(one, features=("b", "a")).keys.tobytes() != in_order


def test_a_row_goes_to_the_shard_of_its_leading_hash() -> None:
    rows = read(batch_of(x=[[1.5], [2.5]], y=[0, 0]))
    leading = [hashed(np.array([value], "<f4").tobytes()) for value in (1.5, 2.5)]
    assert rows.shards(5).tolist() == [int.from_bytes(key[:8], "little") % 5 for key in leading]


def test_rows_are_dealt_evenly() -> None:
    rows = read(batch_of(x=pa.array(range(8000), pa.float64()), y=[0] * 8000))
    dealt = np.bincount(rows.shards(8), minlength=8)
    assert dealt.sum() == 8000
    assert abs(dealt - 1000).max() < 150  # five standard deviations of a fair deal


def test_an_identity_spreads_rows_that_are_all_alike() -> None:
    alike = batch_of(x=[0.0] * 800, y=[0] * 800, key=range(800))
    assert len(set(read(alike).shards(4).tolist())) == 1
    assert abs(np.bincount(read(alike, id="key").shards(4)) - 200).max() < 62  # five standard deviations


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("unit", ["us", "ns"])
def test_an_identity_of_time_is_an_instant_whatever_the_time_zone(unit: str, zone: str) -> None:
    instant = pa.array([1_577_880_000_000_000], pa.int64()).cast(pa.timestamp("us")).cast(pa.timestamp(unit))
    for kind in (pa.timestamp(unit), pa.timestamp(unit, zone)):
        keys = read(batch_of(x=[1.5], y=[3], key=instant.cast(pa.int64()).cast(kind)), id="key").keys
        assert keys[0, :16].tobytes() == hashed(b"2020-01-01 12:00:00+00:00")


def test_an_identity_of_several_values_is_refused() -> None:
    for value in ({"a": 1}, [1, 2]):
        with pytest.raises(DataError, match=r"data\.id is 'key', which is .*, but must be one value per row"):
            read(batch_of(x=[1.5], y=[3], key=[value]), id="key")


@pytest.mark.parametrize(
    "names", [("", "y"), ("(label)", "0"), ("1", "0"), ("a.b", "a`b"), ("self", "class")]
)
def test_a_column_may_have_any_name(names: tuple[str, str]) -> None:
    one, two = names
    batch = pa.RecordBatch.from_arrays([pa.array([1.5]), pa.array([2.5]), pa.array([3])], [one, two, "label"])
    schema = RowSchema.of(
        batch.schema, {one: 1.5, two: 2.5}, features=names, label="label", id=None, whole_labels=True
    )
    records = read_rows(batch, schema).records
    features = schema.feature_arrays(records)
    assert {name: values.tolist() for name, values in features.items()} == {one: [1.5], two: [2.5]}
    assert schema.label_array(records).tolist() == [3]


# The digest of a data set


def test_the_digest_is_the_sum_of_the_rows_hashes() -> None:
    rows = read(batch_of(x=[1.0, 2.0, 3.0], y=[0, 1, 2]))
    last = [row.tobytes()[-16:] for row in rows.keys]
    low = sum(int.from_bytes(h[:8], "little") for h in last) % 2**64
    high = sum(int.from_bytes(h[8:], "little") for h in last) % 2**64
    assert rows.report.digest == (low, high)
    assert rows.report.data_digest == f"{low:016x}{high:016x}"


def test_the_digest_tells_other_ids_and_ids_that_rows_exchanged() -> None:
    def digests(ids: list[int]) -> tuple[str, str]:
        report = read(batch_of(x=[1.0, 2.0, 2.0], y=[0, 0, 0], key=ids), id="key").report
        return report.data_digest, report.content_digest

    of = {digests(ids) for ids in ([1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 2])}
    assert len({data for data, _ in of}) == 4
    assert {content for _, content in of} == {
        read(batch_of(x=[1.0, 2.0, 2.0], y=[0, 0, 0])).report.data_digest
    }
    assert digests([1, 3, 2]) == digests([1, 2, 3])  # equal rows: as if they had changed places


def test_the_digest_is_free_of_order_and_of_batches() -> None:
    numbers = list(range(100))
    in_order = read(batch_of(x=pa.array(numbers, pa.float64()), y=numbers)).report.digest
    random.Random(0).shuffle(numbers)
    shuffled = batch_of(x=pa.array(numbers, pa.float64()), y=numbers)
    schema, total = schema_of(shuffled), RowReport()
    for start in range(0, 100, 30):
        total += read_rows(shuffled.slice(start, 30), schema).report
    assert total.digest == in_order


def test_the_digest_tells_a_duplicate_a_triplicate_and_a_changed_label() -> None:
    def digest(x: list[float], y: list[int]) -> tuple[int, int]:
        return read(batch_of(x=x, y=y)).report.digest

    digests = [
        digest([1.0, 2.0], [0, 0]),
        digest([1.0, 2.0, 2.0], [0, 0, 0]),
        digest([1.0, 2.0, 2.0, 2.0], [0, 0, 0, 0]),
        digest([1.0, 2.0], [0, 1]),
        digest([1.0, 2.0], [1, 0]),
        digest([1.0], [0]),
    ]
    assert len(set(digests)) == len(digests)
