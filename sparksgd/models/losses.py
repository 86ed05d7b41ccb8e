"""Losses: functions of (output, label) with one value for each row; the trainer adds them.

A mean would not do: a mean times the number of rows has other bits than the sum.  The trainer divides the
sum by the number of rows; or, with data.weight, the sum of the losses times the rows' weights by the sum of
these weights.  Weights of classes only weigh rows here: torch's own CrossEntropyLoss(weight=w) divides its
mean by the sum of the rows' weights instead, which differs from batch to batch.

A loss has no parameters that train, and the loss of a row does not depend on other rows; see
ModelConfig.rows_mix.

Legend: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from sparksgd.errors import ModelError
from sparksgd.imports import resolve
from sparksgd.imports.trust import Trust

__all__ = [
    "CLASSIFIERS",
    "LOSSES",
    "Loss",
    "binary_cross_entropy",
    "cross_entropy",
    "loss_named",
    "squared_error",
]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(output)[label], float[B], of logits float[B, C] and labels int64[B].

    Raises:
        ModelError: the output is one number for each row.
    """
    if output.shape in (label.shape, (*label.shape, 1)):
        raise ModelError(
            f"the module gives {tuple(output.shape)} for {len(label)} rows, but cross_entropy takes a logit "
            f"for each class: let it give those of two classes or more, or use binary_cross_entropy"
        )
    return F.cross_entropy(output, label, reduction="none")


def binary_cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the logistic loss, float[B], of logits float[B] or [B, 1] and labels 0 or 1, [B]."""
    return F.binary_cross_entropy_with_logits(
        output.reshape(len(label)), label.to(output.dtype), reduction="none"
    )


def squared_error(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return (output - label)^2, float[B], of predictions float[B] or [B, 1] and labels [B]."""
    return (output.reshape(len(label)) - label.to(output.dtype)).square()


LOSSES: dict[str, Loss] = {
    "binary_cross_entropy": binary_cross_entropy,
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
}


CLASSIFIERS = (binary_cross_entropy, cross_entropy)
"""Losses whose labels are classes, numbered from 0."""


def loss_named(name: str, trust: Trust | None = None) -> Loss:
    """Return one of LOSSES, or the user's own by import path.

    Args:
        name: of it.
        trust: whose code may run, if the name comes from a file; None: the user wrote it.
    """
    loss: Loss = resolve("loss.name", name, LOSSES, trust)
    return loss
