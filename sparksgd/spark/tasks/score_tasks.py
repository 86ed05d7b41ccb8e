"""What executors run to score rows with a saved model.

No pyspark at module level: executors import this as it is.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.numerics import thread_count
from sparksgd.arithmetic.scripted import forget_optimised
from sparksgd.arithmetic.seeds import seed32
from sparksgd.data.row_report import RowReport
from sparksgd.data.schema import RowSchema
from sparksgd.engines.forward import evaluated_parts, forward, predicted_labels
from sparksgd.engines.freed_memory import freed_memory_kept_in_block
from sparksgd.errors import SparkSGDError
from sparksgd.imports.same_code import Pickled
from sparksgd.models.losses import Loss
from sparksgd.spark.tasks.row_tasks import rows_of
from sparksgd.spark.tasks.worker_exit import leave_quietly

if TYPE_CHECKING:
    from pyspark import Broadcast

__all__ = ["PartialScores", "ScoringPlan", "confusion_shape", "score"]


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """What is needed to score rows."""

    module: nn.Module
    """In evaluation mode."""

    schema: RowSchema
    """What a row must be."""

    loss: Loss


@dataclass(frozen=True, kw_only=True)
class PartialScores:
    """Sums over the rows of a partition.

    Legend: C classes, L labels of a row.
    """

    report: RowReport

    loss: float
    """Sum over the rows."""

    confusion: npt.NDArray[np.int64]
    """Rows by label and prediction, int64[C, C]; C is 0 where there are no classes; for each of several
    labels, int64[L, 2, 2]."""


def confusion_shape(schema: RowSchema) -> tuple[int, ...] | None:
    """Return the shape of `PartialScores.confusion`; None where there are no classes."""
    if schema.num_labels is not None:
        return schema.num_labels, 2, 2
    return None if schema.classes is None else (schema.classes, schema.classes)


def score(shipped: Broadcast[Pickled], batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Task: score a partition's rows; yield one pickled `PartialScores`, or the error that was raised.

    Args:
        shipped: a `ScoringPlan`.
        batches: columns in the schema's order.
    """
    leave_quietly()
    try:
        with freed_memory_kept_in_block():
            scores: PartialScores | SparkSGDError = _scores(shipped.value.load(), batches)
    except SparkSGDError as error:  # as a value, because Spark would retry a task that raises
        scores = type(error)(f"{error}\n  in the evaluation, at {socket.gethostname()}")
    yield pa.RecordBatch.from_arrays([pa.array([pickle.dumps(scores)], pa.binary())], ["scores"])


def _scores(plan: ScoringPlan, batches: Iterable[pa.RecordBatch]) -> PartialScores:
    forget_optimised()
    schema = plan.schema
    report, total = RowReport(), 0.0
    confusion = np.zeros(confusion_shape(schema) or (0, 0), np.int64)
    for rows in rows_of(schema, batches):
        report += rows.report
        for part in evaluated_parts(len(rows.records), plan.module):
            records = rows.records[part.start : part.stop]
            with torch.no_grad(), thread_count(1), generators_seeded(seed32(0, "scoring", part.start)):
                output, losses = forward(plan.module, plan.loss, schema, records)
            total += float(losses.double().sum())
            predicted, label = predicted_labels(schema, output), schema.label_array(records)
            if predicted is not None:
                each = () if schema.num_labels is None else (np.arange(schema.num_labels),)
                np.add.at(confusion, (*each, label.astype(np.int64), predicted.numpy()), 1)
    return PartialScores(report=report, loss=total, confusion=confusion)
