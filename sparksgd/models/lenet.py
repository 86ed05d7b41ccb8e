"""LeNet: two convolutions, two fully connected layers.

The default is the network of SystemML's mnist_lenet_distrib_sgd example (1,663,370 parameters);
`LeNet(maps=(20, 50), hidden=500, padding=0)` is the classic one of 431,080.

Legend: B rows, M1 and M2 maps, H hidden units, C classes; sizes are for the default padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import nn
from torch.nn import functional as F

from sparksgd.errors import ConfigError

__all__ = ["LeNet"]


def _check(
    maps: object, hidden: object, classes: object, padding: object, dropout: object, side: object
) -> None:
    """Refuse arguments that are no numbers of the right range."""
    if not (isinstance(maps, Sequence) and len(maps) == 2):
        raise ConfigError(f"maps is {maps!r}, but must be two whole numbers from 1")
    numbers = {
        "maps[0]": (maps[0], 1),
        "maps[1]": (maps[1], 1),
        "hidden": (hidden, 1),
        "classes": (classes, 1),
    }
    for name, (value, least) in (numbers | {"padding": (padding, 0), "side": (side, 1)}).items():
        if isinstance(value, bool) or not (isinstance(value, Integral) and least <= int(value) < _MOST):
            raise ConfigError(f"{name} is {value!r}, but must be a whole number from {least} to {_MOST - 1}")
    if isinstance(dropout, bool) or not (isinstance(dropout, Real) and 0 <= float(dropout) <= 1):
        raise ConfigError(f"dropout is {dropout!r}, but must be a number from 0 to 1")


_MOST = 2**31
"""No tensor of torch has so many rows of convolutions or units as this."""


class LeNet(nn.Module):
    """LeNet for square one-channel images.

    Args:
        maps: convolution maps, (M1, M2).
        hidden: H.
        classes: C.
        padding: pixels around the input of both 5x5 convolutions.
        dropout: probability that a hidden unit is dropped in training.
        side: height and width of the images, in pixels.

    Initialisation is He et al. 2015: N(0, 2 / fan_in), biases 0; the last layer's standard
    deviation is 1 / sqrt(fan_in), because no rectifier follows it.
    """

    def __init__(
        self,
        maps: Sequence[int] = (32, 64),
        hidden: int = 512,
        classes: int = 10,
        padding: int = 2,
        dropout: float = 0.5,
        side: int = 28,
    ) -> None:
        super().__init__()
        _check(maps, hidden, classes, padding, dropout, side)
        first, second = maps
        final = side
        for _ in range(2):
            final = (final + 2 * padding - 4) // 2
        self.side = side
        self.conv1 = nn.Conv2d(1, first, 5, padding=padding)
        self.conv2 = nn.Conv2d(first, second, 5, padding=padding)
        self.hidden = nn.Linear(second * final * final, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, classes)
        for layer in (self.conv1, self.conv2, self.hidden, self.output):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.output else "relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # these layers all have a bias

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits, float[B, C], of images: uint8 (0..255) or float (0..1), [B, side * side]."""
        if image.dtype == torch.uint8:
            image = image.to(self.conv1.weight.dtype) / 255
        x = (image * 2 - 1).view(-1, 1, self.side, self.side)  # [B, 1, 28, 28], in -1..1
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [B, M1, 14, 14]
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [B, M2, 7, 7]
        x = F.relu(self.hidden(x.flatten(1)))  # [B, H]
        return self.output(self.dropout(x))  # type: ignore[no-any-return]  # [B, C]; nn.Module is untyped
