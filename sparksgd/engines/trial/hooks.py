"""Whether hooks on parameters are linear: of a sum they must make the sum of what they make of each part.

The rows that the trial computes may give a parameter no gradient, or a small one.  So hooks are called with
drawn gradients of several sizes, too.
"""

from __future__ import annotations

import torch
from torch import nn

from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.generators import seed_generators

__all__ = ["hook_that_is_not_linear"]

_POWERS = (-20, -8, 0, 8)
"""Of 2: how large the drawn gradients are."""
_ROUNDINGS = 64
"""Of each element's operands, that a hook may differ by."""


def hook_that_is_not_linear(module: nn.Module) -> str | None:
    """Return the name of a parameter with such a hook; None if there is none.

    A hook that cannot take a drawn gradient is left to what is really computed.
    """
    if not any(parameter._backward_hooks for parameter in nn.Module.parameters(module)):
        return None
    for name, parameter in nn.Module.named_parameters(copied(module)):  # hooks may change what they hold
        if parameter.requires_grad and parameter._backward_hooks and not _is_linear(parameter):
            return name
    return None


def _is_linear(parameter: nn.Parameter) -> bool:
    chance = torch.Generator().manual_seed(7)
    for power in _POWERS:
        one, other = (
            torch.randn(parameter.shape, generator=chance, dtype=torch.float64).mul(2.0**power).to(parameter)
            for _ in range(2)
        )
        try:
            made = [_through(parameter, gradient) for gradient in (one, other, one + other)]
            off = (made[0] + made[1] - made[2]).abs()
        except Exception:  # a user's code, on gradients that it did not expect
            return True
        size = sum((gradient.abs().max() for gradient in (one, other, *made)), torch.zeros(()))
        if bool(torch.isfinite(off).all()) and off.max() > _ROUNDINGS * torch.finfo(off.dtype).eps * size:
            return False
    return True


@torch.no_grad()
def _through(parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """Return what all hooks of a parameter make of a gradient, in autograd's order."""
    seed_generators(0)
    made = gradient.clone()
    for hook in list((parameter._backward_hooks or {}).values()):
        given = hook(made)
        made = made if given is None else given
    return made
