"""Estimators and Models of Spark ML: fit, transform, save and load, alone and in Pipelines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from predicted_modules import mlp  # tests/modules
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import BinaryClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import StandardScaler, StringIndexer, VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F
from torch import nn

import sparksgd
from sparksgd.errors import BadRows, ConfigError, DataError, ModelError
from sparksgd.ml import TorchClassificationModel, TorchClassifier, TorchRegressionModel, TorchRegressor
from sparksgd.spark.cluster.jobs import spark_job

pytestmark = pytest.mark.session("local[2]")

BRIEF = {"maxEpochs": 1, "batchSize": 100, "numShards": 2, "learningRate": 0.01, "engine": "tree"}


@pytest.fixture(scope="module")
def people(session_for):
    """Return rows of two numbers and a text, which says whether the first is greater."""
    source = np.random.default_rng(0).normal(size=(400, 2))
    rows = [(float(a), float(b), "yes" if a > b else "no") for a, b in source]
    return session_for("local[2]").createDataFrame(rows, "a double, b double, income string")


@pytest.fixture(scope="module")
def points(people):
    """Return the same rows with features and labels."""
    assembled = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(people)
    return assembled.select("features", F.when(F.col("income") == "yes", 1.0).otherwise(0.0).alias("label"))


def linear():
    torch.manual_seed(1)
    return nn.Linear(2, 2)


@pytest.fixture(scope="module")
def trained(points):
    return TorchClassifier(module=linear(), seed=3, **BRIEF).fit(points)


@pytest.fixture
def trusting(monkeypatch):
    monkeypatch.setenv("SPARKSGD_TRUST", "predicted_modules")


def auc(scored):
    return BinaryClassificationEvaluator(numBins=0).evaluate(scored)


def exact_auc(scored):
    """Return the share of pairs of rows of both classes that the probability orders rightly."""
    rows = scored.select("label", "probability").collect()
    yes, no = ([r.probability[1] for r in rows if r.label == label] for label in (1.0, 0.0))
    pairs = [(a > b) + 0.5 * (a == b) for a in yes for b in no]
    return sum(pairs) / len(pairs)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(
        stages=[
            StringIndexer(inputCol="income", outputCol="label"),
            VectorAssembler(inputCols=["a", "b"], outputCol="both"),
            StandardScaler(inputCol="both", outputCol="features", withMean=True),
            TorchClassifier(module=mlp, config={"model": {"hidden": 3}}, **BRIEF),
        ]
    )


@pytest.fixture(scope="module")
def fitted(people, pipeline, tmp_path_factory):
    """Return a fitted Pipeline, and where it is saved."""
    model, path = pipeline.fit(people), str(tmp_path_factory.mktemp("fitted") / "model")
    model.write().overwrite().save(path)
    return model, path


COLUMNS = ("rawPrediction", "probability", "prediction")


def test_a_pipeline_is_fitted_saved_loaded_and_scores_the_same(people, pipeline, fitted, tmp_path, trusting):
    model, path = fitted
    scored = model.transform(people).select("label", *COLUMNS)
    loaded = PipelineModel.load(path)
    loaded.write().overwrite().save(str(tmp_path / "again"))
    for each in (loaded, PipelineModel.load(str(tmp_path / "again"))):
        assert each.transform(people).select(*COLUMNS).collect() == scored.select(*COLUMNS).collect()
        last = each.stages[-1]
        assert (last.uid, last.numClasses, last.numFeatures) == (model.stages[-1].uid, 2, 2)
        assert [tuple(p.shape) for p in last.module.parameters()] == [(3, 2), (3,), (2, 3), (2,)]
    assert auc(scored) == pytest.approx(exact_auc(scored), abs=1e-12)
    assert model.stages[-1].uid == pipeline.getStages()[-1].uid
    pipeline.write().overwrite().save(str(tmp_path / "pipeline"))
    again = Pipeline.load(str(tmp_path / "pipeline")).getStages()[-1]
    assert (again.getOrDefault("module"), again.getOrDefault("batchSize")) == ("predicted_modules:mlp", 100)


def test_a_model_runs_no_code_that_is_not_trusted(fitted, tmp_path):
    model = fitted[0].stages[-1]
    model.save(str(tmp_path / "model"))
    with pytest.raises(DataError, match="predicted_modules is not trusted"):
        TorchClassificationModel.load(str(tmp_path / "model"))
    loaded = TorchClassificationModel.load(str(tmp_path / "model"), trust=["predicted_modules"])
    assert all(map(torch.equal, loaded.module.parameters(), model.module.parameters()))
    given = TorchClassificationModel.load(str(tmp_path / "model"), module=mlp(2, 2, 3))
    assert all(map(torch.equal, given.module.parameters(), model.module.parameters()))


def test_fit_changes_no_module_and_starts_from_its_weights(points):
    module = linear()
    before = [p.detach().clone() for p in module.parameters()]
    unmoved = BRIEF | {"learningRate": 0.0, "optimizer": "SGD"}
    model = TorchClassifier(module=module, **unmoved).fit(points)
    assert all(map(torch.equal, model.module.parameters(), before))
    assert not model.module.training
    TorchClassifier(module=module, **BRIEF).fit(points)
    assert all(map(torch.equal, module.parameters(), before))
    assert module.training
    assert all(p.grad is None for p in module.parameters())


def test_a_fit_is_the_training_of_the_same_configuration(points, trained):
    config = {
        "data": {"features": "features", "label": "label"},
        "optimizer": {"name": "AdamW", "lr": 0.01},
        "train": {"epochs": 1, "rows_per_step": 100, "num_shards": 2, "seed": 3},
    }
    training = sparksgd.train(config, points, module=linear())
    assert all(map(torch.equal, trained.module.parameters(), training.module.parameters()))


def test_columns_are_of_the_types_and_names_that_are_asked_for(points, trained):
    scored = trained.transform(points)
    types = {name: scored.schema[name].dataType.typeName() for name in scored.columns}
    assert types["rawPrediction"] == types["probability"] == types["features"] != "array"
    assert types["prediction"] == "double"
    other = trained.copy().setParams(outputFormat="array", probabilityCol="", predictionCol="class")
    assert other.transform(points).columns == ["features", "label", "rawPrediction", "class"]
    assert other.transform(points).schema["rawPrediction"].dataType.simpleString() == "array<float>"
    renamed = points.withColumnRenamed("features", "inputs")
    assert trained.copy().setFeaturesCol("inputs").transform(renamed).count() == 400


def test_one_row_is_predicted_as_transform_predicts_it(points, trained):
    row = trained.transform(points).first()
    assert trained.predict(row.features) == row.prediction
    for found, expected in (
        (trained.predictProbability(row.features), row.probability),
        (trained.predictRaw(row.features), row.rawPrediction),
    ):
        assert found.toArray() == pytest.approx(expected.toArray(), rel=1e-6)


def with_thresholds(model, *thresholds):
    return model.copy().setThresholds(list(thresholds))


def test_thresholds_move_the_prediction_as_spark_says(points, trained):
    scored = with_thresholds(trained, 0.2, 0.8).transform(points).collect()
    expected = [float(np.argmax(row.probability.toArray() / [0.2, 0.8])) for row in scored]
    assert [row.prediction for row in scored] == expected
    always = with_thresholds(trained, 1.0, 0.0).transform(points)
    assert always.where("prediction = 1").count() == 400
    three = "has 3 values, but the model has 2 classes"
    for wrong, says in (((0.1, 0.2, 0.3), three), ((0.0, 0.0), "and 0 once")):
        with pytest.raises(ConfigError, match=says):
            with_thresholds(trained, *wrong).transform(points)


def test_bad_rows_are_refused_left_out_or_kept(points, trained):
    nulls = points.withColumn("features", F.when(F.col("label") == 1, F.col("features")))
    good = points.where("label = 1").count()
    assert trained.copy().setParams(handleInvalid="skip").transform(nulls).count() == good
    kept = trained.copy().setParams(handleInvalid="keep").transform(nulls)
    assert (kept.count(), kept.where("prediction is null").count()) == (400, 400 - good)
    with (
        pytest.raises(BadRows, match='set handleInvalid to "skip" or "keep"'),
        spark_job(points.sparkSession.sparkContext, "predicting"),
    ):
        trained.transform(nulls).collect()
    skipping = TorchClassifier(module=nn.Linear(2, 2), handleInvalid="skip", **BRIEF).fit(
        nulls.union(points.where("label = 0"))
    )
    assert skipping.numClasses == 2


@pytest.mark.soak
def test_one_logit_is_a_classifier_of_two_classes(points, tmp_path):
    classifier = TorchClassifier(module=nn.Linear(2, 1), loss="binary_cross_entropy", **BRIEF)
    model = classifier.fit(points)
    scored = model.transform(points)
    assert auc(scored) == pytest.approx(exact_auc(scored), abs=1e-12)
    assert model.numClasses == 2
    model.save(str(tmp_path / "model"))
    loaded = TorchClassificationModel.load(str(tmp_path / "model"))
    assert auc(loaded.transform(points)) == pytest.approx(auc(scored), abs=1e-12)


def test_a_regressor_gives_doubles(points, tmp_path):
    target = points.withColumn("label", F.col("label") * 2 + 1)
    torch.manual_seed(1)
    steep = BRIEF | {"maxEpochs": 3, "optimizer": "SGD", "learningRate": 0.3}
    model = TorchRegressor(module=nn.Linear(2, 1), **steep).fit(target)
    scored = model.transform(target)
    assert scored.schema["prediction"].dataType.simpleString() == "double"
    assert RegressionEvaluator(metricName="r2").evaluate(scored) > 0.6
    model.save(str(tmp_path / "model"))
    loaded = TorchRegressionModel.load(str(tmp_path / "model"))
    assert loaded.transform(target).select("prediction").collect() == scored.select("prediction").collect()
    assert loaded.predict(target.first().features) == pytest.approx(scored.first().prediction)


@pytest.mark.soak
def test_several_columns_are_arguments_of_forward(people):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.last(torch.stack([a, b], 1))

    target = people.withColumn("label", F.col("a") - F.col("b"))
    model = TorchRegressor(module=Sum(), featuresCols=["a", "b"], **BRIEF).fit(target)
    row = model.transform(target).first()
    with torch.no_grad():
        expected = model.module(torch.tensor([row.a]), torch.tensor([row.b]))
    assert row.prediction == pytest.approx(float(expected), rel=1e-6)
    assert model.numFeatures == 2
    with pytest.raises(DataError, match=r"predict takes one vector, but the model reads .*a, b"):
        model.predict([1.0, 2.0])


@pytest.mark.soak
def test_one_column_of_several_is_the_model_s_too(points, tmp_path):
    named = points.withColumn("x", F.col("features")).withColumn(
        "features", F.lit(None).cast("array<double>")
    )
    model = TorchClassifier(module=linear(), featuresCols=["x"], **BRIEF).fit(named)
    assert model.getFeaturesCol() == "x"
    model.save(str(tmp_path / "model"))
    assert TorchClassificationModel.load(str(tmp_path / "model")).transform(named).count() == 400


def test_the_model_of_a_job_is_a_model_and_the_other_way_round(points, trained, tmp_path):
    trained.save(str(tmp_path / "model"))
    plain = sparksgd.load_model(tmp_path / "model" / "model")
    assert torch.equal(plain.module.weight, trained.module.weight)
    model = TorchClassificationModel.load(str(tmp_path / "model" / "model"))
    assert model.transform(points).count() == 400
    assert (model.getFeaturesCol(), model.getLabelCol()) == ("features", "label")


@pytest.mark.soak
def test_cross_validation_fits_and_takes_the_best(points):
    classifier = TorchClassifier(module=mlp, **BRIEF)
    grid = ParamGridBuilder().addGrid(classifier.learningRate, [0.0, 0.05]).build()
    validator = CrossValidator(
        estimator=classifier,
        estimatorParamMaps=grid,
        evaluator=BinaryClassificationEvaluator(numBins=0),
        numFolds=2,
        parallelism=2,
        seed=1,
    )
    found = validator.fit(points)
    assert found.avgMetrics[1] > found.avgMetrics[0]
    alone = classifier.copy({classifier.learningRate: 0.05}).fit(points)
    best = found.bestModel
    assert all(map(torch.equal, best.module.parameters(), alone.module.parameters()))


def test_what_another_class_saved_is_refused(points, trained, tmp_path):
    trained.save(str(tmp_path / "model"))
    with pytest.raises(DataError, match=r"holds a 'sparksgd\.ml\.models\.TorchClass\w+', not a "):
        TorchRegressionModel.load(str(tmp_path / "model"))
    weights = next((tmp_path / "model" / "model").glob("weights*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"weights\.pt"):
        TorchClassificationModel.load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"module": 3}, "module is 3, but must be a torch.nn.Module, a function or class that makes one"),
        ({}, "TorchClassifier has no module: pass module="),
        ({"module": "predicted_modules:mpl"}, r"has no 'mpl' \(did you mean mlp\?\)"),
        ({"module": nn.Linear(2, 1)}, "cross_entropy takes a logit for each class"),
        (
            {"module": nn.Linear(2, 2), "loss": "squared_error"},
            r'whose kind is "numbers", but TorchClassifier trains with losses of .* or several labels: use T',
        ),
        ({"module": nn.Linear(2, 2), "config": {"train": {"epochs": 3}}}, "maxEpochs is 1, but config sets"),
        ({"module": nn.Linear(2, 2), "config": {"data": {"label": "y"}}}, "leave it out of config"),
        ({"module": nn.Linear(2, 2), "config": 3}, "the configuration is 3, but must be a dict"),
        ({"module": nn.Linear(2, 2), "config": {"trian": {}}}, r"unknown section \[trian\]"),
        (
            {"module": nn.Linear(2, 2), "config": {"model": {"hidden": 3}}},
            "which takes no arguments, but config sets model.hidden",
        ),
        ({"module": nn.Linear(2, 2), "featuresCol": "features", "featuresCols": ["a"]}, "set one of them"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(points, params, says):
    with pytest.raises((ConfigError, ModelError), match=says):
        TorchClassifier(**BRIEF | params).fit(points)


@pytest.mark.parametrize(
    ("params", "key"),
    [
        ({"module": "predicted_modules:mlp"}, "module"),
        ({"loss": "predicted_modules:mlp"}, "loss"),
        ({"config": {"optimizer": {"name": "predicted_modules:mlp"}}}, "config: optimizer.name"),
    ],
)
def test_an_estimator_runs_no_code_that_is_not_trusted(tmp_path, spark, params, key):
    TorchClassifier(**params).save(str(tmp_path / "estimator"))
    with pytest.raises(
        DataError, match=f"{key} is 'predicted_modules:mlp', but predicted_modules is not trusted"
    ):
        TorchClassifier.load(str(tmp_path / "estimator"))
    assert TorchClassifier.load(str(tmp_path / "estimator"), trust=["predicted_modules"]).uid


def test_an_estimator_of_an_object_cannot_be_saved(tmp_path):
    with pytest.raises(ConfigError, match="the Estimator cannot be saved, because its module is an object"):
        TorchClassifier(module=nn.Linear(2, 2)).save(str(tmp_path / "estimator"))


@pytest.mark.soak
def test_what_a_factory_of_a_notebook_makes_is_loaded_by_its_parts(points, tmp_path):
    notebooks = TorchClassifier(module=lambda num_features: nn.Linear(num_features, 2), **BRIEF)
    notebooks.fit(points).save(str(tmp_path / "model"))
    about = json.loads((tmp_path / "model" / "model" / "model.json").read_text())
    assert (about["model"]["name"], about["parts"][""]["class"]) == (None, "Linear")
    assert TorchClassificationModel.load(str(tmp_path / "model")).transform(points).count() == 400


def test_sizes_that_cannot_be_filled_in_are_refused_in_words(points):
    fractions = points.withColumn("label", F.lit(0.5))
    for rows, says in (
        (points.drop("label"), "the data has no column 'label'"),
        (fractions, r"the greatest label in 'label' is 0\.5, but must be a whole number"),
        (points.withColumn("label", F.lit(None).cast("double")), "greatest label in 'label' is None"),
        (points.drop("features"), "the data has no column 'features'"),
    ):
        with pytest.raises(DataError, match=says):
            TorchClassifier(module=mlp, **BRIEF).fit(rows)


def test_a_classifier_and_a_regressor_are_told_apart(points, trained, tmp_path):
    with pytest.raises(ConfigError, match=r"loss is 'cross_entropy', whose kind .* use TorchClassifier"):
        TorchRegressor(module=linear(), loss="cross_entropy", **BRIEF).fit(points)
    trained.save(str(tmp_path / "model"))
    model = TorchRegressionModel.load(str(tmp_path / "model" / "model"))
    with pytest.raises(ConfigError, match="trained with cross_entropy, as a classifier: load it as TorchCl"):
        model.transform(points)


# Validation, early stopping, callbacks, history


@pytest.mark.soak
def test_a_fit_is_validated_ends_early_and_tells_of_it(points, tmp_path):
    classifier = TorchClassifier(
        module=linear(),
        validationFraction=0.25,
        earlyStopping=1,
        **BRIEF | {"maxEpochs": 40, "learningRate": 1.0},
    )
    model = classifier.fit(points)
    told = model.summary["value"]
    assert told["stopped_by"] == "early_stopping"
    history = model.history
    assert list(history.columns) == ["epoch", "step", "loss", "lr", "test_loss", "test_accuracy"]
    assert history.test_loss.idxmin() == len(history) - 2
    assert told["best_step"] == history.step[history.test_loss.idxmin()]
    assert told["test_loss"] == history.test_loss.min()
    config = {
        "data": {"features": "features", "label": "label", "validation_fraction": 0.25},
        "early_stopping": {"patience": 1},
        "optimizer": {"name": "AdamW", "lr": 1.0},
        "engine": {"name": "tree"},
        "train": {"epochs": 40, "rows_per_step": 100, "num_shards": 2},
    }
    alone = sparksgd.train(config, points, module=linear())
    assert alone.flat.parameters_sha256() == told["parameters_sha256"]
    model.write().overwrite().save(str(tmp_path / "model"))
    again = TorchClassificationModel.load(str(tmp_path / "model"))
    assert again.history.equals(history)
    assert again.summary.equals(model.summary)
    (tmp_path / "model" / "training.json").unlink()
    assert len(TorchClassificationModel.load(str(tmp_path / "model")).history) == 0


@pytest.mark.soak
def test_a_column_and_a_callback_are_params_of_a_fit(points, tmp_path):
    marked = points.withColumn("held out", F.rand(3) < 0.2).localCheckpoint()
    seen = []

    class Ends(sparksgd.Observer):
        def evaluated(self, training, report):
            seen.append(report.rows)
            training.stop("enough")

    fit = {**BRIEF, "maxEpochs": 5}
    classifier = TorchClassifier(
        module=linear(), validationIndicatorCol="held out", callbacks=[Ends()], **fit
    )
    assert classifier.fit(marked).summary["value"]["stopped_by"] == "enough"
    assert seen == [marked.where("`held out`").count()]
    with pytest.raises(ConfigError, match="because its callbacks are objects of this process"):
        TorchClassifier(module="predicted_modules:mlp", callbacks=[Ends()]).save(str(tmp_path / "a"))
    named = TorchClassifier(module="lenet", callbacks=["predicted_modules:Quiet"])
    named.save(str(tmp_path / "b"))
    with pytest.raises(DataError, match=r"callbacks\[0\] is 'predicted_modules:Quiet'"):
        TorchClassifier.load(str(tmp_path / "b"))
    named = TorchClassifier(module="lenet", metrics=["f1_macro", "predicted_modules:Quiet"])
    named.save(str(tmp_path / "c"))
    with pytest.raises(DataError, match=r"metrics\[1\] is 'predicted_modules:Quiet'"):
        TorchClassifier.load(str(tmp_path / "c"))
    with pytest.raises(
        ConfigError, match=r"callbacks has .*, but must be a list of instances of sparksgd\.Obs"
    ):
        TorchClassifier(module=linear(), callbacks=[3], **fit).fit(points)


def test_rows_of_parquet_may_have_columns_that_are_no_types_of_arrow(trained, points, tmp_path):
    rows = points.withColumns(
        {
            "span": F.expr("make_ym_interval(1, 2)"),
            "more": F.array("features"),
            "map": F.create_map(F.lit("a"), "features"),
        }
    )
    rows.write.parquet(str(tmp_path / "rows"))
    read = points.sparkSession.read.parquet(str(tmp_path / "rows"))
    columns = ["features", "prediction", "probability"]
    expected = trained.transform(points).select(columns).collect()
    found = trained.transform(read).select(columns).collect()
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert trained.transform(read).where("prediction = 1").count() == sum(row.prediction for row in expected)
    assert trained.transform(read).columns == [*read.columns, "rawPrediction", "probability", "prediction"]
