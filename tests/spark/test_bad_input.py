"""Bad input to a training on Spark: each a clear error of our own, before any step."""

from __future__ import annotations

import logging
import math
import sys
import uuid
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, StructField, StructType
from spark_helpers import configured, digests, undisturbed

from sparksgd.errors import (
    BadRows,
    ClusterError,
    ConfigError,
    DataError,
    ModelError,
    NotEnoughSlots,
    OutOfMemory,
    ShardChanged,
)
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.frame_rows import first_rows, read_parquet
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
    with pytest.raises(OutOfMemory, match=r"maxResultSize is 1.0 MB, .*results of a job.*maxResultSize=256m"):
        refused(spark, spark.read.parquet(small), "model.width=40000")


@pytest.mark.parametrize(
    "settings",
    [["engine.name=tree"], ["engine.name=tree", "engine.barrier=false"], ["engine.name=allreduce"]],
    ids=["tree", "stages", "allreduce"],
)
def test_a_model_that_the_drivers_heap_cannot_hold_is_refused_before_rows_are_dealt(
    spark, small, monkeypatch, caplog, settings
):
    monkeypatch.setattr(Cluster, "driver_heap_bytes", 5 << 20)
    with (
        caplog.at_level(logging.INFO, "sparksgd"),
        pytest.raises(OutOfMemory, match=r"heap of the driver is 5.2 MB, .*\(Spark\).*--driver-memory 256m"),
    ):
        refused(spark, spark.read.parquet(small), "model.width=4000", *settings)
    assert "dealt" not in caplog.text


