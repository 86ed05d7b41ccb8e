"""A trained module on the rows of a DataFrame, apart from any training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from pyspark import cloudpickle
from pyspark.sql import DataFrame, SparkSession

from sparksgd import errors
from sparksgd.config import Config
from sparksgd.errors import DataError
from sparksgd.output import SavedModel
from sparksgd.rows import RowReport
from sparksgd.spark import step_tasks
from sparksgd.spark.cluster import Cluster, spark_job
from sparksgd.spark.rows import first_rows, read_parquet, selected, small_batches, without_vectors

__all__ = ["Scores", "evaluate", "evaluate_parquet"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a module made of some rows.

    Legend: C classes.
    """

    rows: int
    """Rows that were read."""

    loss: float
    """Mean loss."""

    confusion: npt.NDArray[np.int64] | None
    """Rows by label and prediction, int64[C, C]; None where there are no classes."""

    @property
    def accuracy(self) -> float | None:
        """Share of the rows whose prediction is their label."""
        return None if self.confusion is None else float(np.trace(self.confusion)) / self.rows


def evaluate(frame: DataFrame, model: SavedModel) -> Scores:
    """Evaluate a model on the executors.

    Args:
        frame: rows with the columns that it was trained on.
        model: as `load_model` returns it.

    Raises:
        DataError: a column is missing or of another type, there is no row, or a row does not fit.
        UserCodeError: the module or its loss raised.
    """
    frame = without_vectors(frame)
    model.schema.check_columns(*first_rows(frame, model.schema.columns, 1), "this data")
    context = frame.sparkSession.sparkContext
    pickled: bytes = cloudpickle.dumps(model)  # type: ignore[no-untyped-call]  # untyped in pyspark
    shipped = context.broadcast(pickled)
    report, total = RowReport(), 0.0
    confusion = None if model.schema.classes is None else np.zeros((model.schema.classes,) * 2, np.int64)
    try:
        with spark_job(context, "evaluation"), small_batches(frame.sparkSession, model.schema):
            scored = selected(frame, model.schema).mapInArrow(
                partial(step_tasks.score, shipped), "scores string"
            )
            for (text,) in scored.collect():
                part = json.loads(text)
                if "failure" in part:
                    kind, told = part["failure"]
                    raise getattr(errors, kind)(told)
                report += RowReport.from_json(part["report"])
                total += part["loss"]
                if confusion is not None:
                    confusion += np.array(part["confusion"], np.int64)
    finally:
        shipped.destroy()
    report.check(None, done="evaluated")
    if not report.rows:
        raise DataError("there is no row to evaluate on")
    return Scores(rows=report.rows, loss=total / report.rows, confusion=confusion)


def evaluate_parquet(session: SparkSession, path: str, model: SavedModel) -> Scores:
    """Evaluate a model on Parquet, as a job of its own: it waits for executors, aloud, and not for ever.

    Args:
        session: reads it.
        path: a path or URI.
        model: as `load_model` returns it.

    Raises:
        NotEnoughSlots: no executor came.
        SparkSGDError: see `evaluate`.
    """
    cluster = Cluster(session, Config.load(None, ["engine.num_workers=1", "engine.barrier=false"]))
    with cluster.job_group(), cluster.job_watch.over(1):  # to read a schema is a job already
        return evaluate(read_parquet(session, path), model)
