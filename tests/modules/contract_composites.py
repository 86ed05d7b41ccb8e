"""Twenty small nets of different kinds side by side; executors import them.

A composite takes float32[B, 24] features; the outputs of its nets, float[B, 2], are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import contract_changes
import contract_kinds
import contract_layers
import torch
from torch import nn

TWENTY = (
    "Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "LayerNorm", "GroupNorm", "GRU", "LSTM",
    "MultiheadAttention", "EmbeddingBag", "Dropout", "BatchNorm2d", "several heads, some unused",
    "tied weights", "a hook on a parameter masks", "weight_norm", "forward rebinds data",
    "an embedding of bounded norm", "a frozen teacher follows", "an adapter that evaluation merges",
)  # fmt: skip
"""One of each sort: layers, norms over rows, randomness, unused heads, hooks, projections, modes."""

NETS: dict[str, Callable[[], nn.Module]] = {
    **contract_layers.LAYERS,
    **contract_layers.LAZY,
    **contract_layers.LAZY_NORMS,
    **contract_layers.RANDOM,
    **contract_layers.NORMS_OVER_ROWS,
    **contract_kinds.ORDINARY,
    **contract_changes.RIGHT,
    **contract_changes.RANDOM,
}
"""All that trains."""


class Composite(nn.Module):
    """Nets whose outputs are summed.

    Args:
        nets: by name.
    """

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({name.replace(".", ""): net for name, net in nets.items()})

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return sum(net(features) for net in self.nets.values()) / len(self.nets)


def of_names(names: Sequence[str]) -> nn.Module:
    """Return a composite of nets by their names."""
    return Composite({name: NETS[name]() for name in names})


def twenty() -> nn.Module:
    """Return the composite of one of each sort."""
    return of_names(TWENTY)


def page(number: int, size: int) -> nn.Module:
    """Return the composite of some of all nets: those of a page of this size."""
    return of_names(pages(NETS, size)[number])


def pages(names: Iterable[str], size: int) -> list[list[str]]:
    """Return names in groups of this size; the last may be smaller."""
    listed = [*names]
    return [listed[first : first + size] for first in range(0, len(listed), size)]
