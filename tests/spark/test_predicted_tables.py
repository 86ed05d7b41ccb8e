"""Predictions written by a job: to Parquet or a table, all rows or some columns, bad rows as asked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import BadRows, ConfigError, DataError
from sparksgd.models.losses import squared_error
from sparksgd.runs.model import SavedModel
from sparksgd.spark.predicted_tables import PredictionJob, refuse_scattered, write_predictions

pytestmark = pytest.mark.session("local[2]")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    schema = RowSchema(
        features=(Feature(name="x", dtype="float32", length=2),), label="y", label_dtype="float32"
    )
    return SavedModel(module=nn.Linear(2, 1).eval(), schema=schema, loss=squared_error, kind="numbers")


@pytest.fixture(scope="module")
def path(session_for, tmp_path_factory):
    """Return a folder with three rows, the last of which is bad."""
    folder = str(tmp_path_factory.mktemp("rows") / "rows")
    rows = [(1, [1.0, 2.0]), (2, [3.0, 4.0]), (3, None)]
    session_for("local[2]").createDataFrame(rows, "id long, x array<double>").write.parquet(folder)
    return folder


def job(path: str, out: object) -> PredictionJob:
    return PredictionJob(
        data=path, data_is_table=False, out=str(out), out_is_table=False, columns=None, with_raw=False,
        on_bad_row="keep", if_exists="fail",
    )  # fmt: skip


@pytest.mark.soak
def test_rows_are_written_as_asked(spark, model, path, tmp_path):
    asked = job(path, tmp_path / "out")
    assert write_predictions(spark, model, asked) == 3
    written = spark.read.parquet(asked.out)
    assert written.columns == ["id", "x", "prediction"]
    assert [row.prediction is None for row in written.orderBy("id").collect()] == [False, False, True]
    with pytest.raises(ConfigError, match=r"--out is .*/out, which cannot be writ.*--if-exists overwrite"):
        write_predictions(spark, model, asked)
    assert write_predictions(spark, model, replace(asked, if_exists="append", on_bad_row="skip")) == 2
    assert spark.read.parquet(asked.out).count() == 5
    some = replace(asked, if_exists="overwrite", columns=("id",), on_bad_row="skip")
    assert write_predictions(spark, model, some) == 2
    assert spark.read.parquet(asked.out).columns == ["id", "prediction"]
    with pytest.raises(BadRows, match=r"1 of \d rows cannot be predicted"):
        write_predictions(spark, model, replace(asked, if_exists="overwrite", on_bad_row="error"))


def test_tables_are_read_and_written_by_their_names(spark, model, path, tmp_path):
    spark.read.parquet(path).createOrReplaceTempView("asked_rows")
    warehouse = Path(spark.conf.get("spark.sql.warehouse.dir").removeprefix("file:"))
    asked = replace(job("asked_rows", "predicted_rows"), data_is_table=True, out_is_table=True)
    try:
        assert write_predictions(spark, model, asked) == 3
        assert spark.table("predicted_rows").columns == ["id", "x", "prediction"]
        with pytest.raises(ConfigError, match="--out-table is predicted_rows, which cannot be written"):
            write_predictions(spark, model, asked)
    finally:
        spark.sql("drop table if exists predicted_rows")
    assert not (warehouse / "predicted_rows").exists()


def test_what_cannot_be_written_is_refused_by_name(spark, model, path, tmp_path):
    asked = job(path, tmp_path / "out")
    with pytest.raises(DataError, match=r"has no column 'idd', which --columns names \(did you mean id\?\)"):
        write_predictions(spark, model, replace(asked, columns=("idd",)))
    with pytest.raises(DataError, match="cannot read the table nowhere"):
        write_predictions(spark, model, replace(asked, data="nowhere", data_is_table=True))
    with pytest.raises(ConfigError, match="raw is 'rawPrediction', but the model's loss is not"):
        write_predictions(spark, model, replace(asked, with_raw=True))


@pytest.mark.parametrize(
    "out", ["rows", "rows/", "rows/../rows", "rows/predicted", ".", "link", "file:{}/rows"]
)
def test_an_output_that_would_remove_the_data_is_refused(spark, model, path, tmp_path, out):
    shutil.copytree(path, tmp_path / "rows")
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    out = out.format(tmp_path) if ":" in out else f"{tmp_path}/{out}"
    asked = replace(job(str(tmp_path / "rows"), out), if_exists="overwrite")
    with pytest.raises(ConfigError, match="which holds or is in --data"):
        write_predictions(spark, model, asked)
    assert spark.read.parquet(str(tmp_path / "rows")).count() == 3


def test_a_column_of_the_data_that_is_not_kept_may_have_a_new_one_s_name(spark, model, path, tmp_path):
    twice = str(tmp_path / "twice")
    spark.read.parquet(path).selectExpr("*", "1 as prediction").write.parquet(twice)
    asked = replace(job(twice, tmp_path / "out"), columns=("id", "id"))
    assert write_predictions(spark, model, asked) == 3
    assert spark.read.parquet(asked.out).columns == ["id", "prediction"]


def test_a_folder_of_the_driver_is_refused_where_executors_are_elsewhere():
    cluster = SimpleNamespace(sparkContext=SimpleNamespace(master="yarn"))
    asked = job("rows", "runs/predicted")
    with pytest.raises(ConfigError, match=r"--out is runs/predicted, .* like hdfs:///predictions/predicted"):
        refuse_scattered(cluster, asked)
    for fine in (replace(asked, out="hdfs:///out"), replace(asked, out_is_table=True)):
        refuse_scattered(cluster, fine)
    refuse_scattered(SimpleNamespace(sparkContext=SimpleNamespace(master="local[2]")), asked)
