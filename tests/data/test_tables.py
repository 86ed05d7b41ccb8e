"""Parquet of a table with a log is refused by what lies there; a plain folder never is."""

from __future__ import annotations

import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparksgd.config import Config
from sparksgd.data.tables import refuse_tables
from sparksgd.errors import ClusterError, DataError
from sparksgd.storage import LocalLocation, register_uris
from sparksgd.training.in_process import train_in_process

LOGS = {
    "delta": ["_delta_log/00000000000000000000.json"],
    "delta of a checkpoint": ["_delta_log/00000000000000000010.checkpoint.parquet"],
    "iceberg of a folder": ["metadata/v1.metadata.json", "metadata/version-hint.text"],
    "iceberg, compressed": ["metadata/v2.gz.metadata.json"],
    "iceberg of a catalog": [f"metadata/00003-{uuid.UUID(int=7)}.metadata.json", "metadata/snap-1.avro"],
    "hudi": [".hoodie/hoodie.properties"],
}  # fmt: skip


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet") and "_delta_log" not in name:
            pq.write_table(pa.table({"x": [0.0, 1.0], "y": [0.0, 1.0]}), file)
        else:
            file.touch()
    return folder


@pytest.mark.parametrize("by_spark", [True, False])
@pytest.mark.parametrize("log", LOGS)
def test_a_table_is_refused_as_a_whole_and_in_part(tmp_path: Path, log: str, by_spark: bool) -> None:
    table = lay(tmp_path / "a table", "day=1/one.parquet", "day=2/two.parquet", *LOGS[log])
    link = tmp_path / "link"
    link.symlink_to(table / "day=1")
    inside = ["", "day=1", "day=2/two.parquet", "*/*.parquet", "day=*", "day=1/../day=2"]
    for path in [*(f"{table}/{part}".rstrip("/") for part in inside), table.as_uri(), f"{table}/", str(link)]:
        if "%20" in path:
            path = f"file:{table}"
        with pytest.raises(DataError) as refused:
            refuse_tables(path, by_spark=by_spark)
        kind = log.split(",")[0].split(" ")[0]
        assert f'spark.read.format("{kind}").load("{table}")' in str(refused.value)
        assert str(refused.value).startswith(f"{path} is of a")


@pytest.mark.parametrize(
    "names",
    [
        ["a.parquet", "_SUCCESS", "_metadata", "_common_metadata", ".a.parquet.crc"],
        ["a.parquet", "metadata/columns.json", "metadata/metadata.json", "metadata/labels.metadata.json"],
        ["day=1/a.parquet", "day=2/b.parquet", "README.md", "metadata/version.txt"],
        ["day=1/hour=2/a.parquet", "day=1/_SUCCESS"],
        ["a.parquet", "notes/README.md", ".hoodie_partition_metadata", "_old/b.parquet"],
    ],
)
def test_a_plain_folder_is_no_table(tmp_path: Path, names: list[str]) -> None:
    folder = lay(tmp_path / "plain", *names)
    for path in (str(folder), f"{folder}/*.parquet", f"{folder}/nowhere", f"{folder}/{names[0]}"):
        refuse_tables(path, by_spark=True)
        refuse_tables(path, by_spark=False)


def test_a_plain_folder_beside_a_table_is_none(tmp_path: Path) -> None:
    lay(tmp_path / "table", "a.parquet", *LOGS["delta"])
    lay(tmp_path / "plain", "a.parquet")
    refuse_tables(f"{tmp_path}/table/../plain", by_spark=True)
    with pytest.raises(DataError, match="is of a Delta table"):
        refuse_tables(f"{tmp_path}/*/a.parquet", by_spark=True)  # one of the two is


def test_the_output_of_a_stream_is_for_spark_and_only_as_a_whole(tmp_path: Path) -> None:
    folder = lay(tmp_path / "out", "a.parquet", "_spark_metadata/0")
    refuse_tables(str(folder), by_spark=True)
    for path, by_spark in [(folder, False), (folder / "a.parquet", True), (folder / "*.parquet", True)]:
        with pytest.raises(DataError, match=r"of the output of a stream.*spark\.read\.parquet"):
            refuse_tables(str(path), by_spark=by_spark)


@pytest.mark.parametrize(
    "names", [["a.parquet", "old/b.parquet"], ["old/b.parquet"], ["a.parquet", "y=2/b.parquet"]]
)
def test_files_that_spark_would_leave_out_are_named(tmp_path: Path, names: list[str]) -> None:
    folder = lay(tmp_path / "data", *names)
    with pytest.raises(DataError, match=r"data holds (old/b|a)\.parquet, which Spark would leave out"):
        refuse_tables(str(folder), by_spark=True)


def test_a_table_of_another_file_system_is_refused_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparksgd.storage._location_of_uri", None)
    register_uris(lambda uri: LocalLocation(tmp_path / uri.removeprefix("hdfs:/")))
    lay(tmp_path / "table", "a.parquet", *LOGS["delta"])
    with pytest.raises(DataError, match="hdfs:/table is of a Delta table"):
        refuse_tables("hdfs:/table", by_spark=False)


def test_a_file_system_that_does_not_answer_is_the_clusters_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: LocalLocation, pattern: str) -> list[str]:
        raise ConnectionRefusedError(111, "refused")

    def locked(self: LocalLocation, pattern: str) -> list[str]:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(LocalLocation, "names_of", silent)
    with pytest.raises(ClusterError, match="cannot read x as Parquet: refused"):
        refuse_tables("x", by_spark=False)
    monkeypatch.setattr(LocalLocation, "names_of", locked)
    refuse_tables("x", by_spark=False)


@pytest.mark.parametrize("which", ["rows", "test"])
def test_the_inline_engine_refuses_a_table_of_rows_and_of_test_rows(tmp_path: Path, which: str) -> None:
    table = lay(tmp_path / "table", "a.parquet", "b.parquet", *LOGS["delta"])
    plain = lay(tmp_path / "plain", "a.parquet")
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y"},
            "engine": {"name": "inline"},
            "model": {"name": "torch.nn:Flatten"},
        }
    )
    paths = {"rows": str(plain), "test": str(plain)} | {which: str(table)}
    with pytest.raises(DataError, match="is of a Delta table"):
        train_in_process(config, paths["rows"], paths["test"])
