"""Predictions of a trained module, as columns of a DataFrame.

    frame ── features, cleaned of nulls (SQL) ── module (a pandas UDF over Arrow batches) ── columns (SQL)

Only the features enter Python.  Nothing is computed before the frame is read.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import pyarrow as pa
from pyspark import Broadcast
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    BooleanType,
    DataType,
    DateType,
    DecimalType,
    DoubleType,
    FloatType,
    MapType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from sparksgd.config import TrainConfig
from sparksgd.engines.forward import EVALUATION_ROWS
from sparksgd.errors import ClusterError, ConfigError
from sparksgd.imports.same_code import Pickled
from sparksgd.models.losses import LossKind
from sparksgd.models.outputs import Output
from sparksgd.runs.model import SavedModel
from sparksgd.spark.cluster.cluster import is_connect
from sparksgd.spark.cluster.users_modules import with_code
from sparksgd.spark.frame_rows import (
    array_of_vector,
    arrow_type,
    namesakes,
    quoted,
    read_parquet,
    refuse_namesakes,
)
from sparksgd.spark.given_rows import described_value, frame_or_path
from sparksgd.spark.session import start_session
from sparksgd.spark.tasks import predict_tasks
from sparksgd.spark.tasks.predict_tasks import (
    COMPLETE,
    GOOD,
    HAS_NAN,
    PredictionPlan,
    ShippedFile,
    ShippedPlan,
)

__all__ = ["NewColumns", "OnBadRow", "predict", "with_predictions"]

OnBadRow = Literal["error", "skip", "keep"]
"""What may be done with rows that cannot be predicted: end with an error, leave out, give nulls."""


@dataclass(frozen=True, kw_only=True)
class NewColumns:
    """Which columns are added, and of which type."""

    kind: LossKind | None
    """What the module's output is."""

    names: Mapping[str, str]
    """The new columns, by what they hold, see `predict_tasks.columns_of`; others are left out."""

    outputs: tuple[Output, ...] = ()
    """See `PredictionPlan`."""

    as_vectors: bool = False
    """Whether logits, probabilities and outputs are vectors of Spark ML; else they are arrays."""

    thresholds: tuple[float, ...] | None = None
    """See `PredictionPlan`."""


def predict(
    rows: DataFrame | str | Path,
    model: SavedModel,
    *,
    prediction: str = "prediction",
    probability: str | None = "probability",
    raw: str | None = None,
    on_bad_row: OnBadRow = "error",
    rows_per_forward: int = EVALUATION_ROWS,
) -> DataFrame:
    """Return rows with the predictions of a model as new columns; they are computed where the rows are read.

    The predictions of a row are those of plain torch on one thread, to the bit, for the same rows in one
    forward: up to `rows_per_forward` rows of an Arrow batch of Spark
    (spark.sql.execution.arrow.maxRecordsPerBatch, 10,000 rows by default).  As in the training, -0.0 counts
    as 0.0.  Each forward starts from the module as it was loaded, whatever another one changed.

    Args:
        rows: a DataFrame, also a stream, or of Spark Connect, or a path or URI of Parquet, with the features
            that the model was trained on; a label is not needed. A path is read in the active session; if
            there is none, one is started, and left running.
        model: as `load_model` returns it.
        prediction: the column of predictions: the class, as a double, if the loss is of classes, as
            cross_entropy and binary_cross_entropy are; a double if it is of numbers; an array of doubles, 0
            or 1, if it is of several labels; what the module gives, as an array of floats, for a loss of
            your own without loss.kind.
        probability: the column of the probabilities of classes or labels, an array of floats; None leaves it
            out.
        raw: the column of the logarithms of the classes' probabilities, for binary_cross_entropy of (-z, z)
            for the logit z, of several labels of the logits; None leaves it out.
        on_bad_row: what is done with rows that are null, misshapen or not finite: "error" ends the job that
            reads them, "skip" leaves them out, "keep" gives them null as prediction.
        rows_per_forward: the most rows that the module computes at once.

    Raises:
        ConfigError: an argument is of another type, or names a column that exists.
        DataError: a feature is missing, or of another type than in the training.
    """
    given = frame_or_path("rows", rows, takes_connect=True)
    if not isinstance(model, SavedModel):
        raise ConfigError(
            f"model is {described_value(model)}, but must be what sparksgd.load_model(folder) returns"
        )
    if on_bad_row not in get_args(OnBadRow):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}, but must be one of {', '.join(get_args(OnBadRow))}")
    if not isinstance(prediction, str) or not prediction:
        raise ConfigError(f"prediction is {prediction!r}, but must be the name of a column")
    if raw is not None and "raw" not in predict_tasks.columns_of(model.kind):
        raise ConfigError(f"raw is {raw!r}, but the model's loss is not one of classes: leave raw out")
    if told := ", ".join(output.name for output in model.outputs):
        raise ConfigError(
            f"the model's module gives outputs by names ({told}), but predict adds one column of "
            f"predictions: use sparksgd.ml.TorchModel, whose transform adds a column for each"
        )
    if isinstance(given, str):
        given = read_parquet(start_session("sparksgd", TrainConfig()), given)
    wanted = {"prediction": prediction, "probability": probability, "raw": raw}
    names = {
        what: name for what, name in wanted.items() if name and what in predict_tasks.columns_of(model.kind)
    }
    return with_predictions(
        given,
        model,
        NewColumns(kind=model.kind, names=names),
        on_bad_row=on_bad_row,
        rows_per_forward=rows_per_forward,
        advice='mend the data, or set on_bad_row to "skip" or "keep"',
    )