def test_where_one_engine_takes_too_much_auto_uses_another(spark, setting, small, caplog):
    setting("spark.driver.maxResultSize", "9m")  # of 3.3 MB of parameters allreduce returns two more vectors
    config = configured("model.width=40000", "train.steps=1", "engine.name=auto", "optimizer.name=Adam")
    with caplog.at_level(logging.INFO, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.engine == "tree"
    assert 'engine: tree, because engine.name = "allreduce" takes more memory than there is' in caplog.text


def test_results_above_the_message_size_are_named(spark, setting, small, caplog):
    setting("spark.rpc.message.maxSize", "1")
    train(spark, configured("model.width=20000", "train.steps=1"), spark.read.parquet(small))
    assert "spark.rpc.message.maxSize is 1.0 MB: results go through the block" in caplog.text


@pytest.fixture
def only_here(tmp_path, monkeypatch):
    """Let the driver have a module that executors cannot import."""
    (tmp_path / "only_here.py").write_text(
        "import torch\n"
        "from users_modules import DropoutNet as Net\n"
        "class Mine(Net): ...\n"
        "class Steps(torch.optim.SGD): ...\n"
        "def loss(output, label): return torch.nn.functional.cross_entropy(output, label, reduction='none')\n"
        "def made(**arguments): return Net(**arguments)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("only_here", None)


MISSING = r"Python on \S+ \(\S+\) finds no module 'only_here': ship it with --py-files"


@pytest.mark.usefixtures("only_here")
@pytest.mark.parametrize("setting", ["model.name=only_here:Mine", "loss.name=only_here:loss"])
def test_a_module_that_executors_cannot_import_is_named_before_rows_are_read(
    spark, monkeypatch, small, setting
):
    monkeypatch.setattr("sparksgd.training.loop.check", None)  # it reads the rows
    with pytest.raises(ModelError, match=MISSING):
        refused(spark, spark.read.parquet(small), setting)


@pytest.mark.usefixtures("only_here")
@pytest.mark.parametrize(
    "settings",
    [
        ("engine.name=allreduce",),
        ("engine.name=tree", "solver.name=local_sgd"),
    ],
)
def test_an_optimiser_that_workers_cannot_import_is_named_before_rows_are_dealt(
    spark, small, caplog, settings
):
    with caplog.at_level(logging.INFO, "sparksgd"), pytest.raises(ModelError, match=MISSING):
        refused(spark, spark.read.parquet(small), "optimizer.name=only_here:Steps", *settings)
    assert "dealt" not in caplog.text


@pytest.mark.usefixtures("only_here")
def test_what_workers_need_not_import_may_be_on_the_driver_only(spark, small, caplog):
    settings = ["model.name=only_here:made", "optimizer.name=only_here:Steps", "engine.name=auto"]
    config = configured(*settings, "train.steps=1")
    with caplog.at_level(logging.INFO, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.engine == "tree"
    assert "engine: tree, because the executors' Python on" in caplog.text


def test_another_python_on_the_executors_is_named_before_rows_are_read(spark, monkeypatch):
    monkeypatch.setattr(spark.sparkContext, "pythonVer", "3.99")  # the driver's, as workers are told
    with pytest.raises(
        ConfigError, match=r"the executors' Python on \S+ is 3\.1\d, but the driver's is 3\.99"
    ):
        train(spark, configured(), "nowhere")


def test_what_the_executors_python_lacks_is_named_before_rows_are_read(session_for, tmp_path):
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    spark = session_for("local[2]", spark__python__daemon__module="pyspark.daemon")
    context = spark.sparkContext
    python, context.pythonExec = context.pythonExec, str(bare)
    try:
        with pytest.raises(
            ConfigError, match=rf"on \S+ \({sys.executable}\) lacks numpy and pandas and pyarrow and torch: "
        ):
            train(spark, configured(), "nowhere")
    finally:
        context.pythonExec = python


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


# What is read twice, and must be the same


def regression(*settings):
    """Settings of a linear regression of y on x, two numbers."""
    linear = ["model.name=torch.nn:Linear", "model.in_features=2", "model.out_features=1"]
    return [
        "data.features=x",
        "data.label=y",
        "loss.name=squared_error",
        "optimizer.lr=0.01",
        *linear,
        *settings,
    ]


@pytest.fixture(scope="module")
def numbers(session_for):
    """Return 64 rows of x, two numbers, and y, in 4 partitions."""
    rows = [([float(i), i / 8], float(i % 5)) for i in range(64)]
    return session_for("local[2]").createDataFrame(rows, "x array<double>, y double").repartition(4)


def random():
    """Return a column that differs at every reading."""
    return F.udf(lambda: uuid.uuid4().hex, "string").asNondeterministic()()


@pytest.mark.parametrize("num_shards", [1, 4])
def test_ids_that_differ_at_every_reading_are_refused(spark, numbers, num_shards):
    settings = regression("data.id=id", f"train.num_shards={num_shards}", "engine.num_workers=1")
    with pytest.raises(ShardChanged, match=r"64 rows .* were dealt; shards 0.* \(maybe data.id, 'id'\)"):
        refused(spark, numbers.withColumn("id", random()), *settings)


def test_ids_that_count_rows_in_an_order_that_differs_are_refused(spark, numbers):
    frame = numbers.repartition(4, random()).withColumn("id", F.monotonically_increasing_id())
    with pytest.raises(ShardChanged, match="monotonically_increasing_id"):
        refused(spark, frame, *regression("data.id=id"))


def test_ids_that_are_kept_are_trained_on(spark, numbers, tmp_path):
    spark.sparkContext.setCheckpointDir(str(tmp_path))
    frame = numbers.withColumn("id", random()).checkpoint()
    assert train(spark, configured(*regression("data.id=id", "train.steps=1")), frame).version == 1


def test_partitions_that_differ_at_every_reading_are_refused_in_place(spark, numbers):
    with pytest.raises(ShardChanged, match=r"64 rows .* were dealt; shards \d(, \d)* hold other rows"):
        refused(spark, numbers.repartition(4, random()), *regression("data.placement=in_place"))


def test_partitions_that_stay_are_trained_on_in_place(spark, numbers):
    settings = configured(*regression("data.placement=in_place", "train.steps=1"))
    with_cached = (cached := numbers.repartition(6, "y").cache()).where("true")
    for frame in (numbers.repartition(6, "x"), with_cached):
        assert train(spark, settings, frame).version == 1
    cached.unpersist()


def test_ids_of_time_do_not_depend_on_the_session_s_time_zone(spark, tmp_path):
    rows = [([float(i), 1.0], float(i % 5), datetime(2020, 1, 1, i % 24, i)) for i in range(48)]
    zone = spark.conf.get("spark.sql.session.timeZone")
    path, config = str(tmp_path / "rows"), configured(*regression("data.id=id", "train.steps=2"))
    try:
        spark.createDataFrame(rows, "x array<double>, y double, id timestamp").write.parquet(path)
        found = {undisturbed(path, config)}
        for name in ("UTC", "Asia/Tokyo"):
            spark.conf.set("spark.sql.session.timeZone", name)
            found.add(digests(train(spark, config, path))[0])
    finally:
        spark.conf.set("spark.sql.session.timeZone", zone)
    assert len(found) == 1


# Vectors of Spark ML


@pytest.fixture(scope="module")
def vectors(session_for):
    """Return 40 rows: dense and sparse vectors, 4 nulls, 2 too long, 1 NaN."""
    good = [Vectors.dense([i / 9, 1.0]) if i % 2 else Vectors.sparse(2, {1: i / 9}) for i in range(33)]
    bad = [*[None] * 4, Vectors.dense([1.0] * 3), Vectors.sparse(5, {4: 1.0}), Vectors.dense([math.nan, 1.0])]
    kinds = StructType([StructField("x", VectorUDT()), StructField("y", DoubleType())])
    rows = [(vector, 1.0) for vector in [*bad[:2], *good, *bad[2:]]]
    return session_for("local[2]").createDataFrame(rows, kinds)


def test_nulls_among_vectors_are_counted_and_skipped(spark, vectors):
    settings = regression("data.on_bad_row=skip", "data.max_bad_rows=7", "train.steps=1", "data.id=id")
    training = train(spark, configured(*settings), vectors.withColumn("id", F.monotonically_increasing_id()))
    assert (training.rows.rows, training.rows.bad.total()) == (33, 7)
    assert sorted(training.rows.bad.values()) == [1, 2, 4]


def test_nulls_among_vectors_are_refused_with_count_and_example(spark, vectors):
    with pytest.raises(BadRows) as caught:
        refused(spark, vectors, *regression())
    assert caught.value.exit_code == 2
    assert "7 of 40 rows cannot be trained on: 4 with null in 'x' (such as None, None, None)" in str(
        caught.value
    )
    assert "2 with a number of values other than 2 (most rows') in 'x' (such as 3, 5)" in str(caught.value)


# Frames that Spark itself cannot read


def test_columns_of_one_name_are_refused(spark, numbers):
    for name in ("x", "X"):
        frame = numbers.select("*", F.col("x").alias(name))
        with pytest.raises(DataError, match=rf"the data has 2 columns of the name 'x': 'x', '{name}'"):
            refused(spark, frame, *regression())
    others = numbers.select("*", F.lit(0).alias("z"), F.lit(1).alias("Z"))  # nobody reads them
    assert first_rows(others, ["x", "y"], 1)[1].num_rows == 1


def test_vectors_of_one_name_are_refused(spark, vectors):
    with pytest.raises(DataError, match="the data has 2 columns of the name 'x'"):
        refused(spark, vectors.select("*", F.col("x").alias("x")), *regression())


def test_a_stream_is_refused(spark):
    stream = spark.readStream.format("rate").load()
    with pytest.raises(DataError, match="the DataFrame is a stream"):
        refused(spark, stream, "data.features=value", "data.label=value2")


@pytest.mark.parametrize(
    ("column", "what"),
    [
        ("array(1 / (y - 4), 1.0D)", r"\[DIVIDE_BY_ZERO"),
        ("array(cast(concat('a', y) as double), 1.0D)", r"\[CAST_INVALID_INPUT"),
        ("from_json(concat('[', y), 'array<double>', map('mode', 'FAILFAST'))", r"\[MALFORMED_RECORD"),
    ],
)
def test_a_column_that_cannot_be_computed_is_the_data_s_fault(spark, numbers, column, what):
    ansi = spark.conf.get("spark.sql.ansi.enabled")
    spark.conf.set("spark.sql.ansi.enabled", "true")
    try:
        with pytest.raises(DataError, match=f"a column of the DataFrame cannot be computed: {what}"):
            refused(spark, numbers.withColumn("x", F.expr(column)), *regression())
    finally:
        spark.conf.set("spark.sql.ansi.enabled", ansi)


# Folders of Parquet


def lay(folder, **tables):
    for name, columns in tables.items():
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return str(folder)


def test_a_table_with_a_log_is_refused_as_rows_and_as_test_rows(spark, tmp_path, small):
    path = lay(tmp_path / "table", a={"x": [1.0]}, b={"x": [2.0]})
    (tmp_path / "table" / "_delta_log").mkdir()
    for rows, test in ((path, small), (small, f"{path}/a.parquet"), (small, f"{path}/*.parquet")):
        with pytest.raises(DataError, match=rf'is of a Delta table.*format\("delta"\)\.load\("{path}"\)'):
            train(spark, configured(), rows, test, observers=[NoStep()])


def test_a_frame_that_reads_a_table_as_plain_parquet_is_warned_of(spark, tmp_path, caplog):
    path = lay(tmp_path / "table", a={"x": [[1.0, 2.0]] * 8, "y": [1.0] * 8})
    first_rows(spark.read.parquet(path), ["x"], 1)
    assert "plain Parquet" not in caplog.text
    (tmp_path / "table" / ".hoodie").mkdir()
    (tmp_path / "table" / ".hoodie" / "hoodie.properties").touch()
    first_rows(spark.read.parquet(path).where("y > 0"), ["x"], 1)
    assert "reads plain Parquet, but" in caplog.text
    assert "is of a Hudi table" in caplog.text


def test_files_of_other_types_are_refused(spark, tmp_path):
    wide = lay(
        tmp_path / "wide", a={"x": [[1.0]], "y": pa.array([1.5])}, b={"x": [[1.0]], "y": pa.array([3])}
    )
    with pytest.raises(DataError, match=r"the Parquet files have columns of other types.*column:? \[y\]"):
        refused(spark, spark.read.parquet(wide), *regression("model.in_features=1"))


def test_integers_are_not_cut_down_to_the_bytes_of_another_file(spark, tmp_path):
    bytes_, integers = pa.array([1], pa.int8()), pa.array([300], pa.int32())
    path = lay(tmp_path / "rows", a={"x": bytes_, "y": bytes_}, b={"x": integers, "y": integers})
    assert sorted(read_parquet(spark, path).collect()) == [(1, 1), (300, 300)]
