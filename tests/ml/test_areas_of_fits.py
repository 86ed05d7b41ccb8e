"""Areas under curves that a fit tells are those of Spark's own evaluator, and of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from torch import nn

from sparksgd.ml import TorchClassifier

pytestmark = [pytest.mark.session("local[2]"), pytest.mark.soak]


@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_the_area_of_a_fit_is_that_of_spark_over_the_same_rows(spark, engine):
    source = np.random.default_rng(4).normal(size=(1500, 2)).round(1)
    rows = [(row.tolist(), int(row.sum() + noise > 0), n % 3 == 0) for n, (row, noise) in enumerate(
        zip(source, np.random.default_rng(5).normal(size=1500), strict=True))]  # fmt: skip
    frame = spark.createDataFrame(rows, "features array<double>, label int, held boolean")
    torch.manual_seed(1)
    classifier = TorchClassifier(
        module=nn.Linear(2, 1), loss="binary_cross_entropy", engine=engine, maxEpochs=2, batchSize=200,
        numShards=3, validationIndicatorCol="held", metrics=["area_under_roc", "area_under_pr"],
    )  # fmt: skip
    model = classifier.fit(frame)
    told = model.history.iloc[-1]
    scored = model.transform(frame.where("held")).cache()
    by_spark = BinaryClassificationEvaluator(numBins=0).evaluate(scored)
    assert told.test_area_under_roc == pytest.approx(by_spark, rel=1e-12)
    of_rows = scored.select("rawPrediction", "label").collect()
    score, label = (np.array(values) for values in zip(*((r[0][1], r[1]) for r in of_rows), strict=True))
    found = before = 0.0
    for threshold in np.unique(score)[::-1]:
        hits = label[score >= threshold].sum()
        found += (hits - before) / label.sum() * hits / (score >= threshold).sum()
        before = hits
    assert told.test_area_under_pr == pytest.approx(found, rel=1e-12)