def with_predictions(
    frame: DataFrame,
    model: SavedModel,
    new: NewColumns,
    *,
    on_bad_row: OnBadRow,
    rows_per_forward: int,
    advice: str,
) -> DataFrame:
    """Return a frame with the predictions of a model as new columns.

    Args:
        frame: has the features.
        model: predicts.
        new: the columns.
        on_bad_row: see `predict`.
        rows_per_forward: the most rows of one forward.
        advice: what the error about bad rows says to do.

    Raises:
        ConfigError: a number of rows or the name of a column.
        DataError: a feature is missing, or of another type.
    """
    if type(rows_per_forward) is not int or rows_per_forward < 1:
        raise ConfigError(f"rows_per_forward is {rows_per_forward!r}, but must be a whole number from 1")
    _refuse_taken(frame, new.names)
    features = _features(frame, model)
    plan = PredictionPlan(
        module=model.module,
        schema=model.schema,
        columns=_arrow_columns(frame.select(*features), model),
        kind=new.kind,
        outputs=new.outputs,
        thresholds=new.thresholds,
        rows_per_forward=rows_per_forward,
        bad_row_advice=advice if on_bad_row == "error" else None,
    )
    predicted = _udf(frame.sparkSession, plan, is_filtered=on_bad_row == "skip")
    result = f"predicted {uuid.uuid4().hex}"
    scored = _as_rows(frame).withColumn(result, predicted(F.struct(*features)))
    if on_bad_row == "skip":
        scored = scored.where(F.col(result)[GOOD])
    columns = {name: _new_column(F.col(result), what, new) for what, name in new.names.items()}
    return scored.withColumns(columns).drop(result)


def _as_rows(frame: DataFrame) -> DataFrame:
    """Return a frame that Spark does not give to the function in columns, where some are no types of Arrow.

    Spark 4.3 does so with Parquet, and then fails at vectors (arrow.pythonUDF.columnarInput.enabled).
    """
    for field in frame.schema.fields:
        if not _is_of_arrow(field.dataType):
            return frame.where(F.spark_partition_id() >= 0)  # true of each row, which Spark does not know
    return frame


_OF_ARROW = (BinaryType, BooleanType, DateType, NumericType, StringType, TimestampNTZType, TimestampType)


def _is_of_arrow(kind: DataType) -> bool:
    """Return whether Spark can write a type as Arrow for certain."""
    if isinstance(kind, ArrayType):
        return _is_of_arrow(kind.elementType)
    if isinstance(kind, MapType):
        return _is_of_arrow(kind.keyType) and _is_of_arrow(kind.valueType)
    if isinstance(kind, StructType):
        return all(_is_of_arrow(field.dataType) for field in kind.fields)
    return isinstance(kind, _OF_ARROW)


def _refuse_taken(frame: DataFrame, names: Mapping[str, str]) -> None:
    """Refuse a new column that the frame has, or that stands twice."""
    seen: set[str] = set()
    for what, name in names.items():
        if not isinstance(name, str):
            raise ConfigError(f"{what} is {name!r}, but must be the name of a column")
        if taken := namesakes(frame, name):
            raise ConfigError(f"the data has a column {taken[0]!r}: name the new one otherwise, or drop it")
        if name.lower() in seen:
            raise ConfigError(f"two new columns are named {name!r}: give each a name of its own")
        seen.add(name.lower())


def _features(frame: DataFrame, model: SavedModel) -> list[Column]:
    """Return the features under their numbers, a placeholder for each null, and COMPLETE: false for its row.

    In pandas, a null among integers would make floats of all of them.
    """
    names = [feature.name for feature in model.schema.features]
    refuse_namesakes(frame, names)
    types = {field.name: field.dataType for field in frame.schema.fields}
    model.schema.check_features(_as_arrow(names, types), "this data")
    values, complete = [], []
    for number, name in enumerate(names):
        column, kind = _plain(F.col(quoted(name)), types[name])
        has_value = column.isNotNull()
        if isinstance(kind, ArrayType) and kind.containsNull:
            has_value = has_value & ~F.exists(column, lambda value: value.isNull())
        values.append(F.when(has_value, column).otherwise(_empty(kind)).alias(str(number)))
        complete.append(has_value)
    return [*values, reduce(and_, complete).alias(COMPLETE)]


