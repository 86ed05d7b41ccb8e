"""Which rows are held out of a training: by a hash, or by a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparksgd
from sparksgd.config import Config
from sparksgd.data.held_out import Side, sides_of
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.row_reading import Rows, read_rows
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.errors import BadRows, ConfigError, DataError

SCHEMA = RowSchema.of(
    pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64()), ("key", pa.string())]),
    {"x": [0.0, 0.0]}, features=["x"], label="y", id=None, whole_labels=True,
)  # fmt: skip
BY_ID = RowSchema.of(
    pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64()), ("key", pa.string())]),
    {"x": [0.0, 0.0]}, features=["x"], label="y", id="key", whole_labels=True,
)  # fmt: skip


def table(rows: int, **columns: Any) -> pa.Table:
    x = np.random.default_rng(0).normal(size=(rows, 2)).astype("f4")
    keys = [f"row {number}" for number in range(rows)]
    return pa.table({"x": x.tolist(), "y": np.arange(rows) % 3, "key": keys, **columns})


def sides(**by: Any) -> tuple[Side, Side]:
    return Side(is_held_out=False, **by), Side(is_held_out=True, **by)


def read(rows: pa.Table, side: Side | None, schema: RowSchema = SCHEMA) -> Rows:
    return read_rows(rows.combine_chunks().to_batches()[0], schema, side)


def records(rows: Rows) -> list[bytes]:
    return [record.tobytes() for record in rows.records]


@pytest.mark.parametrize("schema", [SCHEMA, BY_ID])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_a_hash_holds_out_about_that_part_and_each_row_is_in_one(schema: RowSchema, fraction: float) -> None:
    rows = table(4000)
    trained, held_out = (read(rows, part, schema) for part in sides(fraction=fraction))
    assert abs(len(held_out.records) / 4000 - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5
    assert sorted(records(trained) + records(held_out)) == sorted(records(read(rows, None, schema)))
    both = RowReport()
    both += trained.report
    both += held_out.report
    assert both == read(rows, None, schema).report


def test_what_is_held_out_does_not_follow_the_shards() -> None:
    _, part = sides(fraction=0.25)
    for shards in (2, 3, 8):
        counts = np.bincount(read(table(4000), part).shards(shards), minlength=shards)
        assert counts.min() > 0.7 * counts.mean()


@settings(max_examples=30)
@given(st.floats(0.01, 0.99), st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_the_same_rows_are_held_out_in_any_order_and_any_batches(
    fraction: float, seed: int, batches: int
) -> None:
    rows, (_, part) = table(60), sides(fraction=fraction)
    order = np.random.default_rng(seed).permutation(60)
    found = [
        record
        for places in np.array_split(order, batches)
        for record in records(read(rows.take(pa.array(places)), part))
    ]
    assert sorted(found) == sorted(records(read(rows, part)))


def test_rows_of_the_same_features_or_the_same_id_are_on_one_side() -> None:
    rows = table(400)
    twice = pa.concat_tables([rows, rows.set_column(1, "y", pa.array((np.arange(400) + 1) % 3))])
    trained, held_out = (read(twice, part) for part in sides(fraction=0.5))
    features = [
        {record[SCHEMA.features[0].field].tobytes() for record in side.records}
        for side in (trained, held_out)
    ]
    assert not features[0] & features[1]
    moved = rows.set_column(0, "x", pa.array(rows["x"].to_pylist()[::-1]))
    mine = [
        {bytes(key[:16]) for key in read(each, sides(fraction=0.5)[1], BY_ID).keys} for each in (rows, moved)
    ]
    assert mine[0] == mine[1]


def test_a_column_holds_out_where_it_is_true() -> None:
    rows = table(100, out=pa.array([number % 4 == 0 for number in range(100)]))
    trained, held_out = (read(rows, part) for part in sides(column="out"))
    every = records(read(rows, None))
    assert records(held_out) == every[::4]
    assert records(trained) == [record for number, record in enumerate(every) if number % 4]


def test_a_row_whose_column_is_null_is_a_bad_one_and_on_no_side() -> None:
    rows = table(4, out=pa.array([True, False, None, None]))
    trained, held_out = (read(rows, part) for part in sides(column="out"))
    assert dict(trained.report.bad) == {"null in 'out'": 2}
    assert not held_out.report.bad
    assert [len(trained.records), len(held_out.records)] == [1, 1]


def test_bad_rows_are_told_once() -> None:
    x = pa.array([[0.0, 1.0], [float("nan"), 1.0], None, [0.5, 2.0]], pa.list_(pa.float32()))
    rows = pa.table({"x": x, "y": [0, 1, 2, 0], "key": list("abcd"), "out": [False, True, False, True]})
    trained, held_out = (read(rows, part).report for part in sides(fraction=0.5))
    assert trained.bad.total() == 2
    assert held_out.bad.total() == 0
    trained, held_out = (read(rows, part).report for part in sides(column="out"))
    assert (trained.bad.total(), held_out.bad.total()) == (1, 1)


def config_of(**data: Any) -> Config:
    return Config.from_dict(
        {
            "data": {"features": "x", "label": "y", **data},
            "model": {"name": "torch.nn:Linear", "in_features": 2, "out_features": 3},
            "engine": {"name": "inline"},
            "train": {"rows_per_step": 20, "num_shards": 2},
        }
    )


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = table(200, out=pa.array([number % 5 == 0 for number in range(200)]), word=["a"] * 200)
    pq.write_table(rows, tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


@pytest.mark.parametrize("data", [{"validation_fraction": 0.2}, {"validation_column": "out"}])
def test_a_training_uses_one_part_and_evaluates_on_the_other(path: str, data: dict[str, Any]) -> None:
    config = config_of(**data)
    training = sparksgd.train(config, path)
    trained, held_out = sides_of(config.data, has_test=False)
    parts = [ParquetRows(path, part).inspect(training.plan.schema, 2) for part in (trained, held_out)]
    assert training.test_rows is not None
    assert [training.rows.rows, training.test_rows.rows] == [part.rows for part in parts]
    assert sum(part.rows for part in parts) == 200
    assert [training.rows.digest, training.test_rows.digest] == [part.digest for part in parts]
    assert training.evaluations[-1].rows == parts[1].rows


def test_a_held_out_part_trains_as_files_of_the_two_parts_do(path: str, tmp_path: Path) -> None:
    rows = pq.read_table(path)
    is_out = rows["out"].to_pylist()
    pq.write_table(rows.filter(pa.array([not each for each in is_out])), tmp_path / "train.parquet")
    pq.write_table(rows.filter(pa.array(is_out)), tmp_path / "test.parquet")
    apart = sparksgd.train(config_of(), str(tmp_path / "train.parquet"), str(tmp_path / "test.parquet"))
    together = sparksgd.train(config_of(validation_column="out"), path)
    assert together.flat.parameters_sha256() == apart.flat.parameters_sha256()
    assert together.evaluations[-1].loss == apart.evaluations[-1].loss


def test_what_cannot_be_held_out_is_refused(path: str) -> None:
    for data, told in (
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0, but must be above 0 and below 1"),
        ({"validation_fraction": 0.0}, "must be above 0 and below 1"),
        ({"validation_column": "y"}, "is 'y', which is a feature, the label, data.weight or data.id"),
        ({"validation_column": "out", "validation_fraction": 0.1}, "are set, but a run evaluates on one set"),
        ({"validation_column": "out", "test": path}, "data.test and data.validation_column are set"),
    ):
        with pytest.raises(ConfigError, match=told):
            config_of(**data)
    with pytest.raises(ConfigError, match=r"data\.test and data\.validation_fraction are set"):
        sparksgd.train(config_of(validation_fraction=0.1), path, path)
    for column, told in (
        ("word", "is 'word', which is string, but must be boolean"),
        ("nowhere", "the data has no column 'nowhere'"),
    ):
        with pytest.raises(DataError, match=told):
            sparksgd.train(config_of(validation_column=column), path)
    with pytest.raises(DataError, match="validation_fraction is 1e-09: set a larger part, or give"):
        sparksgd.train(config_of(validation_fraction=1e-9), path)


def test_a_null_in_the_column_ends_a_training_before_its_first_step(tmp_path: Path) -> None:
    out = pa.array([None if number == 150 else number % 5 == 0 for number in range(200)])
    pq.write_table(table(200, out=out), tmp_path / "rows.parquet")
    with pytest.raises(BadRows, match="1 with null in 'out'"):
        sparksgd.train(config_of(validation_column="out"), str(tmp_path / "rows.parquet"))


def test_a_column_that_is_true_everywhere_or_nowhere_is_named(tmp_path: Path) -> None:
    for value, told in ((True, "training data is empty: .* is 'out', which is true in every row"),
                        (False, "held-out data is empty: .* is 'out', which is nowhere true")):  # fmt: skip
        pq.write_table(table(200, out=pa.array([value] * 200)), tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=told):
            sparksgd.train(config_of(validation_column="out"), str(tmp_path / "rows.parquet"))


def test_the_hash_is_the_same_in_every_version() -> None:
    """Another one would train other rows under the same configuration, and refuse checkpoints of before."""
    keys = (np.arange(32 * 32) ** 2 % 251).astype(np.uint8).reshape(32, 32)
    found = Side(is_held_out=True, fraction=0.25).by_hash(keys)
    assert np.flatnonzero(found).tolist() == [12, 13, 15, 23, 25]
