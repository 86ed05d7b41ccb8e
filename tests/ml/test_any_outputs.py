"""TorchEstimator and TorchModel: any loss, and each output of the module as a column of its type."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from predicted_modules import Gaussian, Shaped  # tests/modules
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler
from torch import nn

import sparksgd
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import BadRows, ConfigError, DataError, ModelError
from sparksgd.ml import TorchEstimator, TorchModel
from sparksgd.models.outputs import Output, outputs_of
from sparksgd.runs.model import SavedModel
from sparksgd.spark.cluster.jobs import spark_job

pytestmark = pytest.mark.session("local[2]")

BRIEF = {"maxEpochs": 1, "batchSize": 100, "numShards": 2, "learningRate": 0.01, "engine": "tree"}
OWN = "predicted_modules:likelihood"


@pytest.fixture(scope="module")
def numbers(session_for):
    """Return rows of two numbers, and twice the first as the label."""
    source = np.random.default_rng(0).normal(size=(200, 2))
    rows = [(float(a), float(b), float(2 * a)) for a, b in source]
    return session_for("local[2]").createDataFrame(rows, "a double, b double, label double").coalesce(1)


@pytest.fixture(scope="module")
def fitted(numbers, tmp_path_factory):
    """Return a fitted Pipeline of named outputs, and where it is saved."""
    pipeline = Pipeline(
        stages=[
            VectorAssembler(inputCols=["a", "b"], outputCol="features"),
            TorchEstimator(module="predicted_modules:Gaussian", loss=OWN, **BRIEF),
        ]
    )
    model, path = pipeline.fit(numbers), str(tmp_path_factory.mktemp("fitted") / "model")
    model.write().overwrite().save(path)
    return model, path


def test_each_output_is_a_column_of_its_type_with_the_values_of_plain_torch(numbers, fitted):
    scored = fitted[0].transform(numbers)
    kinds = {name: scored.schema[name].dataType.typeName() for name in ("mean", "spread", "hidden")}
    assert kinds == {"mean": "double", "spread": "double", "hidden": "vectorudt"}
    rows = scored.collect()
    with torch.no_grad():
        expected = fitted[0].stages[-1].module(torch.tensor([[row.a, row.b] for row in rows]))
    assert [row["mean"] for row in rows] == pytest.approx(expected["mean"].tolist(), rel=1e-5, abs=1e-6)
    found = np.array([row.hidden.toArray() for row in rows])
    assert np.abs(found - expected["hidden"].numpy()).max() < 1e-6
    one = fitted[0].stages[-1].predict(rows[0].features)
    assert one.keys() == {"mean", "spread", "hidden"}
    assert one["mean"] == pytest.approx(rows[0]["mean"], rel=1e-5)


def test_a_pipeline_of_any_outputs_is_saved_loaded_and_runs_trusted_code_only(
    numbers, fitted, monkeypatch, tmp_path
):
    with pytest.raises(DataError, match="predicted_modules is not trusted"):
        PipelineModel.load(fitted[1])
    monkeypatch.setenv("SPARKSGD_TRUST", "predicted_modules")
    before = fitted[0].transform(numbers).select("mean", "hidden").collect()
    PipelineModel.load(fitted[1]).write().overwrite().save(str(tmp_path / "again"))
    loaded = PipelineModel.load(str(tmp_path / "again"))
    assert loaded.transform(numbers).select("mean", "hidden").collect() == before
    estimator = TorchEstimator(module="predicted_modules:Gaussian", loss=OWN, outputCols=["m", "", "h"])
    estimator.save(str(tmp_path / "estimator"))
    assert TorchEstimator.load(str(tmp_path / "estimator")).getOrDefault("outputCols") == ["m", "", "h"]
    job = TorchModel.load(f"{fitted[1]}/stages/{_last_stage(fitted[1])}/model")
    assert job.getFeaturesCol() == "features"


def _last_stage(path):
    return next(stage.name for stage in Path(path, "stages").iterdir() if "TorchEstimator" in stage.name)


@pytest.mark.soak
def test_a_fresh_process_loads_it_and_scores_the_same(numbers, fitted, tmp_path):
    numbers.write.parquet(str(tmp_path / "rows"))
    program = (
        "import sys, sparksgd; from pyspark.ml import PipelineModel; from pyspark.sql import SparkSession\n"
        "spark = SparkSession.builder.master('local[1]').config('spark.ui.enabled', False).getOrCreate()\n"
        "sparksgd.trust('predicted_modules')\n"
        "scored = PipelineModel.load(sys.argv[1]).transform(spark.read.parquet(sys.argv[2]))\n"
        "print(sorted(row[0] for row in scored.select('mean').collect()))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, fitted[1], str(tmp_path / "rows")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = sorted(row[0] for row in fitted[0].transform(numbers).select("mean").collect())
    assert ran.stdout.strip() == str(expected)


def model_of(module, length=2, **params):
    schema = RowSchema(
        features=(Feature(name="x", dtype="float32", length=length),), label="y", label_dtype="float32"
    )
    saved = SavedModel(
        module=module.eval(), schema=schema, loss=nn.MSELoss(), kind=None,
        outputs=outputs_of(module(torch.ones(3, length))),
    )  # fmt: skip
    return TorchModel(saved).setParams(featuresCol="x", **params)


ROWS = [(0, [1.4, 4.0]), (1, [2.6, -1.0]), (2, None), (3, [1.0]), (4, [math.nan, 0.0])]


def test_a_nan_is_a_value_and_a_bad_row_has_none(spark):
    frame = spark.createDataFrame(ROWS, "id long, x array<double>").coalesce(1)
    model = model_of(Shaped(), handleInvalid="keep", outputFormat="array")
    scored = model.transform(frame)
    assert [scored.schema[f"output_{n}"].dataType.simpleString() for n in range(5)] == [
        "double", "array<float>", "array<float>", "double", "array<double>",
    ]  # fmt: skip
    good, nan, *bad = scored.orderBy("id").collect()
    assert good[2:] == (2.0, [np.float32(1.4), 2.0], [], 1.0, [np.float32(1.4), 2.0] * 2)
    assert (math.isnan(nan.output_0), nan.output_1[0], nan.output_2) == (True, np.float32(2.6), [])
    assert all(math.isnan(value) for value in (nan.output_1[1], nan.output_4[1], nan.output_4[3]))
    assert all(row[2:] == (None,) * 5 for row in bad)
    vectors = model.copy().setParams(outputFormat="vector", handleInvalid="skip").transform(frame)
    good, nan = vectors.orderBy("id").collect()
    assert (good.output_4.toArray().tolist(), good.output_2.size) == ([np.float32(1.4), 2.0] * 2, 0)
    assert np.isnan(nan.output_4.toArray()).tolist() == [False, True, False, True]
    assert vectors.where("id = 0").count() == 1
    assert model.transform(frame.where("id > 9")).collect() == []
    with pytest.raises(BadRows, match="3 of 5 rows cannot be predicted"), spark_job(spark.sparkContext, "p"):
        model.copy().setParams(handleInvalid="error").transform(frame).collect()


def test_columns_are_named_left_out_and_refused(spark, numbers):
    frame = spark.createDataFrame(ROWS[:1], "id long, x array<double>")
    model = model_of(Gaussian(2))
    assert model.transform(frame).columns == ["id", "x", "mean", "spread", "hidden"]
    some = model.copy().setParams(outputCols=["m.1", "", "h`2"])
    assert some.transform(frame).columns == ["id", "x", "m.1", "h`2"]
    assert some.transform(frame).collect()[0][3].size == 3
    assert model.copy().setParams(outputCols=["", "", ""]).transform(frame).columns == ["id", "x"]
    for params, has, says in (
        ({}, "Mean", "the data has a column 'Mean': name the new one otherwise, or drop it"),
        ({"outputCols": ["a", "A", "b"]}, "c", "two new columns are named 'A'"),
        (
            {"outputCols": ["a"]},
            "c",
            r"outputCols is \['a'\], but the module gives mean, spread, hidden: give",
        ),
        (
            {"predictionCol": "p"},
            "c",
            "predictionCol is 'p', but the module gives outputs by names .*set out",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            model.copy().setParams(**params).transform(frame.withColumnRenamed("id", has))
    other = (*model.saved.outputs[:2], Output(name="hidden", length=4, dtype="float32"))
    wrong = TorchModel(replace(model.saved, outputs=other)).setParams(featuresCol="x").transform(frame)
    with (
        pytest.raises(ModelError, match=r"\(1, 3\) as hidden for 1 rows, but must give 4 numbers"),
        spark_job(spark.sparkContext, "p"),
    ):
        wrong.collect()


def test_one_tensor_is_the_prediction_whatever_the_loss_is(spark):
    frame = spark.createDataFrame(ROWS[:1], "id long, x array<double>")
    for module, kind, size in ((nn.Linear(2, 1), "double", None), (nn.Linear(2, 3), "array<float>", 3)):
        scored = model_of(module, outputFormat="array").transform(frame)
        assert scored.schema["prediction"].dataType.simpleString() == kind
        value = scored.first().prediction
        with torch.no_grad():
            expected = module(torch.tensor([[1.4, 4.0]])).reshape(-1).tolist()
        assert (value if size else [value]) == pytest.approx(expected, rel=1e-6)
    renamed = model_of(nn.Linear(2, 1), predictionCol="p")
    assert renamed.transform(frame).columns == ["id", "x", "p"]
    earlier = TorchModel(replace(renamed.saved, outputs=())).setParams(featuresCol="x")
    assert len(earlier.transform(frame).first().prediction) == 1


def test_what_cannot_be_fitted_is_refused_by_name(numbers):
    with pytest.raises(ConfigError, match="TorchEstimator has no loss: pass loss=, the import path of"):
        TorchEstimator(module=nn.Linear(2, 1), **BRIEF).fit(numbers)
    assembled = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(numbers)
    with pytest.raises(ModelError, match="gives a dict, but squared_error takes one tensor"):
        TorchEstimator(module=Gaussian(2), loss="squared_error", **BRIEF).fit(assembled)


@pytest.mark.soak
def test_any_outputs_have_the_bits_of_a_training(numbers, fitted):
    config = {
        "data": {"features": "features", "label": "label"},
        "model": {"name": "predicted_modules:Gaussian", "num_features": 2},
        "loss": {"name": OWN},
        "optimizer": {"name": "AdamW", "lr": 0.01},
        "train": {"epochs": 1, "rows_per_step": 100, "num_shards": 2},
    }
    assembled = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(numbers)
    training = sparksgd.train(config, assembled)
    told = fitted[0].stages[-1].summary.value["parameters_sha256"]
    assert told == training.flat.parameters_sha256()