def _as_arrow(names: list[str], types: Mapping[str, DataType]) -> pa.Schema:
    """Return the columns as Arrow has them; vectors are lists of floats, and those of other names null."""

    def kind(name: str) -> pa.DataType:
        if name not in names:
            return pa.null()
        vector = isinstance(types[name], VectorUDT)
        return pa.list_(pa.float32()) if vector else arrow_type(name, types[name])

    return pa.schema([(name, kind(name)) for name in types])


def _plain(column: Column, kind: DataType) -> tuple[Column, DataType]:
    """Return a column, and its type, without vectors and decimals, of which pandas makes objects."""
    if isinstance(kind, VectorUDT):
        return array_of_vector(column), ArrayType(FloatType(), containsNull=False)
    if isinstance(kind, DecimalType):
        return column.cast(DoubleType()), DoubleType()
    if isinstance(kind, ArrayType) and isinstance(kind.elementType, DecimalType):
        doubles = ArrayType(DoubleType(), kind.containsNull)
        return column.cast(doubles), doubles
    return column, kind


def _empty(kind: DataType) -> Column:
    """Return what stands for a null."""
    if isinstance(kind, ArrayType):
        return F.array().cast(kind)
    return F.lit(bytearray()) if kind.typeName() == "binary" else F.lit(0).cast(kind)


def _arrow_columns(features: DataFrame, model: SavedModel) -> pa.Schema:
    kinds = [field.dataType for field in features.schema.fields if field.name != COMPLETE]
    return pa.schema(
        [(f.name, arrow_type(f.name, kind)) for f, kind in zip(model.schema.features, kinds, strict=True)]
    )


_shipped: OrderedDict[tuple[str, str], Broadcast[ShippedPlan] | ShippedFile] = OrderedDict()
"""The plans that were shipped last, by session and digest: each leaves a file until the session ends."""
_MOST_SHIPPED = 4


def _ship(session: SparkSession, plan: PredictionPlan) -> Broadcast[ShippedPlan] | ShippedFile:
    """Return a plan as the executors get it, once for all uses of an equal one."""
    context = None if is_connect(session) else session.sparkContext
    pickled = with_code(plan, {"": plan.module}, context)
    digest = hashlib.sha256(pickled.data + repr(sorted(pickled.code.items())).encode()).hexdigest()
    of_session: Any = session  # of Connect, it has an id instead
    key = of_session.session_id if context is None else context.applicationId, digest
    shipped = _shipped.pop(key, None)
    if shipped is None:
        shipped = _as_file(session, pickled) if context is None else context.broadcast(ShippedPlan(pickled))
    _shipped[key] = shipped
    while len(_shipped) > _MOST_SHIPPED:  # not destroyed: rows may still be read by it
        _shipped.popitem(last=False)
    return shipped


def _as_file(session: Any, pickled: Pickled) -> ShippedFile:
    """Bring a plan to a server of Spark Connect, which has no broadcasts, as a file."""
    data = pickle.dumps(pickled)
    shipped = ShippedFile(hashlib.sha256(data).hexdigest())
    with tempfile.TemporaryDirectory(prefix="sparksgd-") as folder:
        file = Path(folder) / shipped.name
        file.write_bytes(data)
        try:
            session.addArtifacts(str(file), file=True)
        except Exception as error:
            raise ClusterError(
                f"the server of this Spark Connect session does not take the model, {len(data):,} bytes, as "
                f"a file: {error}"
            ) from error
    return shipped


def _udf(session: SparkSession, plan: PredictionPlan, *, is_filtered: bool) -> Any:
    """Return the user-defined function that runs a plan.

    Args:
        session: where it runs.
        plan: shipped to each executor once.
        is_filtered: whether the result decides which rows stay. Then it is marked nondeterministic: Spark
            would compute a deterministic function once for the filter, and once for the columns.
    """
    shipped = _ship(session, plan)

    def predicted(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        return predict_tasks.predict(shipped, frames)

    make_udf: Any = pandas_udf  # its types leave out frames
    function = make_udf(predicted, _result(plan))
    return function.asNondeterministic() if is_filtered else function


def _result(plan: PredictionPlan) -> str:
    """Return the type of the function's result, as SQL names it."""
    fields = {GOOD: "boolean", HAS_NAN: "boolean", **predict_tasks.columns_of(plan.kind, plan.outputs)}
    return f"struct<{', '.join(f'`{name}`: {of}' for name, of in fields.items())}>"


def _new_column(result: Column, what: str, new: NewColumns) -> Column:
    """Return one column of the function's result, in the type that was asked for."""
    column, nan = result[what], F.lit(float("nan"))
    kind = predict_tasks.columns_of(new.kind, new.outputs)[what]
    if kind == "double":
        return F.when(result[GOOD], F.coalesce(column, nan))
    number = kind.removeprefix("array<").removesuffix(">")
    whole = F.transform(column, lambda value: F.coalesce(value, nan.cast(number)))
    column = F.when(result[HAS_NAN], whole).otherwise(column)
    is_vector = new.as_vectors and what != "prediction"
    return F.when(column.isNotNull(), array_to_vector(column)) if is_vector else column
