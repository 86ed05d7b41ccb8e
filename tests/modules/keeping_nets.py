"""A linear net that keeps, in a submodule `core`, what a test gives it, and does with it what a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """y = w x + b, in a submodule `core`, with something else that a test gives.

    Args:
        begin: makes attributes of `core`.
        use: called with `core`, the input, and the output, which it returns changed or as it is.
    """

    def __init__(self, begin: Callable[[Any], object], use: Callable[..., Any]) -> None:
        super().__init__()
        self.core = nn.Module()
        self.core.linear = nn.Linear(4, 1)
        begin(self.core)
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.use(self.core, x, self.core.linear(x))
        assert isinstance(output, torch.Tensor)
        return output


def net(begin: Callable[[Any], object], use: Callable[..., Any]) -> Net:
    torch.manual_seed(0)
    return Net(begin, use)


def sets(**attributes: Any) -> Callable[[Any], object]:
    return lambda core: [setattr(core, name, value) for name, value in attributes.items()]


def longest(x: torch.Tensor) -> int:
    return int(10 * x.abs().sum())


def keeps_activation(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.last = torch.tanh(y)
    return y + core.last


def warns_once(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.warned = True
    return y
