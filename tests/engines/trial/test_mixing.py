"""A row's loss and gradient are its own; where they are not, the trial says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import WORDS, Half, Sequences, With, Words
from torch import nn
from torch.nn import functional as F

from sparksgd.models.losses import squared_error
from tests.engines.trials import Around, refused, rows, tried

# Kinds of mixing


class GhostNorm(nn.Module):
    """A batch-norm by hand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


class Zero(Around):
    """Nothing is seen of what it does at its first weights, 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + ((x * self.w).mean(0) * self.w).sum()


def contrastive(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none")


def divided(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return squared_error(output, label) / len(label)


def broadcast(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output - label).square().mean(1)


MIXING = {
    "LSTM": (lambda: Sequences(nn.LSTM(4, 4)), squared_error, ["layer (LSTM) has batch_first=False"]),
    "GRU": (lambda: Sequences(nn.GRU(4, 4)), squared_error, ["layer (GRU)"]),
    "attention": (
        lambda: Sequences(nn.MultiheadAttention(4, 2)),
        squared_error,
        ["layer (MultiheadAttention)"],
    ),
    "transformer": (
        lambda: Sequences(nn.TransformerEncoderLayer(4, 2, 8), recurrent=False),
        squared_error,
        ["batch_first"],
    ),
    "minus the mean": (lambda: With(lambda x: x - x.mean(0)), squared_error, []),
    "by hand": (lambda: With(GhostNorm()), squared_error, []),
    "layer norm over rows": (
        lambda: With(lambda x: F.layer_norm(x.T, (len(x),)).T),
        squared_error,
        [],
    ),
    "softmax over rows": (lambda: With(lambda x: x.softmax(0)), squared_error, []),
    "above the mean": (lambda: With(lambda x: x * (x > x.mean())), squared_error, []),
    "beside chance": (
        lambda: With(lambda x: F.dropout(x - x.mean(0)) + torch.randn_like(x)),
        squared_error,
        [],
    ),
    "row before": (lambda: With(lambda x: x + x.roll(1, 0)), squared_error, []),
    "mixed up": (lambda: With(lambda x: 0.7 * x + 0.3 * x[torch.randperm(len(x))]), squared_error, []),
    "contrastive": (lambda: nn.Linear(6, 4), contrastive, ["the loss of row"]),
    "divided": (Around, divided, ["the loss of row"]),
    "broadcast": (Around, broadcast, ["the loss of row"]),
    "by frequency": (
        lambda: Words(scale_grad_by_freq=True),
        squared_error,
        ["the gradient of 'words.weight'", "words (Embedding) has scale_grad_by_freq=True"],
    ),
    "at zero": (Zero, squared_error, []),
}


@pytest.mark.parametrize("kind", MIXING)
def test_rows_that_mix_are_refused_unless_that_is_meant(kind: str) -> None:
    make, loss, phrases = MIXING[kind]
    refused(
        make(),
        "the loss of a row depends on the other rows of its piece",
        "model.rows_mix = true",
        *phrases,
        loss=loss,
        data=WORDS if kind == "by frequency" else None,
    )
    found = tried(make(), loss=loss, rows_mix=True, data=WORDS if kind == "by frequency" else None)
    assert found.shapes[""][0] == 4


class Peak(Around):
    """Divides by the greatest value that it has seen, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("peak", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.peak = torch.maximum(self.peak, x.detach().abs().max())
        return self.inner(x / self.peak)


def test_a_buffer_that_mixes_rows_is_named() -> None:
    refused(Peak(), "forward changes peak, and two pieces of one step leave different values")


def test_batch_statistics_by_a_function_are_mixing() -> None:
    refused(With(lambda x: F.batch_norm(x, None, None, training=True)), "depends on the other rows")


def weighted_by_class(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    weights = torch.where(label == 2, 10.0, 1.0)
    return nn.functional.cross_entropy(output, label, reduction="none") * weights / weights.mean()


def test_a_loss_that_looks_at_rare_classes_of_a_sorted_file_is_refused() -> None:
    records, schema = rows(label="int64")
    schema.label_array(records)[:] = 0
    refused(nn.Linear(6, 3), "depends on the other rows", loss=weighted_by_class, data=(records, schema))


# Large pieces, and evaluation

FEW_NEVER = {
    "a mean over many": lambda x: x - x.mean(0) if len(x) > 16 else x,
    "the greatest twenty": lambda x: x + x.topk(min(20, len(x)), 0).values[-1],
    "a capacity": lambda x: x * (torch.arange(len(x)) < max(20, len(x) // 2))[:, None],
}


@pytest.mark.parametrize("kind", FEW_NEVER)
def test_rows_that_mix_in_large_pieces_alone_are_refused(kind: str) -> None:
    refused(With(FEW_NEVER[kind]), "depends on the other rows", data=rows(64), piece_rows=60)


def test_rows_that_mix_in_large_evaluations_alone_are_refused() -> None:
    def many(x: torch.Tensor) -> torch.Tensor:
        return x if torch.is_grad_enabled() or len(x) <= 16 else x - x.mean(0)

    refused(With(many), "rows together", data=rows(64), piece_rows=60, evaluates=True)
    assert tried(With(many), data=rows(64), piece_rows=16, evaluates=True)


class InEvaluation(Around):
    """Rows mix in evaluation alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x if self.training else x - x.mean(0))


def test_rows_must_not_mix_in_evaluation_either() -> None:
    refused(InEvaluation(), "in evaluation mode, ", "the loss of row", "depends on the other rows")
    assert tried(InEvaluation(), evaluates=False).shapes[""] == (4, 1)


# Equal columns


def grouped(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Subtract from each row the mean of those with an equal key."""
    same = (key[:, None] == key[None, :]).to(x.dtype)
    return x - same @ x / same.sum(1, keepdim=True)


class OfTwo(nn.Module):
    """Two features; rows with an equal first one share a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(3, 1)

    def forward(self, user: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self.down(grouped(values.float(), user.sum(1)))


def by_label(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(output, label, reduction="none")
    return losses + grouped(losses[:, None], label)[:, 0]


GROUPED = {
    "by a number": (lambda: With(lambda x: grouped(x, x[:, 4])), {}),
    "by a whole number": (lambda: With(lambda x: grouped(x, x[:, 1].long())), {}),
    "in evaluation": (
        lambda: With(lambda x: x if torch.is_grad_enabled() else grouped(x, x[:, 2])),
        {"evaluates": True},
    ),
    "by a feature": (OfTwo, {"data": rows(dtype="int64", width=3, names="user values")}),
    "by a label": (
        lambda: nn.Linear(6, 12),
        {"loss": by_label, "data": rows(label="int64"), "classifies": True},
    ),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_rows_that_mix_with_those_of_an_equal_column_are_refused(kind: str) -> None:
    make, use = GROUPED[kind]
    refused(make(), "depends on the other rows of its piece", **use)


class Ordered(Around):
    """It takes rows in ascending order alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.diff(dim=1) < 0).any():
            raise ValueError("descending")
        return self.inner(x)


def test_rows_that_cannot_be_made_up_are_no_false_alarm() -> None:
    records, schema = rows()
    records["x"].sort(1)
    assert tried(Ordered(), data=(records, schema)).shapes[""] == (4, 1)


# A little, and at other weights


def little(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-6 * x.mean(0)


class InHalf(Around):
    """Casts to bfloat16 by hand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.inner.weight.bfloat16(), self.inner.bias.bfloat16()
        return F.linear(little(x).bfloat16(), weight, bias).float()


class UnderAutocast(Half):
    """As Half, on rows that mix a little."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(little(x))


LITTLE = {
    "plain": lambda: With(little),
    "under autocast": lambda: UnderAutocast(torch.bfloat16),
    "cast by hand": InHalf,
    "a cast, and constants": lambda: With(
        lambda x: little(x).float() @ torch.eye(6) + torch.zeros(6, dtype=torch.float32)
    ),
    "an attention's softmax": lambda: With(lambda x: little(x).softmax(1, dtype=torch.float32).to(x.dtype)),
}


@pytest.mark.parametrize("kind", LITTLE)
def test_a_millionth_of_mixing_is_found(kind: str) -> None:
    refused(LITTLE[kind](), "depends on the other rows of its piece")


class Magnified(Around):
    """Magnifies rounding a billion times in its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(6, 64), nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e-9 * torch.sin(1e9 * super().forward(self.up(x.double())))


def test_magnified_rounding_is_no_mixing() -> None:
    assert tried(Magnified().double(), dtype=torch.float64).shapes[""] == (4, 1)


class Logarithm(Around):
    """Moved weights would leave its domain."""

    def __init__(self, first: Any) -> None:
        super().__init__()
        self.small, self.first = nn.Parameter(torch.full((6,), 1e-4)), first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x)) + self.small.log().sum()


def test_mixing_is_found_where_moved_weights_give_nan() -> None:
    assert tried(Logarithm(torch.tanh)).shapes[""] == (4, 1)
    refused(Logarithm(lambda x: x - x.mean(0)), "depends on the other rows of its piece")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_too_few_different_rows_are_made_to_differ(number: int) -> None:
    refused(With(lambda x: x - x.mean(0)), "depends on the other rows", data=rows(number))
