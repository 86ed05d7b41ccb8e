"""A module of as many parameters as one asks for, which computes little: for tests of memory."""

from __future__ import annotations

import math

import torch
from torch import nn


def wide(parameters: int) -> nn.Module:
    """Return a module of about this many parameters, for features uint8[16] and 4 classes."""
    return WideNet(max(1, round(math.sqrt(parameters))))


class WideNet(nn.Module):
    """Two hidden layers of one width H; the second has H * H of the parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """uint8[B, 16] -> float[B, 4]."""
        return self.layers(features.float() / 255)
