"""Rows that do not mix are no false alarm, whatever the module is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import IMAGES, WORDS, Half, Residual, Sequences, With, Words
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparksgd.engines.trial.operations import Operations
from sparksgd.models.losses import cross_entropy
from tests.engines.trials import Around, rows, tried


class Bagged(nn.Module):
    """A bag of six words."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.down = nn.EmbeddingBag(20, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.bag(x.long()))


class Grouped(nn.Module):
    """A convolution and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(), nn.Flatten()
        )
        self.down = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.layers(x.view(-1, 1, 6, 6)))


class Checkpointed(Around):
    """Recomputes its activations."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.up, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(self.up(x), 0.5, self.training)
        return checkpoint(self.inner, torch.tanh(h), use_reentrant=self.reentrant)


class Tied(nn.Module):
    """One matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.back, self.down = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.back.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.back(torch.tanh(self.up(x)))))


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 1))


def chancy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.RReLU(), nn.Dropout(0.3), nn.AlphaDropout(0.2), nn.Linear(8, 8), nn.Dropout(0.5),
        With(lambda x: (x + torch.randn_like(x) * torch.rand(len(x), 1))[:, :6]),
    )  # fmt: skip


class SomeRows(Around):
    """Does something with one, three or five rows, and nothing with others."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.change(x) if len(x) % 2 else x)


APART = {
    "batch-norm": (Residual, {"loss": cross_entropy, "data": IMAGES, "classifies": True}),
    "batch-norm that keeps nothing": (
        lambda: Residual(track_running_stats=False, affine=False),
        {"loss": cross_entropy, "data": IMAGES, "classifies": True},
    ),
    "group norm": (Grouped, {"loss": cross_entropy, "data": IMAGES, "classifies": True}),
    "LSTM": (lambda: Sequences(nn.LSTM(4, 4, 2, batch_first=True, dropout=0.3)), {}),
    "GRU": (lambda: Sequences(nn.GRU(4, 4, batch_first=True, bidirectional=True), 8), {}),
    "attention": (lambda: Sequences(nn.MultiheadAttention(4, 2, 0.2, batch_first=True)), {}),
    "transformer": (
        lambda: Sequences(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True),
                2,
                enable_nested_tensor=False,
            ),
            recurrent=False,
        ),
        {},
    ),
    "words": (Words, {"data": WORDS}),
    "words of a largest norm": (lambda: Words(max_norm=1.0), {"data": WORDS}),
    "a bag of words": (Bagged, {"data": WORDS}),
    "weight norm": (weight_normed, {}),
    "checkpoint": (lambda: Checkpointed(reentrant=False), {}),
    "reentrant checkpoint": (lambda: Checkpointed(reentrant=True), {}),
    "tied": (Tied, {}),
    "bfloat16": (lambda: Half(torch.bfloat16), {}),
    "chance": (chancy, {}),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)), {}),
    "one feature": (lambda: With(lambda x: x[:, None].expand(-1, 6)), {"data": rows(width=None)}),
    "chance for some numbers of rows": (lambda: SomeRows(lambda x: x + torch.rand(()) - torch.rand(())), {}),
    "bfloat16 for some numbers of rows": (lambda: SomeRows(lambda x: x.bfloat16().float()), {}),
    "a generator for some numbers of rows": (
        lambda: SomeRows(lambda x: x + torch.randn_like(x) - torch.randn_like(x)),
        {},
    ),
}


def test_operations_are_looked_at_in_one_piece_where_it_does_nothing_special(monkeypatch) -> None:
    looked = []

    class Counted(Operations):
        def __enter__(self) -> Any:
            looked.append(self)
            return super().__enter__()

    monkeypatch.setattr("sparksgd.engines.trial.probe.Operations", Counted)
    tried(Around())
    assert len(looked) == 4  # one, and the three in float64
    tried(nn.Sequential(nn.Dropout(), Around()))
    assert len(looked) > 10


@pytest.mark.parametrize("kind", APART)
def test_rows_that_do_not_mix_are_no_false_alarm(kind: str) -> None:
    make, use = APART[kind]
    assert tried(make(), **use).shapes[""][0] == 4
