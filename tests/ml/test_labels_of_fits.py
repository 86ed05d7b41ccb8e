"""Classifiers of several labels on Spark: vectors and arrays of labels, every engine, what they predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from predicted_modules import mlp  # tests/modules
from pyspark.ml.functions import array_to_vector
from torch import nn

import sparksgd
from sparksgd.errors import ConfigError, DataError
from sparksgd.ml import TorchClassificationModel, TorchClassifier, TorchRegressionModel

pytestmark = pytest.mark.session("local[2]")

SEVERAL = {"loss": {"kind": "several labels"}}
FIT = {
    "loss": "binary_cross_entropy", "config": SEVERAL, "maxEpochs": 2, "batchSize": 100, "numShards": 2,
    "learningRate": 0.1, "validationFraction": 0.2, "metrics": ["f1_macro"],
}  # fmt: skip


@pytest.fixture(scope="module")
def points(session_for):
    """Return 200 rows of two features, with three labels."""
    source = np.random.default_rng(4).normal(size=(200, 2))
    rows = [(row.tolist(), [int(row[0] > 0), int(row[1] > 0), int(row.sum() > 1)]) for row in source]
    frame = session_for("local[2]").createDataFrame(rows, "features array<double>, label array<int>")
    return frame.coalesce(1).localCheckpoint()


def linear():
    torch.manual_seed(1)
    return nn.Linear(2, 3)


@pytest.fixture(scope="module")
def trained(points):
    by_value = nn.BCEWithLogitsLoss(reduction="none")
    return TorchClassifier(module=linear(), engine="tree", **{**FIT, "loss": by_value}).fit(points)


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["allreduce", "inline"])
def test_engines_and_vectors_have_the_same_bits(points, trained, tmp_path, engine):
    told = trained.summary.value
    if engine == "inline":
        points.write.parquet(str(tmp_path / "rows"))
        config = {
            "data": {"validation_fraction": 0.2},
            "loss": {"name": "binary_cross_entropy", **SEVERAL["loss"]},
            "optimizer": {"name": "AdamW", "lr": 0.1},
            "train": {"epochs": 2, "rows_per_step": 100, "num_shards": 2, "metrics": ["f1_macro"]},
            "engine": {"name": "inline"},
        }
        training = sparksgd.train(config, str(tmp_path / "rows"), module=linear())
        assert training.flat.parameters_sha256() == told["parameters_sha256"]
        assert training.evaluations[-1].metrics["f1_macro"] == told["test_f1_macro"]
        return
    vectors = points.withColumn("label", array_to_vector("label"))
    other = TorchClassifier(module=linear(), engine=engine, **FIT).fit(vectors).summary.value
    for name in ("parameters_sha256", "test_accuracy", "test_f1_macro", "test_loss"):
        assert other[name] == told[name]


def test_predictions_are_arrays_of_labels_and_the_model_is_loaded(points, trained, tmp_path):
    scored = trained.transform(points)
    kinds = {name: scored.schema[name].dataType.simpleString() for name in scored.columns[2:]}
    assert kinds == {"rawPrediction": "vector", "probability": "vector", "prediction": "array<double>"}
    rows = scored.collect()
    with torch.no_grad():
        logits = trained.module(torch.tensor([row.features for row in rows]))
    found = np.array([row.probability.toArray() for row in rows])
    assert np.abs(found - torch.sigmoid(logits).numpy()).max() < 1e-6
    assert [row.prediction for row in rows] == (logits > 0).double().tolist()
    assert (trained.numClasses, trained.predictProbability(rows[0].features).size) == (3, 3)
    trained.save(str(tmp_path / "model"))
    loaded = TorchClassificationModel.load(str(tmp_path / "model"))
    assert loaded.transform(points).select("prediction", "rawPrediction").collect() == [
        (row.prediction, row.rawPrediction) for row in rows
    ]
    assert loaded.saved.loss is None
    again = sparksgd.load_model(tmp_path / "model" / "model", loss=nn.BCEWithLogitsLoss(reduction="none"))
    scores = sparksgd.evaluate(points, again)
    hits = np.array([np.array(row.label) == row.prediction for row in rows])
    assert scores.confusion.shape == (3, 2, 2)
    assert scores.accuracy == pytest.approx(hits.mean(), rel=1e-12)
    with pytest.raises(
        ConfigError, match="thresholds choose one of the classes, but the model gives several"
    ):
        trained.copy().setThresholds([0.5] * 3).transform(points)
    with pytest.raises(ConfigError, match="predict gives one class, but the model gives several labels"):
        trained.predict(rows[0].features)
    with pytest.raises(ConfigError, match="as a classifier: load it as TorchClassificationModel"):
        TorchRegressionModel.load(str(tmp_path / "model" / "model")).transform(points)


@pytest.mark.soak
def test_a_factory_gets_the_number_of_labels(points):
    model = TorchClassifier(module=mlp, **FIT).fit(points.withColumn("label", array_to_vector("label")))
    assert model.module[-1].out_features == 3
    with pytest.raises(
        DataError, match="the labels in 'label' are 1, but must be vectors or arrays of 0 and 1"
    ):
        TorchClassifier(module=mlp, **FIT).fit(points.selectExpr("features", "1 AS label"))
