"""A module and its loss over some rows, and back: the only caller of `backward()`.

Legend: B rows, C classes.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparksgd.arithmetic.flat import mixes_rows_of_evaluations
from sparksgd.arithmetic.settings import without_autocast
from sparksgd.data.schema import RowSchema
from sparksgd.errors import ModelError
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.models.losses import Loss
from sparksgd.models.outputs import tensors_of

__all__ = [
    "EVALUATION_ROWS",
    "TRIAL_ROWS",
    "back_propagate",
    "evaluated_parts",
    "forward",
    "gradient_shift",
    "output_of",
    "predicted_labels",
    "predictions",
    "weighted",
]

EVALUATION_ROWS = 512
"""Of one forward of an evaluation."""
TRIAL_ROWS = 1024
"""The most of one forward of the trial."""


def evaluated_parts(rows: int, module: nn.Module, most: int = EVALUATION_ROWS) -> list[range]:
    """Return which rows each forward of an evaluation takes; a batch-norm without statistics needs two.

    >>> evaluated_parts(1025, nn.BatchNorm1d(3))
    [range(0, 512), range(512, 1024), range(1024, 1025)]
    >>> evaluated_parts(1025, nn.BatchNorm1d(3, track_running_stats=False))
    [range(0, 512), range(512, 1025)]
    """
    firsts = list(range(0, rows, most))
    if rows % most == 1 and len(firsts) > 1 and mixes_rows_of_evaluations(module):
        firsts.pop()
    return [range(first, last) for first, last in pairwise([*firsts, rows])]


def back_propagate(losses: torch.Tensor, scale: float = 1.0) -> float:
    """Add `scale` times the gradient of a sum of losses to the parameters' gradients; return the sum.

    Raises:
        UserCodeError: the module or the loss raised.
    """
    total = losses.sum()
    # As after autocast in forward: a training inside autocast would else round backward's products, too.
    with users_torch_code("the module or its loss"), without_autocast():
        (total if scale == 1 else total * scale).backward()  # type: ignore[no-untyped-call]  # torch's own
    return float(total.detach())


def forward(
    module: nn.Module,
    loss: Loss,
    schema: RowSchema,
    records: npt.NDArray[Any],
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, torch.Tensor]:
    """Run a module and its loss over records.

    Args:
        module: the module.
        loss: one value per row.
        schema: of a record.
        records: the rows, [B].
        dtype: float64 gives it float64 features.

    Returns:
        The module's output, and the loss of each row, float[B].

    Raises:
        UserCodeError: the module or the loss raised.
        ModelError: the output is no tensor, nor some in a tuple or a dictionary; or the loss is not one value
            per row.
    """
    output = output_of(module, schema, records, dtype)
    label = _tensor(schema.label_array(records))
    with users_torch_code("the module or its loss"):
        losses = loss(output, label)
    if not isinstance(losses, torch.Tensor) or losses.shape != (len(records),):
        raise ModelError(_not_per_row(losses, output, label))
    if losses.device.type != "cpu":
        raise ModelError(
            f"the loss is on {losses.device}, but only the CPU is supported: let forward move nothing"
        )
    if losses.dtype in (torch.bfloat16, torch.float16):  # as autocast gives them; sums would be rounded
        losses = losses.float()
    return output, losses


def _not_per_row(losses: object, output: object, label: torch.Tensor) -> str:
    """Return what to say of a loss that does not give one value per row."""
    shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
    told = f"the loss gave {shape} for {len(label)} rows, but must give one value per row, ({len(label)},)"
    if not isinstance(losses, torch.Tensor) or losses.ndim < 2 or not isinstance(output, torch.Tensor):
        return f"{told}: use reduction='none'"
    return (
        f"{told}: the module gives {tuple(output.shape)} for labels {tuple(label.shape)}; let the loss bring "
        f"both to one shape, as by output.reshape(label.shape), or take the mean over the other dimensions"
    )


def weighted(losses: torch.Tensor, schema: RowSchema, records: npt.NDArray[Any]) -> torch.Tensor:
    """Return the losses, [B], of records times the rows' weights; the losses themselves if rows have none."""
    weights = schema.weight_array(records)
    return losses if weights is None else losses * _tensor(weights)


def output_of(
    module: nn.Module, schema: RowSchema, records: npt.NDArray[Any], dtype: torch.dtype = torch.float32
) -> Any:
    """Return what a module gives for the features of records, see `forward`."""
    features = {name: _tensor(values) for name, values in schema.feature_arrays(records).items()}
    if dtype == torch.float64:
        features = {n: f.to(dtype) if f.is_floating_point() else f for n, f in features.items()}
    if torch.is_autocast_enabled("cpu"):  # around the training: it keeps what it cast of old weights
        torch.clear_autocast_cache()
    with users_torch_code("the module or its loss"):
        output = module(*features.values()) if len(features) == 1 else module(**features)
    if not isinstance(output, torch.Tensor):
        tensors_of(output)  # refuses what is neither
    return output


def gradient_shift(weight: float) -> int:
    """Return the least k with 2^k >= weight: 2^-k times a sum over rows is about a mean, and exact.

    >>> [gradient_shift(weight) for weight in (1, 2, 3, 2048, 0.25, 0.3)]
    [0, 1, 2, 11, -2, -1]
    """
    mantissa, exponent = math.frexp(weight)
    return exponent - (mantissa == 0.5)


def predictions(output: torch.Tensor) -> torch.Tensor:
    """Return the classes, int64[B], of logits float[B, C], or of one logit per row, [B] or [B, 1]."""
    if output.ndim == 2 and output.shape[1] > 1:
        return output.argmax(1)
    return (output.reshape(len(output)) > 0).long()


def predicted_labels(schema: RowSchema, output: Any) -> torch.Tensor | None:
    """Return what is predicted in place of the labels, int64[B], or [B, L]; None: there are no classes."""
    if schema.num_labels is not None:
        predicted: torch.Tensor = (output > 0).long()
        return predicted
    return None if schema.classes is None else predictions(output)


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    """Copy an array into torch's own memory, because the bits depend on the alignment."""
    tensor = torch.empty(values.shape, dtype=_torch_type(values.dtype))
    tensor.numpy()[...] = values
    return tensor


@cache
def _torch_type(dtype: np.dtype[Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.name)
    return found
