"""Parameters are views of one vector; what reads their memory otherwise than plain torch is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.engines.trials import refused, tried


class Net(nn.Module):
    """Two layers, from six numbers to one; tests change how the weights lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 1)
        self.lay()

    def lay(self) -> None:
        """Replace a parameter."""

    def weight(self) -> torch.Tensor:
        """Return that of the last layer."""
        return self.down.weight

    def factor(self) -> float:
        """Return what multiplies the features."""
        return 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.up(self.factor() * x)), self.weight(), self.down.bias)


class Transposed(Net):
    def lay(self) -> None:
        self.up.weight = nn.Parameter(torch.randn(6, 6).t())


class Sliced(Net):
    def lay(self) -> None:
        self.down.weight = nn.Parameter(torch.randn(4, 6)[2:3])


class AtItsOwnOffset(Sliced):
    def weight(self) -> torch.Tensor:
        return torch.as_strided(self.down.weight, (1, 6), (6, 1))


class TransposedBuffer(Net):
    def lay(self) -> None:
        self.register_buffer("turn", torch.randn(6, 6).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ torch.as_strided(self.turn, (6, 6), (6, 1), 0))


@pytest.mark.parametrize("kind", [Net, Transposed, Sliced, AtItsOwnOffset, TransposedBuffer])
def test_parameters_may_lie_as_they_like(kind: type[nn.Module]) -> None:
    assert tried(kind()).shapes[""] == (4, 1)


class AtTheStart(Net):
    def weight(self) -> torch.Tensor:
        return torch.as_strided(self.down.weight, (1, 6), (6, 1), 0)


class AtAnOffset(Sliced):
    def weight(self) -> torch.Tensor:
        return torch.as_strided(self.down.weight, (1, 6), (6, 1), 12)


class ByStrides(Transposed):
    def weight(self) -> torch.Tensor:
        return self.down.weight @ torch.as_strided(self.up.weight, (6, 6), (6, 1))


class AskingStrides(Transposed):
    def factor(self) -> float:
        return self.up.weight.stride(0)


class AskingContiguity(Transposed):
    def factor(self) -> float:
        return 1.0 if self.up.weight.is_contiguous() else 2.0


class AskingOffset(Net):
    def factor(self) -> float:
        return 1.0 + self.down.weight.storage_offset()


class AskingSize(Net):
    def factor(self) -> float:
        return self.down.weight.untyped_storage().size() / 24


class InEvaluation(AskingOffset):
    def factor(self) -> float:
        return 1.0 if self.training else super().factor()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (AtTheStart, "down.weight"),
        (AtAnOffset, "down.weight"),
        (ByStrides, "up.weight"),
        (AskingStrides, "up.weight"),
        (AskingContiguity, "up.weight"),
        (AskingOffset, "down.weight"),
        (AskingSize, "down.weight"),
        (InEvaluation, "down.weight"),
    ],
)
def test_what_depends_on_memory_is_refused_with_the_parameter_s_name(
    kind: type[nn.Module], name: str
) -> None:
    refused(kind(), f"parameter {name!r}", "parts of one vector", "as_strided without an offset")


class Merging(Net):
    """Evaluation merges a layer into the weight, and training takes it out again."""

    def eval(self) -> Merging:
        if self.training:
            self.up.weight.data += 0.5
        return super().eval()

    def train(self, mode: bool = True) -> Merging:
        if mode and not self.training:
            self.up.weight.data -= 0.5
        return super().train(mode)


def test_evaluation_is_compared_with_the_same_modes() -> None:
    assert tried(Merging()).shapes[""] == (4, 1)
    assert tried(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 1)))).shapes[""] == (4, 1)
