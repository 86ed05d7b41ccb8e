"""Modules that executors predict with."""

from __future__ import annotations

import torch
from torch import nn


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


def mlp(num_features: int, num_classes: int, hidden: int = 8) -> nn.Module:
    """Return a small classifier; a Pipeline says how many features and classes it has."""
    return nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
