"""What executors run to predict with a saved model.

No pyspark at module level: executors import this as it is.

Legend: B rows, C classes.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.numerics import thread_count
from sparksgd.arithmetic.scripted import forget_optimised
from sparksgd.arithmetic.seeds import seed32
from sparksgd.data.row_reading import FeatureRows, read_features
from sparksgd.data.schema import RowSchema
from sparksgd.engines.bytes_of import same_bytes
from sparksgd.engines.forward import evaluated_parts, output_of, predictions
from sparksgd.errors import ClusterError, ModelError
from sparksgd.imports.same_code import Pickled
from sparksgd.models.losses import LossKind, has_accuracy
from sparksgd.models.outputs import Output, arrays_of
from sparksgd.spark.tasks.worker_exit import leave_quietly

if TYPE_CHECKING:
    from pyspark import Broadcast

__all__ = [
    "COMPLETE",
    "GOOD",
    "HAS_NAN",
    "PredictionPlan",
    "ShippedFile",
    "ShippedPlan",
    "columns_of",
    "computed",
    "predict",
    "predicted_columns",
]

COMPLETE = "complete"
"""The column that says whether a row has no null; the others are the features, numbered."""

GOOD = "good"
"""The column that says whether a row is good: a prediction that is NaN reaches Spark as null, too."""

HAS_NAN = "has_nan"
"""The column that says whether a value has a NaN inside, which reaches Spark as null."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class PredictionPlan:
    """What is needed to predict."""

    module: nn.Module
    """In evaluation mode."""

    schema: RowSchema
    """What the features of a row must be."""

    columns: pa.Schema
    """The features as Arrow columns."""

    kind: LossKind | None
    """What the module's output is."""

    outputs: tuple[Output, ...]
    """What the module gives, if each output is to be a column; none: the columns are those of the kind."""

    thresholds: tuple[float, ...] | None
    """One for each class: that of the largest probability / threshold is predicted; None: all are equal."""

    rows_per_forward: int
    """The most rows of one forward."""

    bad_row_advice: str | None
    """What the error about bad rows says to do; None: their predictions are null."""


class _AsLoaded:
    """What a module is made of, so that each forward starts from it, whatever the one before changed.

    Args:
        module: its tensors, and the numbers and texts that it holds.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = [
            (held, name, tensor, tensor.detach().clone())
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self._plain = [
            (vars(part), {name: value for name, value in vars(part).items() if type(value) in _PLAIN})
            for part in module.modules()
        ]

    def restore(self) -> None:
        """Let all be as it was loaded."""
        for held, name, tensor, loaded in self._tensors:
            held[name] = tensor
            if not same_bytes(tensor, loaded):
                tensor.data.copy_(loaded)
        for now, before in self._plain:
            now.update(before)


_PLAIN = (bool, int, float, str, type(None))


class ShippedPlan:
    """A plan on its way to the workers; each process that gets it loads the module once."""

    def __init__(self, pickled: Pickled) -> None:
        self._pickled = pickled

    @cached_property
    def plan(self) -> PredictionPlan:
        """The plan, kept as long as Spark keeps the broadcast."""
        leave_quietly()
        forget_optimised()
        plan: PredictionPlan = self._pickled.load()
        return plan

    @cached_property
    def as_loaded(self) -> _AsLoaded:
        """What the plan's module is made of."""
        return _AsLoaded(self.plan.module)

    def __getstate__(self) -> dict[str, Pickled]:
        return {"_pickled": self._pickled}


@dataclass(frozen=True)
class ShippedFile:
    """A plan that was brought to a server of Spark Connect as a file; each process loads it once."""

    sha256: str
    """Of the file's bytes."""

    @property
    def name(self) -> str:
        """What the file is called."""
        return f"sparksgd-plan-{self.sha256}"

    @property
    def value(self) -> ShippedPlan:
        """The plan.

        Raises:
            ClusterError: the file is damaged or gone.
        """
        from pyspark import SparkFiles

        if self.sha256 not in _loaded:
            file = Path(SparkFiles.get(self.name))
            data = file.read_bytes() if file.exists() else b""
            if hashlib.sha256(data).hexdigest() != self.sha256:
                raise ClusterError(
                    f"{file}, the model that was sent to this Spark Connect session, is damaged or gone: "
                    f"start a new session"
                )
            _loaded[self.sha256] = ShippedPlan(pickle.loads(data))
            while len(_loaded) > _MOST_LOADED:
                del _loaded[next(iter(_loaded))]
        return _loaded[self.sha256]


_loaded: dict[str, ShippedPlan] = {}
"""The plans of this process that came as files, by their digests."""
_MOST_LOADED = 2


def predict(
    shipped: Broadcast[ShippedPlan] | ShippedFile, frames: Iterable[pd.DataFrame]
) -> Iterator[pd.DataFrame]:
    """Task: predict for the rows of each frame; yield the columns of `predicted_columns`, null for bad rows.

    Args:
        shipped: the plan.
        frames: the features in the schema's order, then COMPLETE.

    Raises:
        BadRows: a row is bad, and the plan has no place for it.
        UserCodeError: the module raised.
        ModelError: its output is not what the plan says.
    """
    plan, as_loaded = shipped.value.plan, shipped.value.as_loaded
    for frame in frames:
        yield _predicted(plan, frame, as_loaded)


def columns_of(kind: LossKind | None, outputs: Sequence[Output] = ()) -> dict[str, str]:
    """Return the columns that are computed, see `PredictionPlan`: their types in SQL by their names.

    >>> columns_of("classes")
    {'raw': 'array<float>', 'probability': 'array<float>', 'prediction': 'double'}
    """
    if outputs:
        numbers = {"float32": "float", "float64": "double"}
        return {
            f"output {number}": "double" if output.length is None else f"array<{numbers[output.dtype]}>"
            for number, output in enumerate(outputs)
        }
    of_classes = {"raw": "array<float>", "probability": "array<float>"} if has_accuracy(kind) else {}
    several = {None: "array<float>", "several labels": "array<double>"}
    return {**of_classes, "prediction": several.get(kind, "double")}


