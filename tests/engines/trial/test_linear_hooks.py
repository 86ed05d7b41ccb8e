"""Hooks on gradients, and functions of autograd, are linear in the gradient, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import With
from torch import nn

from tests.engines.trials import Around, refused, tried


def test_a_clipping_hook_is_refused() -> None:
    module = nn.Linear(6, 1)
    module.weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    refused(module, "parameter 'weight' has a hook", "solver.clip_norm")


class Unused(Around):
    """It has a layer that no row of the trial reaches, so that its gradients are 0."""

    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.dead = nn.Linear(6, 1)
        self.dead.weight.register_hook(hook)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (self.dead(x) - 1e9).relu()


def largest(gradient: torch.Tensor) -> torch.Tensor:
    """Keep the two largest elements: it is proportional to the gradient, but not linear."""
    return gradient * (gradient.abs() >= gradient.abs().flatten().topk(2).values[-1])


@pytest.mark.parametrize(
    "hook", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: g.clamp(-9, 9), torch.abs, torch.sign, largest]
)
def test_a_hook_that_is_not_linear_is_refused_where_the_trial_has_no_gradient(hook: Any) -> None:
    refused(Unused(hook), "parameter 'dead.weight' has a hook", "solver.clip_norm")


@pytest.mark.parametrize(
    "hook",
    [
        lambda g: None,
        lambda g: g * 0.5,
        lambda g: g.mul_(2),
        lambda g: g - g.mean(1, keepdim=True),
        lambda g: g * (torch.rand(6) > 0.5),
        lambda g: g.cumsum(1) / 3,
    ],
)
def test_a_linear_hook_is_none(hook: Any) -> None:
    assert tried(Unused(hook))


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-0.01, 0.01)


def test_an_autograd_function_that_clips_is_refused() -> None:
    refused(nn.Sequential(nn.Linear(6, 1), With(lambda x: Clipped.apply(x).expand(-1, 6))), "times the loss")


def test_a_hook_that_masks_is_kept() -> None:
    module = nn.Linear(6, 1)
    mask = torch.tensor([[1.0, 0, 1, 0, 1, 0]])
    module.weight.register_hook(lambda gradient: gradient * mask)
    assert tried(module).shapes[""] == (4, 1)
