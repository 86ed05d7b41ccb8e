"""A saved model on a DataFrame: scores where the columns fit, a refusal where they do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F
from spark_helpers import configured

from sparksgd.errors import BadRows, DataError, UserCodeError
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.model import load_model
from sparksgd.spark.evaluation import evaluate
from sparksgd.spark.train import train

pytestmark = pytest.mark.session("local[2]")


@pytest.fixture(scope="module")
def points(session_for):
    """Return rows of two features in a column whose name has a dot, and whether the first is greater."""
    spark = session_for("local[2]")
    rows = [([x / 9, y / 9], int(x > y)) for x in range(10) for y in range(10)]
    return spark.createDataFrame(rows, "point array<float>, label int").toDF("the.point", "label")


@pytest.fixture(scope="module")
def training_and_model(session_for, points, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    settings = ["data.features=the.point", "model.name=torch.nn:Linear", "model.in_features=2"]
    config = configured(*settings, "model.out_features=2", "train.epochs=3")
    training = train(session_for("local[2]"), config, points, points, observers=[RunFolder(out)])
    return training, load_model(out / "model", trust=["torch.nn"])


def test_scores_are_those_of_the_training(points, training_and_model):
    training, model = training_and_model
    scores = evaluate(points, model)
    assert scores.rows == 100
    assert scores.accuracy == training.evaluations[-1].accuracy
    assert scores.loss == pytest.approx(training.evaluations[-1].loss)
    assert np.trace(scores.confusion) == round(scores.accuracy * 100)
    assert scores.confusion.sum(axis=1).tolist() == [55, 45]


def test_vectors_of_spark_ml_count_as_lists(points, training_and_model):
    _, model = training_and_model
    vectors = points.withColumn("the.point", array_to_vector("`the.point`"))
    assert evaluate(vectors, model).confusion.tolist() == evaluate(points, model).confusion.tolist()


def test_columns_that_do_not_fit_are_refused(points, training_and_model):
    _, model = training_and_model
    with pytest.raises(DataError, match=r"no column 'label' \(did you mean labels\?\)"):
        evaluate(points.withColumnRenamed("label", "labels"), model)
    with pytest.raises(
        DataError, match=r"column 'the\.point' is uint8 in this data, but float32 in the training"
    ):
        evaluate(points.withColumn("the.point", F.unhex(F.lit("00FF"))), model)


def test_a_module_that_raises_is_the_users_error_not_the_clusters(points, training_and_model):
    _, model = training_and_model
    broken = replace(model, module=torch.nn.Linear(3, 2))
    with pytest.raises(UserCodeError, match=r"RuntimeError: mat1 and mat2 .*(?s:.*)in the evaluation, at "):
        evaluate(points, broken)


def test_rows_that_do_not_fit_are_refused(points, training_and_model):
    _, model = training_and_model
    with pytest.raises(BadRows, match=r"100 of 100 rows .* a label outside 0\.\.1"):
        evaluate(points.withColumn("label", F.lit(2)), model)
    with pytest.raises(DataError, match="there is no row to evaluate on"):
        evaluate(points.where("false"), model)
