"""Evaluate a trained module on the rows of a DataFrame, without a training."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pyspark.sql import DataFrame, SparkSession

from sparksgd.config import TrainConfig
from sparksgd.data.row_report import RowReport
from sparksgd.errors import ConfigError, DataError, SparkSGDError
from sparksgd.imports import out_of_memory_told
from sparksgd.runs.model import SavedModel
from sparksgd.spark.cluster.arrow_batches import small_batches
from sparksgd.spark.cluster.cluster import job_on
from sparksgd.spark.cluster.jobs import spark_job
from sparksgd.spark.cluster.users_modules import with_code
from sparksgd.spark.frame_rows import first_rows, read_parquet, selected, without_vectors
from sparksgd.spark.given_rows import described_value, frame_or_path
from sparksgd.spark.session import start_session
from sparksgd.spark.tasks import score_tasks

__all__ = ["Scores", "evaluate", "evaluate_parquet"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The results of a module on some rows.

    Legend: C classes, L labels of a row.
    """

    rows: int
    """Rows that were read."""

    loss: float
    """Mean loss."""

    confusion: npt.NDArray[np.int64] | None
    """Rows by label and prediction, int64[C, C]; for each of several labels, int64[L, 2, 2]; None where there
    are no classes."""

    @property
    def accuracy(self) -> float | None:
        """Share of the rows whose prediction is their label; of several labels, share that are right."""
        if self.confusion is None:
            return None
        right = np.trace(self.confusion, axis1=-2, axis2=-1).sum()
        return float(right) / (self.rows * (len(self.confusion) if self.confusion.ndim == 3 else 1))


def evaluate(rows: DataFrame | str | Path, model: SavedModel) -> Scores:
    """Evaluate a model on the executors; all rows count equally.

    Args:
        rows: a DataFrame, or a path or URI of Parquet, with the columns that the model was trained on. A
            path is read in the active session; if there is none, one is started, and left running.
        model: as `load_model` returns it.

    Raises:
        ConfigError: an argument is of another type.
        DataError: a column is missing or of another type, there is no row, or a row does not fit.
        UserCodeError: the module or its loss raised.
    """
    given = frame_or_path("rows", rows)
    if not isinstance(model, SavedModel):
        raise ConfigError(
            f"model is {described_value(model)}, but must be what sparksgd.load_model(folder) returns"
        )
    if model.loss is None:
        raise ConfigError(
            "the loss of model was given in Python, and no file holds it: pass it to load_model, as loss="
        )
    if isinstance(given, str):
        return evaluate_parquet(start_session("sparksgd", TrainConfig()), given, model)
    frame = without_vectors(given)
    model.schema.check_columns(*first_rows(frame, model.schema.columns, 1), "this data")
    context = frame.sparkSession.sparkContext
    plan = score_tasks.ScoringPlan(module=model.module, schema=model.schema, loss=model.loss)
    named = {"": model.module, "loss": model.loss}
    shipped = context.broadcast(with_code(plan, named, context))
    report, total = RowReport(), 0.0
    with out_of_memory_told("the driver, for the confusion matrix"):
        shape = score_tasks.confusion_shape(model.schema)
        confusion = None if shape is None else np.zeros(shape, np.int64)
    try:
        with spark_job(context, "evaluation"), small_batches(frame.sparkSession, model.schema):
            scored = selected(frame, model.schema).mapInArrow(
                partial(score_tasks.score, shipped), "scores binary"
            )
            for (answer,) in scored.collect():
                scores: score_tasks.PartialScores | SparkSGDError = pickle.loads(answer)
                if isinstance(scores, SparkSGDError):
                    raise scores
                report += scores.report
                total += scores.loss
                if confusion is not None:
                    confusion += scores.confusion
    finally:
        shipped.destroy()
    report.check(None, done="evaluated on")
    if not report.rows:
        raise DataError("there is no row to evaluate on")
    return Scores(rows=report.rows, loss=total / report.rows, confusion=confusion)


def evaluate_parquet(session: SparkSession, path: str, model: SavedModel) -> Scores:
    """Evaluate a model on Parquet, as a job of its own: wait for executors, with a log line and a time limit.

    Args:
        session: reads the Parquet.
        path: a path or URI.
        model: as `load_model` returns it.

    Raises:
        NotEnoughSlots: no executor came.
        SparkSGDError: see `evaluate`.
    """
    with job_on(session):  # to read a schema is a job already
        return evaluate(read_parquet(session, path), model)
