"""Predictions of a saved model as columns: the values of plain torch, their types, rows that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from predicted_modules import Counted, Counting, TwoInputs, Whole  # tests/modules
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F
from torch import nn

import sparksgd
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import BadRows, ConfigError, DataError, ModelError, UserCodeError
from sparksgd.models.losses import binary_cross_entropy, cross_entropy, squared_error
from sparksgd.runs.model import SavedModel
from sparksgd.spark.cluster.jobs import spark_job

pytestmark = pytest.mark.session("local[2]")

WIDTH = 3
ROWS = 700
KINDS = {cross_entropy: "classes", binary_cross_entropy: "binary", squared_error: "numbers"}


def model_of(module, loss=cross_entropy, classes=3, features=(("x", "float32", WIDTH),)):
    schema = RowSchema(
        features=tuple(Feature(name=name, dtype=dtype, length=length) for name, dtype, length in features),
        label="y", label_dtype="int64", classes=classes,
    )  # fmt: skip
    return SavedModel(module=module.eval(), schema=schema, loss=loss, kind=KINDS.get(loss))


def made(kind, *arguments):
    torch.manual_seed(3)
    return kind(*arguments)


@pytest.fixture(scope="module")
def values():
    return np.random.default_rng(5).normal(size=(ROWS, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def rows(session_for, values):
    spark = session_for("local[2]")
    return spark.createDataFrame(
        [(number, row.tolist()) for number, row in enumerate(values)], "id long, x array<double>"
    ).coalesce(1)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts(values, size):
    return [torch.from_numpy(values[start : start + size]) for start in range(0, len(values), size)]


def test_a_batch_norm_without_statistics_gets_no_single_row(rows):
    module = nn.Sequential(nn.BatchNorm1d(WIDTH, track_running_stats=False), nn.Linear(WIDTH, 3))
    assert sparksgd.predict(rows, model_of(module), rows_per_forward=ROWS - 1).count() == ROWS


@pytest.mark.parametrize("size", [512, 100])
def test_probabilities_are_those_of_plain_torch_to_the_bit(rows, values, one_thread, size):
    module = made(nn.Linear, WIDTH, 3)
    found = sparksgd.predict(rows, model_of(module), raw="raw", rows_per_forward=size).orderBy("id").collect()
    with torch.no_grad():
        logits = torch.cat([module(part) for part in parts(values, size)])
    assert np.array([row.probability for row in found], np.float32).tobytes() == (
        torch.softmax(logits, 1).numpy().tobytes()
    )
    assert np.array([row.raw for row in found], np.float32).tobytes() == (
        torch.log_softmax(logits, 1).numpy().tobytes()
    )
    assert [row.prediction for row in found] == logits.argmax(1).double().tolist()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_logit_gives_the_probabilities_of_two_classes(rows, values, one_thread, shape):
    module = nn.Sequential(made(nn.Linear, WIDTH, 1), nn.Flatten(0) if shape == () else nn.Identity())
    found = (
        sparksgd.predict(rows, model_of(module, binary_cross_entropy, 2), raw="raw").orderBy("id").collect()
    )
    with torch.no_grad():
        logits = [module(part).reshape(-1) for part in parts(values, 512)]
        raw = [torch.stack([-part, part], 1) for part in logits]
        # Of the same forwards: the bits of a sigmoid depend on where in the tensor its number stands.
        probabilities = torch.cat([torch.sigmoid(part) for part in raw])
    assert [row.raw for row in found] == torch.cat(raw).tolist()
    assert [row.probability for row in found] == probabilities.tolist()
    assert [row.prediction for row in found] == (torch.cat(logits) > 0).double().tolist()


def test_a_number_and_values_of_an_own_loss_are_columns_of_their_types(rows, values, one_thread):
    module = made(nn.Linear, WIDTH, 1)
    numbers = sparksgd.predict(rows, model_of(module, squared_error, None))
    assert numbers.schema["prediction"].dataType.simpleString() == "double"
    several = sparksgd.predict(rows, model_of(made(nn.Linear, WIDTH, 2), lambda output, label: output[:, 0]))
    assert several.schema["prediction"].dataType.simpleString() == "array<float>"
    with torch.no_grad():
        expected = torch.cat([module(part) for part in parts(values, 512)]).reshape(-1)
    assert [row.prediction for row in numbers.orderBy("id").collect()] == expected.double().tolist()
    assert len(several.first().prediction) == 2


def test_vectors_of_spark_ml_give_the_predictions_of_lists(rows):
    model = model_of(made(nn.Linear, WIDTH, 3))
    vectors = rows.withColumn("x", array_to_vector("x"))
    as_vectors = sparksgd.predict(vectors, model).select("id", "prediction", "probability").collect()
    assert as_vectors == sparksgd.predict(rows, model).select("id", "prediction", "probability").collect()


def test_several_columns_of_all_types_reach_forward_by_name(spark, one_thread):
    images = [bytes([number, 1, 2, 250]) for number in range(9)]
    frame = spark.createDataFrame(
        [(image, number % 5, number / 4) for number, image in enumerate(images)],
        "image binary, code byte, price double",
    ).withColumn("price", F.col("price").cast("decimal(10,4)"))
    frame = frame.select("*", F.lit("kept").alias("other.column"))
    module = made(TwoInputs)
    features = (("image", "uint8", 4), ("code", "int64", None), ("price", "float32", None))
    found = sparksgd.predict(frame.coalesce(1), model_of(module, squared_error, None, features))
    with torch.no_grad():
        expected = module(
            torch.tensor([list(image) for image in images], dtype=torch.uint8),
            torch.arange(9) % 5,
            torch.arange(9, dtype=torch.float32) / 4,
        )
    assert [row.prediction for row in found.collect()] == expected.reshape(-1).double().tolist()
    assert found.columns == ["image", "code", "price", "other.column", "prediction"]


def test_each_forward_starts_as_loaded_and_may_return_memory_of_the_module(rows, values, one_thread):
    model = model_of(Counting(), squared_error, None)
    for _ in range(2):
        found = sparksgd.predict(rows, model, rows_per_forward=100).orderBy("id").collect()
        assert [row.prediction for row in found] == (values[:, 0].astype(float) + 2).tolist()


BAD = [(0, [1.0, 2.0, 3.0]), (1, None), (2, [1.0]), (3, [1.0, None, 2.0]), (4, [1.0, float("nan"), 0.0])]


def test_bad_rows_end_the_job_are_left_out_or_keep_null(spark):
    model, frame = model_of(made(nn.Linear, WIDTH, 3)), spark.createDataFrame(BAD, "id long, x array<float>")
    kept = sparksgd.predict(frame, model, on_bad_row="keep").orderBy("id").collect()
    assert [row.prediction is None for row in kept] == [False, True, True, True, True]
    assert [row.probability is None for row in kept] == [False, True, True, True, True]
    assert [row.id for row in sparksgd.predict(frame, model, on_bad_row="skip").collect()] == [0]
    assert sparksgd.predict(frame.where("id > 0"), model, on_bad_row="skip").count() == 0
    with (
        pytest.raises(BadRows, match=r"4 of 5 rows cannot be predicted, of one batch: 2 .*on_bad_row"),
        spark_job(spark.sparkContext, "predicting"),
    ):
        sparksgd.predict(frame.coalesce(1), model).collect()


def test_large_integers_beside_a_null_stay_exact(spark):
    frame = spark.createDataFrame([(2**53 + 1,), (None,)], "code long")
    module = nn.Module()
    module.forward = lambda code: (code - 2**53).float()
    model = model_of(module, squared_error, None, (("code", "int64", None),))
    found = sparksgd.predict(frame.coalesce(1), model, on_bad_row="keep").collect()
    assert [row.prediction for row in found] == [1.0, None]


def test_a_prediction_that_is_nan_is_no_bad_row(spark):
    module = nn.Module()
    module.forward = lambda x: x[:, 0].log()
    frame = spark.createDataFrame([([-1.0],), ([1.0],)], "x array<float>")
    model = model_of(module, squared_error, None, (("x", "float32", 1),))
    for on_bad_row in ("error", "skip", "keep"):
        found = [row.prediction for row in sparksgd.predict(frame, model, on_bad_row=on_bad_row).collect()]
        assert [str(value) for value in found] == ["nan", "0.0"]


def test_a_nan_among_probabilities_or_outputs_is_a_value(spark):
    module = nn.Module()
    module.forward = lambda x: torch.stack([x[:, 0].log(), x[:, 0]], 1)
    frame = spark.createDataFrame([(0, [-1.0]), (1, [1.0])], "id long, x array<float>").coalesce(1)
    for loss, column in ((cross_entropy, "probability"), (lambda output, label: output[:, 0], "prediction")):
        model = model_of(module, loss, 2, (("x", "float32", 1),))
        found = [row[column] for row in sparksgd.predict(frame, model).orderBy("id").collect()]
        assert np.isnan(found[0]).tolist() == ([True, True] if loss is cross_entropy else [True, False])
        assert not np.isnan(found[1]).any()


def test_the_module_is_loaded_once_in_each_python_worker(rows):
    model = model_of(Counted(), squared_error, None)
    found = sparksgd.predict(rows.repartition(8), model).select("prediction").distinct().collect()
    assert [row.prediction for row in found] == [1.0]


def test_nothing_is_computed_before_the_rows_are_read_and_only_features_enter_python(spark, rows):
    def fails(_):
        raise AssertionError

    broken = rows.withColumn("x", F.udf(fails, "array<double>")("x"))
    predicted = sparksgd.predict(broken, model_of(made(nn.Linear, WIDTH, 3)))
    secret = rows.withColumn("secret", F.col("id") + 1)
    plan = sparksgd.predict(secret, model_of(made(nn.Linear, WIDTH, 3)))
    text = plan._jdf.queryExecution().executedPlan().toString()
    udf = next(line for line in text.splitlines() if "ArrowEvalPython" in line)
    assert "secret" not in udf.split("]")[0]
    assert predicted.columns == ["id", "x", "prediction", "probability"]


@pytest.mark.soak
def test_a_stream_is_predicted(spark, tmp_path):
    spark.createDataFrame(BAD[:1], "id long, x array<float>").write.parquet(str(tmp_path / "in"))
    stream = spark.readStream.schema("id long, x array<float>").parquet(str(tmp_path / "in"))
    predicted = sparksgd.predict(stream, model_of(made(nn.Linear, WIDTH, 3)))
    query = (
        predicted.writeStream.format("memory")
        .queryName("predicted")
        .option("checkpointLocation", str(tmp_path / "log"))
        .trigger(availableNow=True)
        .start()
    )
    assert query.awaitTermination(120)
    assert spark.table("predicted").count() == 1


def test_what_cannot_be_predicted_is_refused_at_once(rows):
    model = model_of(made(nn.Linear, WIDTH, 3))
    with pytest.raises(DataError, match=r"no column 'x' \(valid: z\)"):
        sparksgd.predict(rows.withColumnRenamed("x", "z").drop("id"), model)
    with pytest.raises(DataError, match="column 'x' is int64 in this data, but float32 in the training"):
        sparksgd.predict(rows.withColumn("x", F.lit(3)), model)
    with pytest.raises(ConfigError, match="the data has a column 'prediction'"):
        sparksgd.predict(rows.withColumn("prediction", F.lit(3)), model)
    with pytest.raises(ConfigError, match="the data has a column 'Probability'"):  # Spark would replace it
        sparksgd.predict(rows.withColumn("Probability", F.lit(3)), model)
    with pytest.raises(ConfigError, match="two new columns are named 'p'"):
        sparksgd.predict(rows, model, prediction="p", probability="p")
    with pytest.raises(ConfigError, match="on_bad_row is 'ignore', but must be one of error, skip, keep"):
        sparksgd.predict(rows, model, on_bad_row="ignore")
    with pytest.raises(ConfigError, match="prediction is 0, but must be the name of a column"):
        sparksgd.predict(rows, model, prediction=0)
    with pytest.raises(ConfigError, match="rows_per_forward is 0"):
        sparksgd.predict(rows, model, rows_per_forward=0)
    with pytest.raises(ConfigError, match="raw is 'r', but the model's loss is not one of classes"):
        sparksgd.predict(rows, model_of(made(nn.Linear, WIDTH, 1), squared_error), raw="r")
    with pytest.raises(ConfigError, match="model is of type torch"):
        sparksgd.predict(rows, made(nn.Linear, 2, 3))


def test_a_module_that_raises_or_gives_other_shapes_is_named(spark, rows):
    for module, loss, kind, says in (
        (made(nn.Linear, 9, 3), cross_entropy, UserCodeError, "the module or its loss raised RuntimeError"),
        (made(nn.Linear, WIDTH, 3), squared_error, ModelError, r"\(512, 3\) for 512 rows, .* one number"),
        (made(nn.Linear, WIDTH, 1), cross_entropy, ModelError, "must give C > 1 logits for each row"),
        (Whole(), cross_entropy, ModelError, r"gives torch\.int64, but must give floating-point numbers"),
    ):
        with pytest.raises(kind, match=says), spark_job(spark.sparkContext, "predicting"):
            sparksgd.predict(rows, model_of(module, loss)).collect()