def predicted_columns(
    kind: LossKind | None, output: Any, rows: int, thresholds: tuple[float, ...] | None
) -> dict[str, Array]:
    """Return the columns that are made of a module's output, by name.

    Args:
        kind: what the output is.
        output: of the module.
        rows: how many it is of.
        thresholds: see `PredictionPlan`.

    Returns:
        "raw" and "probability", float[B, C] or [B, L], where there are classes or labels; "prediction",
        float64[B], or [B, L] of several labels, or float32[B, N] where the kind is not known.

    Raises:
        ModelError: the output is not of this kind.
    """
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"the module gives a {type(output).__name__}, but must give one tensor")
    shape = tuple(output.shape)
    if not output.is_floating_point():
        raise ModelError(f"the module gives {output.dtype}, but must give floating-point numbers")
    if output.dtype in (torch.bfloat16, torch.float16):
        output = output.float()
    output = output.clone()  # it may be memory of the module's, which the next forward writes
    if kind is None and shape[:1] == (rows,):
        return {"prediction": output.reshape(rows, -1).numpy()}
    if kind in ("numbers", "binary") and shape in ((rows,), (rows, 1)):
        column = output.reshape(rows)
        if kind == "numbers":
            return {"prediction": column.double().numpy()}
        raw = torch.stack([-column, column], 1)
        return _classified(raw, torch.sigmoid(raw), predictions(output), thresholds)
    if kind == "classes" and len(shape) == 2 and shape[0] == rows and shape[1] > 1:
        raw = torch.log_softmax(output, 1)
        return _classified(raw, torch.softmax(output, 1), predictions(output), thresholds)
    if kind == "several labels" and len(shape) == 2 and shape[0] == rows:
        return {
            "raw": output.numpy(),
            "probability": torch.sigmoid(output).numpy(),
            "prediction": (output > 0).double().numpy(),
        }
    wanted = {
        "classes": "C > 1 logits", "binary": "one logit", "several labels": "logits of labels",
        "numbers": "one number", None: "numbers",
    }  # fmt: skip
    raise ModelError(f"the module gives {shape} for {rows} rows, but must give {wanted[kind]} for each row")


def _classified(
    raw: torch.Tensor, probability: torch.Tensor, best: torch.Tensor, thresholds: tuple[float, ...] | None
) -> dict[str, Array]:
    if thresholds is not None:
        limits = torch.tensor(thresholds, dtype=torch.float64)
        best = torch.where(limits == 0, torch.inf, probability.double() / limits).argmax(1)  # as Spark does
    return {
        "raw": raw.numpy(),
        "probability": probability.numpy(),
        "prediction": best.double().numpy(),
    }


def computed(plan: PredictionPlan, rows: FeatureRows, as_loaded: _AsLoaded | None = None) -> dict[str, Array]:
    """Return the columns of the good rows; no row has no columns.

    Args:
        plan: computes them.
        rows: the good rows.
        as_loaded: of the plan's module; None: it is made here.
    """
    parts, as_loaded = [], as_loaded or _AsLoaded(plan.module)
    for part in evaluated_parts(len(rows.records), plan.module, plan.rows_per_forward):
        records = rows.records[part.start : part.stop]
        with torch.no_grad(), thread_count(1), generators_seeded(seed32(0, "predicting", part.start)):
            try:
                output = output_of(plan.module, plan.schema, records)
                parts.append(_columns(plan, output, len(records)))
            finally:
                as_loaded.restore()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _columns(plan: PredictionPlan, output: Any, rows: int) -> dict[str, Array]:
    if not plan.outputs:
        return predicted_columns(plan.kind, output, rows, plan.thresholds)
    names = columns_of(plan.kind, plan.outputs)
    return dict(zip(names, arrays_of(plan.outputs, output, rows), strict=True))


def _predicted(plan: PredictionPlan, frame: pd.DataFrame, as_loaded: _AsLoaded) -> pd.DataFrame:
    complete = frame[COMPLETE].to_numpy(bool)
    arrays = [
        pa.array(frame[str(number)], kind, from_pandas=False)
        for number, kind in enumerate(plan.columns.types)
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=plan.columns).filter(pa.array(complete))
    rows = read_features(batch, plan.schema)
    rows.report.found("null in a feature", [None] * int((~complete).sum()))
    if plan.bad_row_advice is not None:
        rows.report.check(None, done="predicted, of one batch", move=plan.bad_row_advice)
    positions = np.flatnonzero(complete)[rows.positions]
    names = [*columns_of(plan.kind, plan.outputs)]
    return _spread(names, computed(plan, rows, as_loaded), positions, len(frame))


def _spread(
    names: Sequence[str], columns: dict[str, Array], positions: npt.NDArray[np.int64], rows: int
) -> pd.DataFrame:
    """Return the columns as a frame: a value stands where its row does, a bad row has None."""
    good = np.zeros(rows, bool)
    good[positions] = True
    has_nan = np.zeros(rows, bool)
    for values in columns.values():
        has_nan[positions] |= np.isnan(values).reshape(len(values), math.prod(values.shape[1:])).any(1)
    spread: dict[str, Array] = {GOOD: good, HAS_NAN: has_nan}
    for name in names:
        spread[name] = np.full(rows, None, object)
        for position, value in zip(positions, columns.get(name, ()), strict=name in columns):
            spread[name][position] = value
    return pd.DataFrame(spread)
