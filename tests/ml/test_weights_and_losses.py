"""weightCol: how much each row counts in a fit; and losses with arguments, or of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from predicted_modules import focal  # tests/modules
from pyspark.ml.feature import VectorAssembler
from torch import nn

import sparksgd
from sparksgd.errors import BadRows, ConfigError, DataError
from sparksgd.ml import TorchClassificationModel, TorchClassifier, TorchRegressor

pytestmark = pytest.mark.session("local[2]")

BRIEF = {"maxEpochs": 2, "batchSize": 1000, "numShards": 2, "learningRate": 0.1, "engine": "tree"}


@pytest.fixture(scope="module")
def points(session_for):
    """Return 200 rows with features, a label, and a whole weight."""
    source = np.random.default_rng(4)
    drawn = [(float(a), float(b), int(a + b > 0), int(w)) for a, b, w in source.normal(size=(200, 3)) * 2]
    rows = [(a, b, label, abs(w) + 1) for a, b, label, w in drawn]
    frame = session_for("local[2]").createDataFrame(rows, "a double, b double, label int, w int")
    return VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(frame)


def linear(outputs):
    torch.manual_seed(1)
    return nn.Linear(2, outputs)


@pytest.mark.parametrize(
    ("kind", "outputs"), [(TorchClassifier, 2), pytest.param(TorchRegressor, 1, marks=pytest.mark.soak)]
)
def test_a_row_of_weight_w_counts_as_w_rows(points, kind, outputs):
    weighted = kind(module=linear(outputs), weightCol="w", **BRIEF).fit(points)
    repeated = kind(module=linear(outputs), **BRIEF).fit(
        points.selectExpr("features", "label", "explode(sequence(1, w))")
    )
    plain = kind(module=linear(outputs), **BRIEF).fit(points)
    of = {
        name: nn.utils.parameters_to_vector(model.module.parameters())
        for name, model in (("weighted", weighted), ("repeated", repeated), ("plain", plain))
    }
    assert torch.allclose(of["weighted"], of["repeated"], atol=1e-5)
    assert not torch.allclose(of["weighted"], of["plain"], atol=1e-4)


@pytest.mark.soak
def test_a_fit_has_the_bits_of_a_training_with_the_same_weights(points):
    model = TorchClassifier(module=linear(2), weightCol="w", **BRIEF).fit(points)
    config = {
        "data": {"features": ["features"], "label": "label", "weight": "w"},
        "loss": {"name": "cross_entropy"},
        "optimizer": {"name": "AdamW", "lr": 0.1},
        "train": {"epochs": 2, "rows_per_step": 1000, "num_shards": 2},
    }
    training = sparksgd.train(config, points, module=linear(2))
    assert model.summary.value["parameters_sha256"] == training.flat.parameters_sha256()
    assert "w" in model.transform(points).columns


@pytest.mark.soak
def test_bad_weights_are_refused_or_left_out(points):
    bad = points.selectExpr("features", "label", "IF(a > 1, -1.0, double(w)) AS w")
    fit = TorchClassifier(module=linear(2), weightCol="w", **BRIEF)
    with pytest.raises(BadRows, match=r"a weight that is not from .*handleInvalid"):
        fit.fit(bad)
    with pytest.raises(DataError, match="no column 'v'"):
        fit.copy({fit.weightCol: "v"}).fit(points)
    left_out = fit.copy({fit.handleInvalid: "skip"}).fit(bad)
    good = fit.fit(bad.where("w > 0"))
    assert left_out.summary.value["parameters_sha256"] == good.summary.value["parameters_sha256"]


@pytest.mark.parametrize(
    ("kind", "outputs", "params", "says"),
    [
        (TorchClassifier, 2, {"loss": "predicted_modules:focal"}, "classes"),
        pytest.param(
            *(TorchClassifier, 2, {"config": {"loss": {"label_smoothing": 0.2}}}, "classes"),
            marks=pytest.mark.soak,
        ),
        pytest.param(
            *(TorchRegressor, 1, {"loss": "HuberLoss", "config": {"loss": {"delta": 0.3}}}, "numbers"),
            marks=pytest.mark.soak,
        ),
    ],
)
@pytest.mark.soak
def test_an_estimator_says_the_kind_of_a_loss(points, kind, outputs, params, says, tmp_path):
    model = kind(module=linear(outputs), **BRIEF | params).fit(points)
    assert model.saved.kind == says
    model.save(str(tmp_path / "model"))
    loaded = type(model).load(str(tmp_path / "model"), trust=["predicted_modules"])
    scored = [each.transform(points).select("prediction").collect() for each in (model, loaded)]
    assert scored[0] == scored[1]
    plain = kind(module=linear(outputs), **BRIEF).fit(points)
    assert plain.summary.value["parameters_sha256"] != model.summary.value["parameters_sha256"]


# Losses that are given in Python


@pytest.mark.soak
def test_a_loss_of_a_notebook_travels_by_value_and_is_not_needed_to_predict(points, tmp_path):
    def smoothed(output, label):
        return nn.functional.cross_entropy(output, label, label_smoothing=0.2, reduction="none")

    model = TorchClassifier(module=linear(2), loss=smoothed, **BRIEF).fit(points)
    model.save(str(tmp_path / "model"))
    loaded = TorchClassificationModel.load(str(tmp_path / "model"))
    assert (loaded.saved.loss, loaded.saved.kind) == (None, "classes")
    scored = [each.transform(points).select("probability").collect() for each in (model, loaded)]
    assert scored[0] == scored[1]
    with pytest.raises(ConfigError, match="cannot be saved, because its loss is an object of this process"):
        TorchClassifier(module="predicted_modules:mlp", loss=smoothed).save(str(tmp_path / "estimator"))


@pytest.mark.soak
def test_an_instance_by_value_has_the_bits_of_its_name_and_is_taken_again_to_evaluate(points, tmp_path):
    loss = nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")
    model = TorchClassifier(module=linear(2), loss=loss, **BRIEF).fit(points)
    named = TorchClassifier(module=linear(2), config={"loss": {"label_smoothing": 0.2}}, **BRIEF).fit(points)
    told = [each.summary.value["parameters_sha256"] for each in (model, named)]
    assert told[0] == told[1]
    model.save(str(tmp_path / "model"))
    again = sparksgd.load_model(tmp_path / "model" / "model", loss=loss)
    assert sparksgd.evaluate(points, again).loss == sparksgd.evaluate(points, named.saved).loss


@pytest.mark.soak
def test_an_instance_of_torch_s_is_its_name_and_an_importable_function_its_path(points, tmp_path):
    of_torch = TorchRegressor(module=linear(1), loss=nn.HuberLoss(reduction="none", delta=0.3), **BRIEF)
    named = TorchRegressor(module=linear(1), loss="HuberLoss", config={"loss": {"delta": 0.3}}, **BRIEF)
    told = [each.fit(points).summary.value["parameters_sha256"] for each in (of_torch, named)]
    assert told[0] == told[1]
    with pytest.raises(ConfigError, match=r'kind is "numbers", but TorchClassifier trains with .*use T'):
        TorchClassifier(module=linear(1), loss=nn.HuberLoss(reduction="none"), **BRIEF).fit(points)
    twice = TorchClassifier(module=linear(2), loss=focal, config={"loss": {"name": "cross_entropy"}}, **BRIEF)
    with pytest.raises(ConfigError, match=r"but config sets loss\.name to 'cross_entropy': give one"):
        twice.fit(points)
    TorchClassifier(module="predicted_modules:mlp", loss=focal).save(str(tmp_path / "estimator"))
    with pytest.raises(DataError, match="predicted_modules is not trusted"):
        TorchClassifier.load(str(tmp_path / "estimator"))
    loaded = TorchClassifier.load(str(tmp_path / "estimator"), trust=["predicted_modules"])
    assert loaded.getOrDefault("loss") == "predicted_modules:focal"
