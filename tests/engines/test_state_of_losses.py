"""What a loss keeps from piece to piece is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from two_workers import train_here

from sparksgd.errors import ModelError


class KeepingLoss(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (output[:, 0] - label).square()


class CountingLoss:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (output[:, 0] - label).square()


def counting_function(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    counting_function.calls = getattr(counting_function, "calls", 0) + 1
    return (output[:, 0] - label).square()


keeping, counting = KeepingLoss(), CountingLoss()


@pytest.mark.parametrize("name", ["keeping", "counting", "counting_function"])
def test_what_a_loss_keeps_is_refused(tmp_path: Path, name: str) -> None:
    path = {"keeping": r"loss\.calls", "counting": "loss", "counting_function": "loss"}[name]
    with pytest.raises(ModelError, match=f"^{path} changes as the module trains"):
        train_here(tmp_path, module=nn.Linear(4, 1), loss={"name": f"{__name__}:{name}"})
