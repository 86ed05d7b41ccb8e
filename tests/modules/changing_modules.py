"""A module whose forward changes all that a forward may change; for tests on every engine."""

from __future__ import annotations

import torch
from torch import nn


class HeldConvolution(nn.Conv2d):
    """A convolution whose filters have a norm of at most 0.4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.4)
        return super().forward(x)


class Adapter(nn.Module):
    """A frozen linear module with an adapter, which evaluation mode merges into the weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Adapter:
        """Merge, or take out what was merged."""
        super().train(mode)
        if self.merged == mode:
            self.base.weight.data += (self.b @ self.a).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y if self.merged else y + x @ (self.b @ self.a).T


class ChangingNet(nn.Module):
    """For uint8[B, 16] features and 4 classes."""

    def __init__(self, averages: bool = True) -> None:
        super().__init__()
        self.averages = averages
        self.filters, self.words = HeldConvolution(1, 4, 2), nn.Embedding(16, 5, max_norm=0.8)
        self.norm = nn.BatchNorm1d(41, affine=False).double()
        self.hidden, self.out = Adapter(41, 12), nn.Linear(12, 4)
        self.teacher = nn.Linear(12, 4).requires_grad_(False)
        self.register_buffer("average", torch.zeros(4, 12))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, float32[B, 4]."""
        x = features.float() / 255
        if self.training:
            self.steps += 1
            self.out.weight.data.clamp_(-0.2, 0.2)
            if self.averages:
                self.average = 0.9 * self.average + 0.1 * self.out.weight.detach()
                with torch.no_grad():
                    self.teacher.weight.lerp_(self.out.weight, 0.05)
        image = self.filters(x.view(-1, 1, 4, 4)).relu().flatten(1)
        word = self.words(features[:, 0].long() // 16)
        hidden = self.hidden(self.norm(torch.cat([image, word], 1).double()).float()).relu()
        logits: torch.Tensor = self.out(hidden) + 0.1 * self.teacher(hidden) + 0.01 * self.average.sum()
        return logits / (1 + 0.01 * self.steps)


class PeakNet(nn.Module):
    """From its fifth step on, it keeps the largest value that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 4)
        self.register_buffer("peak", torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, float32[B, 4]."""
        x = features.float() / 255
        self.steps += 1
        if self.steps > 4:
            self.peak = torch.maximum(self.peak, x.mean())
        logits: torch.Tensor = self.out(x)
        return logits
