"""A module that golden experiments name by import path; executors import it, too."""

from __future__ import annotations

import torch
from torch import nn


class ConvNormNet(nn.Module):
    """A convolution with batch-norm and dropout, for uint8[B, 144] images and 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(5 * 5 * 5, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.float().view(-1, 1, 12, 12) / 255
        x = torch.relu(self.norm(self.convolution(x)))  # [B, 5, 10, 10]
        return self.output(self.dropout(torch.max_pool2d(x, 2).flatten(1)))
