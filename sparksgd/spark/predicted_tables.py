"""Tables with the predictions of a saved model, written by executors."""

from __future__ import annotations

import re
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
_EXISTS = re.compile(r"\[(PATH|TABLE\w*)_ALREADY_EXISTS|already exists")
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
    """Write the predictions; return how many rows they are.

    Raises:
        ConfigError: the output holds the data, or exists.
        DataError: the data cannot be read, or lack a column.
    """
    _refuse_overlap(asked)
    frame = _frame(session, asked)
    kept = list(dict.fromkeys(frame.columns if asked.columns is None else asked.columns))
    if missing := [name for name in kept if name not in frame.columns]:
        near = did_you_mean(missing[0], frame.columns)
        raise DataError(f"{asked.data} has no column {missing[0]!r}, which --columns names{near}")
    features = [feature.name for feature in model.schema.features]
    read = [name for name in frame.columns if name in kept or name in features]
    frame = frame.select(*map(quoted, read))
    raw = "rawPrediction" if asked.with_raw else None
    predicted = predict(frame, model, raw=raw, on_bad_row=asked.on_bad_row)
    new = [name for name in predicted.columns if name not in read]
    predicted = predicted.select(*map(quoted, [*kept, *new]))
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
            exists = asked.if_exists == "fail" and _EXISTS.search(str(error))
            move = ". To replace what is there: --if-exists overwrite" if exists else ""
            raise ConfigError(
                f"{option} is {asked.out}, which cannot be written: {str(error).splitlines()[0]}{move}"
            ) from error
    return int(counted.get["rows"])


def _refuse_overlap(asked: PredictionJob) -> None:
    """Refuse an output that is the data, or holds or is in it: Spark would remove what it has to read."""
    if asked.data_is_table or asked.out_is_table:
        return
    data, out = (_parts(path) for path in (asked.data, asked.out))
    if data[: len(out)] == out or out[: len(data)] == data:
        raise ConfigError(
            f"--out is {asked.out}, which holds or is in --data, {asked.data}: name another folder"
        )


def _parts(path: str) -> tuple[str, ...]:
    """Return a path's parts, after links; of a pattern, those before it."""
    plain = path.removeprefix("file://").removeprefix("file:") if path.startswith("file:") else path
    if not has_scheme(plain):
        plain = str(Path(re.split(r"[*?\[{]", plain)[0]).resolve())
    return tuple(part for part in plain.split("/") if part)


def _frame(session: SparkSession, asked: PredictionJob) -> DataFrame:
    if not asked.data_is_table:
        return read_parquet(session, asked.data)
    try:
        return session.table(asked.data)
    except AnalysisException as error:
        raise DataError(f"cannot read the table {asked.data}: {str(error).splitlines()[0]}") from error
