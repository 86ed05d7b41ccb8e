"""Rows of Parquet files on this machine are dealt into shards by what they hold, each exactly once."""

from __future__ import annotations

import tempfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparksgd.data.local_files import LocalShards, ParquetRows
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.data.shard import read_records
from sparksgd.errors import ClusterError, DataError, ShardMissing

SCHEMA = RowSchema(features=(Feature(name="x", dtype="float32", length=2),), label="y", label_dtype="int64")


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def parquet(folder: Path, x: list[list[float]], y: list[int], files: int = 1) -> ParquetRows:
    folder.mkdir()
    for number in range(files):
        part = slice(number * len(x) // files, (number + 1) * len(x) // files)
        columns = {"x": pa.array(x[part], pa.list_(pa.float64())), "y": pa.array(y[part], pa.int64())}
        pq.write_table(pa.table(columns), folder / f"{number:02}.parquet", row_group_size=17)
    return ParquetRows(str(folder))


def dealt(rows: ParquetRows, num_shards: int) -> LocalShards:
    return rows.deal(SCHEMA, num_shards, rows.inspect(SCHEMA, num_shards))


def contents(shards: LocalShards) -> list[bytes]:
    return [read_records(shard, range(shard.rows), SCHEMA.record).tobytes() for shard in shards.table]


def shard_by_hand(x: list[float], num_shards: int) -> int:
    digest = blake2b(np.array(x, "<f4").tobytes(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") % num_shards


NUMBERS = [[float(row), -row / 2] for row in range(200)]


def test_every_row_goes_to_the_shard_of_its_hash(tmp_path: Path) -> None:
    shards = dealt(parquet(tmp_path / "rows", NUMBERS, list(range(200))), 5)
    found = {
        number: {int(record["(label)"]) for record in np.frombuffer(content, SCHEMA.record)}
        for number, content in enumerate(contents(shards))
    }
    by_hand = {
        number: {row for row in range(200) if shard_by_hand(NUMBERS[row], 5) == number} for number in range(5)
    }
    assert found == by_hand
    assert [shard.shard for shard in shards.table] == [0, 1, 2, 3, 4]
    assert sum(shard.rows for shard in shards.table) == 200


def test_shards_are_the_same_bytes_whatever_the_files(tmp_path: Path) -> None:
    # Every third row repeats the features of another under another label.
    x = [NUMBERS[row - row % 3] for row in range(200)]
    one = dealt(parquet(tmp_path / "one", x, list(range(200))), 4)
    order = np.random.default_rng(0).permutation(200)
    thirteen = parquet(tmp_path / "thirteen", [x[row] for row in order], order.tolist(), files=13)
    many = dealt(thirteen, 4)
    assert contents(many) == contents(one)
    assert [shard.digest for shard in many.table] == [shard.digest for shard in one.table]
    assert sum(shard.repeats for shard in one.table) == 200 - 67  # 67 different features


def test_a_bit_that_flips_before_the_rows_are_sorted_is_noticed(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, read = parquet(tmp_path / "rows", NUMBERS, list(range(200))), np.fromfile

    def flipped(file: Path, kind: type) -> np.ndarray:
        content = read(file, kind)
        if file.name == "unsorted-2":
            content[77] ^= 4
        return content

    monkeypatch.setattr(np, "fromfile", flipped)
    with pytest.raises(ShardMissing, match=r"shard 2: .*unsorted-2 on .* is not what was written") as lost:
        dealt(rows, 5)
    assert lost.value.shards == (2,)
    assert list(temporary_folder.iterdir()) == []


def test_the_digests_of_the_shards_add_up_to_that_of_the_inspection(tmp_path: Path) -> None:
    rows = parquet(tmp_path / "rows", NUMBERS, list(range(200)))
    halves = zip(*(shard.row_digest for shard in dealt(rows, 3).table), strict=True)
    assert tuple(sum(half) % 2**64 for half in halves) == rows.inspect(SCHEMA, 4).digest


def test_shards_without_rows_are_there_all_the_same(tmp_path: Path) -> None:
    shards = dealt(parquet(tmp_path / "rows", [[1.0, 2.0]] * 3, [0, 0, 0]), 4)
    assert sorted(shard.rows for shard in shards.table) == [0, 0, 0, 3]


def test_a_full_disk_is_named_with_what_to_do_and_nothing_is_left(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparksgd.data.local_files.ShardWriter.append", full)
    said = "the shards cannot be written: No space left on device in the temporary folder"
    with pytest.raises(ClusterError, match=f"{said} {temporary_folder}; set TMPDIR"):
        dealt(parquet(tmp_path / "rows", NUMBERS, [0] * 200), 3)
    assert list(temporary_folder.iterdir()) == []


def test_closing_removes_every_file(tmp_path: Path, temporary_folder: Path) -> None:
    shards = dealt(parquet(tmp_path / "rows", NUMBERS, [0] * 200), 3)
    assert sum(path.is_file() for path in temporary_folder.rglob("*.records")) == 3
    shards.close()
    assert list(temporary_folder.iterdir()) == []


def test_the_first_rows_are_whole_ones(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    columns = {"x": [None, 1.0, 2.0, 3.0], "y": [0, None, 5, 6], "z": [0, 0, 0, 0]}
    pq.write_table(pa.table(columns), tmp_path / "rows" / "a.parquet")
    schema, first = ParquetRows(str(tmp_path / "rows")).first_rows(["x", "y", "missing"], 1)
    assert schema.names == ["x", "y", "z"]
    assert first.to_pylist() == [{"x": 2.0, "y": 5}]


def folder_of(top: Path, **files: dict[str, list[object]]) -> ParquetRows:
    for name, columns in files.items():
        file = top / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file)
    return ParquetRows(str(top))


def test_a_column_in_the_names_of_folders_is_not_read_from_the_files(tmp_path: Path) -> None:
    rows = folder_of(
        tmp_path / "rows", **{"Y=2__a": {"x": [1.0], "y": [7]}, "Y=3__b": {"x": [1.0], "y": [8]}}
    )
    with pytest.raises(DataError, match=r"column 'Y' is in the names of folders \(Y=2\)"):
        rows.first_rows(["x", "y"], 1)
    assert rows.first_rows(["x"], 1)[1].to_pylist() == [{"x": 1.0}]
    within = ParquetRows(str(tmp_path / "rows" / "Y=2"))  # of it alone, Spark reads the files' columns, too
    assert within.first_rows(["x", "y"], 1)[1].to_pylist() == [{"x": 1.0, "y": 7}]


def test_booleans_are_not_made_of_another_file_s_numbers(tmp_path: Path) -> None:
    rows = folder_of(tmp_path / "rows", a={"x": [1.0], "y": [True]}, b={"x": [1.0], "y": [5]})
    with pytest.raises(DataError, match="column 'y' is int64 in b, but bool in other files"):
        rows.first_rows(["x", "y"], 1)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1.0], [2.0], [0]], names=["x", "x", "y"]), tmp_path / "rows")
    with pytest.raises(DataError, match=r"cannot read .*rows as Parquet: .*duplicate field names"):
        ParquetRows(str(tmp_path / "rows"))
