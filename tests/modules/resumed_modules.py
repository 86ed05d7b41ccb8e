"""Modules, optimisers and schedules whose runs are stopped and go on."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import nn


def with_norm() -> nn.Module:
    """Batch-norm and dropout: running statistics, and random numbers in forward."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


class TwoHeads(nn.Module):
    """Rows whose first feature is large use one head, and the others the other: some steps leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.rare, self.usual = nn.Linear(4, 2), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_rare = x[:, :1] > 1.5
        if not is_rare.any():
            return self.usual(x)
        return torch.where(is_rare, self.rare(x), self.usual(x))


class Projected(nn.Module):
    """Forward itself shortens the weight: a change that is part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.2, 0.2)
        return self.inner(x)


class Note:
    """An object that an optimiser keeps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps


class Slow(torch.optim.Adam):
    """Adam that halves its rate after each seventh step, and keeps an object and slow weights beside."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        self.note = Note(0)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        super().step()
        self.note.steps += 1
        held = [p for group in self.param_groups for p in group["params"]]
        for slow, p in zip(self.slow, held, strict=True):
            slow.lerp_(p.detach(), 0.5)
            if self.note.steps % 7 == 0:
                p.data.copy_(slow)


class Foreign(torch.optim.SGD):
    """Keeps an object of a package that is neither its own nor torch's."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        self.note = string.Template("$x")


class Steps(torch.optim.lr_scheduler.LRScheduler):
    """A rate that falls with a counter of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.counted = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.counted += 1
        return [base / (1 + self.counted // 4) for base in self.base_lrs]


class MomentumLater(torch.optim.lr_scheduler.LRScheduler):
    """A constant rate, and momentum from the fourth turn on."""

    def get_lr(self) -> list[float]:
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9 if self.last_epoch >= 3 else 0.0
        return list(self.base_lrs)
