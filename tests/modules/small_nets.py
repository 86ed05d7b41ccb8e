"""Small nets that the trial computes: of numbers, sequences, words and images; and rows of the latter two."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.engines.trials import Around, rows


class Sequences(nn.Module):
    """[B, 6] as sequences of three steps of two numbers, through a layer, to one number."""

    def __init__(self, layer: nn.Module, width: int = 4, *, recurrent: bool = True) -> None:
        super().__init__()
        self.up, self.layer, self.down = nn.Linear(2, 4), layer, nn.Linear(width, 1)
        self.recurrent = recurrent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x.view(-1, 3, 2))
        if isinstance(self.layer, nn.MultiheadAttention):
            h, _ = self.layer(h, h, h)
        else:
            h = self.layer(h)
            h = h[0] if self.recurrent else h
        return self.down(h[:, -1])


class With(Around):
    """Does something to the numbers first."""

    def __init__(self, first: Any) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x))


class Scaled(Around):
    """Multiplies by a parameter, which it reaches by what a test sets."""

    def __init__(self, reach: Any = None, width: int = 6) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(1))
        self.reach = reach

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (self.scale if self.reach is None else self.reach())


class Words(nn.Module):
    """Sums embeddings of six words."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.words, self.down = nn.Embedding(20, 4, **arguments), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.words(x.long()).sum(1))


class Residual(nn.Module):
    """A small residual net with batch-norms, for images of one channel, 6 x 6."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, **norm)
        self.second, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **norm)
        self.down = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.first(x.view(-1, 1, 6, 6))))
        h = F.relu(h + self.norm2(self.second(h)))
        return self.down(F.max_pool2d(h, 2).mean((2, 3)))


class Half(Around):
    """Computes under autocast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(6, 32), nn.Linear(32, 1)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.inner(F.gelu(self.up(x))).float()


IMAGES = rows(width=36, label="int64")
WORDS = rows(dtype="int64")
