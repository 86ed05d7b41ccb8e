"""Rows that several trainings share are dealt once, and the bits of each are those of one alone."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path

import pytest
import torch
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F
from spark_helpers import configured, digests, write_rows
from torch import nn

import sparksgd
from sparksgd.errors import ConfigError
from sparksgd.ml import TorchClassifier
from sparksgd.spark.cluster.shards import SparkShards

pytestmark = pytest.mark.session("local[2]")

BRIEF = {"maxEpochs": 1, "batchSize": 100, "numShards": 2, "engine": "tree"}


@pytest.fixture(scope="module")
def points(session_for):
    frame = (
        session_for("local[2]")
        .range(300)
        .select(*(F.sin(F.col("id") * factor).alias(name) for name, factor in (("a", 1.7), ("b", 3.1))))
    )
    both = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(frame)
    return both.select("features", (F.col("a") > F.col("b")).cast("int").alias("label"))


@pytest.fixture
def deals(caplog):
    """Return a function that counts the deals so far."""
    caplog.set_level(logging.INFO, "sparksgd")
    return lambda: (
        sum("rows: dealt into" in line and "before" not in line for line in caplog.messages)
        - sum("were dealt before" in line for line in caplog.messages)
    )


def linear():
    torch.manual_seed(1)
    return nn.Linear(2, 2)


@pytest.fixture
def standing(monkeypatch):
    """Return the files of shards that were written, and not removed yet."""
    found = {}

    def noted(method, note):
        def call(shards):
            method(shards)
            note(shards)

        return call

    def written(shards):
        found[shards] = [Path(shard.path) for shard in shards.table]

    def removed(shards):
        assert not any(file.exists() for file in found.pop(shards))

    monkeypatch.setattr(SparkShards, "write", noted(SparkShards.write, written))
    monkeypatch.setattr(SparkShards, "remove", noted(SparkShards.remove, removed))
    return found


def test_fits_of_several_maps_share_a_deal_and_have_the_bits_of_fits_alone(points, deals):
    estimator = TorchClassifier(module=linear(), **BRIEF)
    maps = [{estimator.learningRate: rate} for rate in (0.01, 0.1)] + [{estimator.batchSize: 50}]
    alone = [estimator.fit(points, one).summary.value["parameters_sha256"] for one in maps]
    assert deals() == 3
    fits = estimator.fitMultiple(points, maps)
    found = {}
    for number, model in fits:
        found[number] = model.summary.value["parameters_sha256"]
    assert [found[number] for number in range(3)] == alone
    assert deals() == 4
    assert fits._shared._shards == {}  # removed after the last fit
    assert estimator.fit(points, maps)[1].summary.value["parameters_sha256"] == alone[1]
    assert deals() == 5


@pytest.mark.soak
def test_what_shapes_the_shards_deals_once_more(points, deals):
    estimator = TorchClassifier(module=linear(), **BRIEF)
    maps = [{}, {estimator.numShards: 3}, {estimator.validationFraction: 0.2}, {estimator.seed: 5}]
    list(estimator.fitMultiple(points, maps))
    assert deals() == 1 + 1 + 2  # with held-out rows, two: of both sides


def test_fits_that_nobody_asks_for_leave_no_shards(points, standing):
    estimator = TorchClassifier(module=linear(), **BRIEF)
    fits = estimator.fitMultiple(points, [{}, {estimator.seed: 1}])
    next(fits)
    (files,) = standing.values()
    assert all(file.exists() for file in files)
    del fits
    gc.collect()
    assert standing == {}


@pytest.mark.soak
def test_fits_in_threads_take_turns_and_say_so(points, caplog, deals):
    estimator = TorchClassifier(module=linear(), **BRIEF)
    fits = estimator.fitMultiple(points, [{estimator.seed: seed} for seed in range(4)])
    found = {}

    def work():
        for number, model in fits:
            found[number] = model.summary.value["parameters_sha256"]

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "another fit trains in this session: this one begins when that one has ended" in caplog.text
    assert deals() == 1
    alone = TorchClassifier(module=linear(), seed=3, **BRIEF).fit(points)
    assert found.keys() == {0, 1, 2, 3}
    assert found[3] == alone.summary.value["parameters_sha256"]


@pytest.mark.soak
@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_cross_validation_of_3_folds_and_4_settings_deals_4_times_for_13_fits(
    points, deals, standing, parallelism
):
    estimator = TorchClassifier(module=linear(), **BRIEF)
    grid = ParamGridBuilder().addGrid(estimator.learningRate, [0.001, 0.01, 0.1, 1.0]).build()
    evaluator = BinaryClassificationEvaluator(numBins=0)
    validator = CrossValidator(
        estimator=estimator, estimatorParamMaps=grid, evaluator=evaluator, numFolds=3, seed=1,
        parallelism=parallelism,
    )  # fmt: skip
    best = validator.fit(points).bestModel
    assert deals() == 4
    gc.collect()
    assert standing == {}
    fits = [estimator.fit(points, one).summary.value["parameters_sha256"] for one in grid]
    assert best.summary.value["parameters_sha256"] in fits


@pytest.mark.soak
def test_trainings_in_a_block_share_a_deal(spark, tmp_path, deals):
    path = write_rows(tmp_path / "rows", 400)
    configs = [configured(f"optimizer.lr={rate}", "data.validation_fraction=0.2") for rate in (0.1, 0.2)]
    alone = [sparksgd.train(config, spark.read.parquet(path)) for config in configs]
    dealt = deals()
    with sparksgd.deal(spark.read.parquet(path)) as rows:
        together = [sparksgd.train(config, rows) for config in configs]
        assert deals() == dealt + 2  # both sides, once
        more = sparksgd.train(configured("train.num_shards=5"), rows, rows)
        assert deals() == dealt + 3  # the same shards, to train on and to evaluate
    assert [digests(training) for training in together] == [digests(training) for training in alone]
    assert [r.loss for r in together[1].evaluations] == [r.loss for r in alone[1].evaluations]
    assert more.evaluations[-1].rows == 400
    with pytest.raises(ConfigError, match=r"deal\(\.\.\.\) that is closed: train inside its `with`"):
        sparksgd.train(configs[0], rows)
    with pytest.raises(ConfigError, match="rows is 3, but must be a Spark DataFrame, or the path of Parquet"):
        sparksgd.deal(3)


@pytest.mark.soak
def test_shared_shards_that_were_damaged_are_written_again(spark, tmp_path):
    frame = spark.read.parquet(write_rows(tmp_path / "rows", 400))
    with sparksgd.deal(frame) as rows:
        first = sparksgd.train(configured(), rows)
        (shards,) = rows._shards.values()
        with open(shards.table[1].path, "r+b") as file:  # noqa: PTH123  # a Path cannot be changed in place
            file.seek(40)
            file.write(b"\xff" * 8)
        again = sparksgd.train(configured(), rows)
    assert digests(again) == digests(first)
    assert again.recovery.rebuilt_shards >= 1
