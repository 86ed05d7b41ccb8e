"""Metrics of one's own have the same values on every engine, and executors import them."""

from __future__ import annotations

import pytest
from spark_helpers import configured

from sparksgd.spark.train import train
from sparksgd.training.in_process import train_in_process

pytestmark = pytest.mark.session("local[2]")

OWN = [f"own_metrics_of_users:{name}" for name in ("first_logit", "right")]
SETTINGS = (f"train.metrics={OWN}".replace("'", '"'), "model.name=users_modules:DropoutNet", "train.steps=4")


@pytest.mark.parametrize(
    "engine",
    [
        ["engine.name=tree"],
        pytest.param(["engine.name=allreduce"], marks=pytest.mark.soak),
        pytest.param(["engine.name=tree", "engine.barrier=false"], marks=pytest.mark.soak),
    ],
)
def test_an_engine_tells_the_same_values(spark, small, engine):
    inline = train_in_process(configured(*SETTINGS, "engine.name=inline"), small, small)
    rows = spark.read.parquet(small)
    training = train(spark, configured(*SETTINGS, *engine), rows, rows)
    assert training.evaluations[-1].metrics == inline.evaluations[-1].metrics
    assert list(training.evaluations[-1].metrics) == OWN
    assert training.evaluations[-1].metrics[OWN[1]] == training.evaluations[-1].accuracy
