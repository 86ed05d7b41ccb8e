"""What the trial finds out for the training: a module computes in float16, or it takes channels last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import IMAGES, Half, Residual
from torch import nn
from torch.nn import functional as F

from sparksgd.models.losses import cross_entropy
from tests.engines.trials import tried


def test_float16_is_seen_and_bfloat16_is_not_it() -> None:
    assert tried(Half(torch.float16)).float16
    assert not tried(Half(torch.bfloat16)).float16


class Strided(nn.Module):
    """Reads memory as it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x.view(-1, 1, 6, 6))
        return self.down(F.max_pool2d(h, 2).as_strided((len(x), 16), (16, 1)))


class Asking(Strided):
    """Does another thing when its memory is not contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x.view(-1, 1, 6, 6))
        h = h if h.is_contiguous() else 2 * h
        return self.down(F.max_pool2d(h, 2).flatten(1))


@pytest.mark.parametrize(("make", "channels_last"), [(Strided, False), (Asking, False), (Residual, True)])
def test_channels_last_only_where_it_gives_the_same(make: Any, channels_last: bool) -> None:
    found = tried(make(), loss=cross_entropy, data=IMAGES, classifies=True)
    assert found.channels_last == channels_last
