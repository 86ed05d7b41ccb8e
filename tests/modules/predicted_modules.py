"""Modules that executors predict with."""

from __future__ import annotations

import torch
from torch import nn

from sparksgd.training.state import Observer


class Counted(nn.Module):
    """Counts how often it is unpickled in a process."""

    loaded = 0

    def __setstate__(self, state):
        super().__setstate__(state)
        type(self).loaded += 1

    def forward(self, x):
        return x.new_full((len(x),), float(type(self).loaded))


class TwoInputs(nn.Module):
    """Reads an image of bytes, a code and a price."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 2)
        self.last = nn.Linear(2 + 4 + 1, 1)

    def forward(self, image, code, price):
        image = image.float() / 255
        return self.last(torch.cat([self.table(code), image, price[:, None]], 1))


class Counting(nn.Module):
    """Counts its forwards in a buffer and in a number, adds both, and returns memory that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.number = 0
        self.kept = torch.zeros(1024, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.number += 1
        kept = self.kept[: len(x)]
        kept.copy_(x[:, 0].double() + self.count + self.number)
        return kept


class Whole(nn.Module):
    """Returns whole numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.long()


def mlp(num_features: int, num_classes: int, hidden: int = 8) -> nn.Module:
    """Return a small classifier; a Pipeline says how many features and classes it has."""
    return nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


class Quiet(Observer):
    """Watches a training, and does nothing."""


def focal(output, label):
    losses = torch.nn.functional.cross_entropy(output, label, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


class Gaussian(nn.Module):
    """Gives the mean and the logarithm of the spread of a number, and what these are computed from."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(num_features, 3), nn.Linear(3, 2)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.first(features))
        mean, spread = self.last(hidden).unbind(1)
        return {"mean": mean, "spread": spread, "hidden": hidden}


def likelihood(output, label):
    """Return minus the logarithm of a normal density, without its constant."""
    return ((label - output["mean"]) / output["spread"].exp()) ** 2 / 2 + output["spread"]


class Shaped(nn.Module):
    """Gives tensors of several shapes and types, and NaN where the second number is negative."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        root = x[:, 1].sqrt()
        pairs = torch.stack([x[:, 0], root], 1)
        return root, pairs, x[:, :0], x[:, :1].round().long(), pairs.double()[:, None].expand(-1, 2, -1)
