"""What a few rows give at some weights: losses and gradient, and how far two ways to compute them differ.

Legend: B rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sparksgd.arithmetic.changes import Changes
from sparksgd.engines.trial.operations import Operations
from sparksgd.models.outputs import shapes_of

__all__ = ["Measured", "distance", "excess", "gradient_of", "measured"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses and gradient of some rows."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the module's tensors, by their names."""

    losses: torch.Tensor
    """float64[B]."""

    gradient: torch.Tensor
    """Of their sum, [P]; empty where it was not computed."""

    epsilon: float
    """The rounding error of its least precise operation."""

    float16: bool
    """Whether an operation gave float16."""

    changes: Changes | None
    """What forward made of parameters and constants."""

    @cached_property
    def is_finite(self) -> bool:
        """Whether all losses and gradients are finite."""
        return bool(torch.isfinite(self.losses.sum() + self.gradient.sum()))


def measured(
    output: Any, losses: torch.Tensor, gradient: torch.Tensor, seen: Operations, changes: Changes | None
) -> Measured:
    return Measured(
        shapes=shapes_of(output),
        losses=losses.detach().double().clone(),
        gradient=gradient,
        epsilon=seen.epsilon,
        float16=torch.float16 in seen.dtypes,
        changes=changes,
    )


def gradient_of(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the gradients of parameters as one vector, float[P]; 0 where there are none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    return torch.cat([gradient.detach().reshape(-1) for gradient in gradients])


def excess(parts: Sequence[Measured], whole: Measured, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return by how much the gradients of parts add up to more than that of the whole, float[P]."""
    found = torch.sub(parts[0].gradient, whole.gradient, out=out)
    for part in parts[1:]:
        found += part.gradient
    return found


def distance(one: Measured, parts: Sequence[Measured]) -> float:
    """Return how far losses and gradient are from each other, relative to their greatest and to its norm."""
    found = 0.0
    losses = torch.cat([part.losses for part in parts])
    if losses.shape == one.losses.shape and one.losses.any():
        found = float((losses - one.losses).norm() / one.losses.norm())
    if one.gradient.any():
        found = max(found, float(excess(parts, one).norm() / one.gradient.norm()))
    return found
