"""Tables with the predictions of a saved model, written by executors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import did_you_mean
from sparksgd.runs.model import SavedModel
from sparksgd.spark.cluster.arrow_batches import small_batches
from sparksgd.spark.cluster.jobs import spark_job
from sparksgd.spark.cluster.placement import is_local
from sparksgd.spark.frame_rows import quoted, read_parquet
from sparksgd.spark.prediction import OnBadRow, predict
from sparksgd.storage import has_scheme

__all__ = ["PredictionJob", "TableIfExists", "refuse_scattered", "write_predictions"]

TableIfExists = Literal["fail", "overwrite", "append"]
_MODES = {"fail": "errorifexists", "overwrite": "overwrite", "append": "append"}


@dataclass(frozen=True, kw_only=True)
class PredictionJob:
    """What to predict, and where the predictions go."""

    data: str
    """Parquet, a path or URI; or a table of Spark's catalogue, if `data_is_table`."""

    out: str
    """The same, for the rows with their predictions."""

    data_is_table: bool
    """Whether `data` names a table."""

    out_is_table: bool
    """Whether `out` names a table."""

    columns: tuple[str, ...] | None
    """The columns of the data that are written; None: all."""

    with_raw: bool
    """Whether logarithms of probabilities are written, too."""

    on_bad_row: OnBadRow
    """See `predict`."""

    if_exists: TableIfExists
    """What is done if the output exists."""


def refuse_scattered(session: SparkSession, asked: PredictionJob) -> None:
    """Refuse a folder of this machine where executors on others would write their own of that name."""
    if asked.out_is_table or has_scheme(asked.out) or is_local(session.sparkContext):
        return
    raise ConfigError(
        f"--out is {asked.out}, of the driver's machine, but executors write the rows: name a place that all "
        f"of them reach, like hdfs:///predictions/{Path(asked.out).name} (or file:/... for a disk that all "
        f"machines mount)"
    )


def write_predictions(session: SparkSession, model: SavedModel, asked: PredictionJob) -> int:
    """Write the predictions; return how many rows they are."""
    frame = _frame(session, asked)
    predicted = predict(
        frame, model, raw="rawPrediction" if asked.with_raw else None, on_bad_row=asked.on_bad_row
    )
    if asked.columns is not None:
        missing = [name for name in asked.columns if name not in frame.columns]
        if missing:
            near = did_you_mean(missing[0], frame.columns)
            raise DataError(f"{asked.data} has no column {missing[0]!r}, which --columns names{near}")
        new = [name for name in predicted.columns if name not in frame.columns]
        predicted = predicted.select(*map(quoted, [*asked.columns, *new]))
    counted = Observation()
    writer = predicted.observe(counted, F.count(F.lit(1)).alias("rows")).write.mode(_MODES[asked.if_exists])
    with spark_job(session.sparkContext, "predicting"), small_batches(session, model.schema):
        try:
            if asked.out_is_table:
                writer.saveAsTable(asked.out)
            else:
                writer.parquet(asked.out if has_scheme(asked.out) else f"file:{Path(asked.out).absolute()}")
        except AnalysisException as error:
            option = "--out-table" if asked.out_is_table else "--out"
            move = ". To replace what is there: --if-exists overwrite" if asked.if_exists == "fail" else ""
            raise ConfigError(
                f"{option} is {asked.out}, which cannot be written: {str(error).splitlines()[0]}{move}"
            ) from error
    return int(counted.get["rows"])


def _frame(session: SparkSession, asked: PredictionJob) -> DataFrame:
    if not asked.data_is_table:
        return read_parquet(session, asked.data)
    try:
        return session.table(asked.data)
    except AnalysisException as error:
        raise DataError(f"cannot read the table {asked.data}: {str(error).splitlines()[0]}") from error
