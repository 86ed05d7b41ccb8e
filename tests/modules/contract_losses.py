"""Losses of the contract tests, named by import path: one value for each row."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def pulled(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of each row's outputs, float[B, ...], from half its label."""
    distance = output.flatten(1) - label[:, None].to(output.dtype) / 2
    return distance.square().mean(1)


def cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each row, of logits float[B, C]."""
    return F.cross_entropy(output, label % output.shape[1], reduction="none")


def weighted_classes(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return a cross-entropy in which classes weigh 1 and 3; the mean divides by rows."""
    weight = torch.tensor([1.0, 3.0], dtype=output.dtype)
    return F.cross_entropy(output, label % 2, weight=weight, reduction="none")


def smoothed(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy with smoothed labels."""
    return F.cross_entropy(output, label % 2, label_smoothing=0.1, reduction="none")


def robust(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the Huber loss of the first output."""
    return F.huber_loss(output.flatten(1)[:, 0], label.to(output.dtype), reduction="none", delta=0.5)


def divided_by_rows(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return a loss that is divided by the number of rows once too often."""
    return pulled(output, label) / len(label)


def outer(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return [B, 1] - [B], reduced: each row meets the labels of all."""
    return (output[:, :1] - label.to(output.dtype)).square().mean(1)


def contrasted(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return a contrastive loss: the other rows are the wrong answers."""
    similar = output @ output.T.detach()
    return F.cross_entropy(similar, torch.arange(len(label)), reduction="none")


class Margins(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return pulled(output * self.scale.to(output.dtype), label)


class Counting:
    """A loss that counts its calls, and grows with them."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return pulled(output, label) * self.calls


margins = Margins()
counting = Counting()
