"""Bad input to a training on Spark: each a clear error of our own, before any step."""

from __future__ import annotations

import pytest
from pyspark.ml.linalg import Vectors
from pyspark.sql import functions as F
from spark_helpers import configured

from sparksgd.errors import BadRows, ClusterError, ConfigError, DataError, ModelError, NotEnoughSlots
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.frame_rows import read_parquet
from sparksgd.spark.train import demand_of, train
from sparksgd.training.state import Observer

pytestmark = pytest.mark.session("local[2]")


class NoStep(Observer):
    """Observes that no training begins."""

    def started(self, training):
        raise AssertionError("training began")


def refused(spark, frame, *settings):
    train(spark, configured(*settings), frame, observers=[NoStep()])


def test_a_missing_column_is_named_with_the_nearest_one(spark, small):
    frame = spark.read.parquet(small).withColumnRenamed("features", "feature")
    with pytest.raises(DataError, match=r"no column 'features' \(did you mean feature\?\)"):
        refused(spark, frame)


def test_a_column_of_texts_is_refused(spark, small):
    frame = spark.read.parquet(small).withColumn("features", F.lit("text"))
    with pytest.raises(DataError, match="column 'features' is string, but must be binary, a number"):
        refused(spark, frame)


def test_bad_rows_are_counted_by_reason_with_examples(spark, small):
    frame = spark.read.parquet(small)
    bad = frame.limit(10).withColumn("label", F.lit(None).cast("int"))
    bad = bad.union(frame.limit(5).withColumn("label", F.lit(7)))
    bad = bad.union(frame.limit(3).withColumn("features", F.unhex(F.lit("00FF"))))
    with pytest.raises(BadRows) as caught:
        refused(spark, frame.union(bad))
    text = str(caught.value)
    assert "18 of 1,021 rows cannot be trained on" in text
    assert "10 with null in 'label'" in text
    assert "5 with a label outside 0..3 (such as 7, 7, 7)" in text
    assert "3 with a number of values other than 16 (most rows') in 'features' (such as 2, 2, 2)" in text


def test_bad_rows_may_be_skipped_up_to_a_number(spark, small):
    frame = spark.read.parquet(small)
    frame = frame.union(frame.limit(3).withColumn("label", F.lit(9)))
    training = train(
        spark,
        configured("train.steps=1", "data.on_bad_row=skip", "data.max_bad_rows=3"),
        frame,
    )
    assert (training.rows.rows, training.rows.bad.total()) == (1003, 3)
    with pytest.raises(BadRows, match=r"more than data.max_bad_rows = 2"):
        refused(spark, frame, "data.on_bad_row=skip", "data.max_bad_rows=2")


def test_nan_in_a_list_of_numbers_is_refused(spark):
    rows = [([1.0, float("nan")], 0.5)] * 9 + [([1.0, 2.0], 0.5)] * 9
    linear = ["model.name=torch.nn:Linear", "model.in_features=2", "model.out_features=1"]
    with pytest.raises(BadRows, match="9 with NaN or infinity"):
        refused(
            spark,
            spark.createDataFrame(rows, "x array<double>, y double"),
            "data.features=x",
            "data.label=y",
            "loss.name=squared_error",
            *linear,
        )


def test_an_empty_frame_is_refused(spark, small):
    with pytest.raises(DataError, match="there is no row to train on"):
        refused(spark, spark.read.parquet(small).where("false"))


def test_more_shards_than_rows_are_refused(spark, small):
    with pytest.raises(ConfigError, match=r"train.num_shards is 4, but there are 3 rows"):
        refused(spark, spark.read.parquet(small).limit(3))


def test_more_workers_than_slots_are_refused_at_once_with_the_numbers(spark):
    with pytest.raises(NotEnoughSlots, match=r"engine.num_workers is 4, but the cluster has 2 slots"):
        Cluster(spark, demand_of(configured("engine.num_workers=4"))).settle()


def test_more_workers_than_shards_are_refused(spark):
    with pytest.raises(ConfigError, match="a worker owns one shard at least"):
        Cluster(spark, demand_of(configured("engine.num_workers=5"))).settle()


def test_more_threads_than_a_task_has_cpus_are_refused(spark):
    with pytest.raises(
        ConfigError, match=r"threads is 2, but spark.task.cpus is 1.*--conf spark.task.cpus=2"
    ):
        Cluster(spark, demand_of(configured("train.threads=2"))).settle()


def test_dynamic_allocation_is_refused(spark, setting):
    setting("spark.dynamicAllocation.enabled", "true")
    with pytest.raises(ClusterError, match=r"spark.dynamicAllocation.enabled is true"):
        Cluster(spark, demand_of(configured())).settle()


def test_gradients_that_exceed_the_result_limit_are_refused_with_the_arithmetic(spark, setting, small):
    setting("spark.driver.maxResultSize", "1m")
    with pytest.raises(ClusterError, match=r"2 partial sums of .* MB to .*maxResultSize is 1.0 MB"):
        refused(spark, spark.read.parquet(small), "model.width=40000")


def test_a_model_that_the_drivers_heap_cannot_hold_is_refused_with_the_arithmetic(spark, small, monkeypatch):
    monkeypatch.setattr(Cluster, "driver_heap_bytes", 5 << 20)
    with pytest.raises(
        ClusterError, match=r"two copies of the weights.*heap is 5.2 MB: .*--driver-memory 1g"
    ):
        refused(spark, spark.read.parquet(small), "model.width=40000")


def test_results_above_the_message_size_are_named(spark, setting, small, caplog):
    setting("spark.rpc.message.maxSize", "1")
    train(spark, configured("model.width=20000", "train.steps=1"), spark.read.parquet(small))
    assert "spark.rpc.message.maxSize is 1.0 MB: results go through the block" in caplog.text


def test_a_module_that_executors_cannot_import_is_named(spark, small, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text(
        "from users_modules import DropoutNet as Net\nclass Mine(Net): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match=r"finds no module 'only_here': ship it with --py-files"):
        refused(spark, spark.read.parquet(small), "model.name=only_here:Mine")


def test_a_path_that_is_no_parquet_is_refused(spark, tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        read_parquet(spark, str(tmp_path / "nowhere"))


def test_vectors_of_spark_ml_and_several_columns_reach_forward_by_name(spark):
    rows = [(Vectors.dense([i / 9, 1.0]), i % 5, float(i)) for i in range(64)]
    frame = spark.createDataFrame(rows, ["vector", "number", "target"])
    training = train(
        spark,
        configured(
            "model.name=users_modules:TwoColumns",
            'data.features=["vector", "number"]',
            "data.label=target",
            "loss.name=squared_error",
            "optimizer.lr=0.001",
            "train.steps=3",
        ),
        frame,
        frame,
    )
    assert [(f.name, f.dtype, f.length) for f in training.plan.schema.features] == [
        ("vector", "float32", 2),
        ("number", "int64", None),
    ]
    assert training.evaluations[-1].accuracy is None
