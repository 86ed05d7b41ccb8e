"""Sparse gradients: summed as dense vectors, which an optimiser of the user's own must take alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparksgd.config import OptimizerConfig
from tests.engines.trials import Around, refused, rows, tried


class Words(nn.Module):
    """Sums embeddings of six words.

    Args:
        bag: whether by an EmbeddingBag.
    """

    def __init__(self, *, bag: bool = False) -> None:
        super().__init__()
        self.words = (
            nn.EmbeddingBag(20, 4, sparse=True, mode="sum") if bag else nn.Embedding(20, 4, sparse=True)
        )
        self.down, self.bag = nn.Linear(4, 1), bag

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.words(x.long())
        return self.down(found if self.bag else found.sum(1))


class Gathered(Around):
    """Takes numbers of a parameter by their places."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = torch.gather(self.w, 0, x.long().flatten(), sparse_grad=True)
        return self.inner(taken.view(-1, 6))


class Lazily(torch.optim.Optimizer):
    """Decay, but only of the rows that have a gradient, where it is sparse."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                grad = p.grad.coalesce()
                p[grad.indices()[0]] *= 0.9
            else:
                p.mul_(0.9)
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class SumsOfSquares(Lazily):
    """It squares values that are not united yet."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            squares = (p.grad._values() if p.grad.is_sparse else p.grad).square().sum()
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"] / float(1 + squares))


class Alike(Lazily):
    """Plain descent, which takes both."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class DenseAlone(Lazily):
    """It raises where a gradient is sparse, in plain torch, too."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.view(-1).view(p.shape) * 0.1)


def named(kind: type) -> OptimizerConfig:
    return OptimizerConfig(name=f"{__name__}:{kind.__name__}", arguments={"lr": 0.1})


NUMBERS = rows(dtype="int64")
SPARSE = {
    "words": (Words, "words.weight"),
    "a bag": (lambda: Words(bag=True), "words.weight"),
    "gathered": (Gathered, "w"),
}


@pytest.mark.parametrize("which", SPARSE)
@pytest.mark.parametrize("kind", [Lazily, SumsOfSquares])
def test_an_optimiser_that_takes_sparse_gradients_otherwise_is_refused(which: str, kind: type) -> None:
    make, name = SPARSE[which]
    said = (
        f"the gradient of {name!r} is sparse, and the optimiser {__name__}:{kind.__name__} makes other steps"
    )
    refused(make(), said, "set sparse=False", data=NUMBERS, optimizer=named(kind))
    tried(nn.Linear(6, 1), optimizer=named(kind))


@pytest.mark.parametrize("which", SPARSE)
@pytest.mark.parametrize(
    "optimizer",
    [named(Alike), named(DenseAlone)]
    + [OptimizerConfig(name=name, arguments={"lr": 0.1}) for name in ("SGD", "Adagrad", "Adam")],
)
def test_one_that_takes_both_alike_or_dense_ones_alone_is_not(which: str, optimizer: OptimizerConfig) -> None:
    tried(SPARSE[which][0](), data=NUMBERS, optimizer=optimizer)
