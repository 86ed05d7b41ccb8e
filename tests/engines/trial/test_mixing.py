"""A row's loss and gradient are its own; where they are not, the trial says so."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from random import gauss
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import rand
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparksgd.engines.trial.chance import HIGH, MIDDLE
from sparksgd.engines.trial.operations import Operations
from sparksgd.losses import cross_entropy, squared_error
from tests.engines.trials import Around, refused, rows, tried


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


class GhostNorm(nn.Module):
    """A batch-norm by hand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


class Words(nn.Module):
    """Sums embeddings of six words."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.words, self.down = nn.Embedding(20, 4, **arguments), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.words(x.long()).sum(1))


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
    assert found.output[0] == 4


class Bagged(nn.Module):
    """A bag of six words."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.down = nn.EmbeddingBag(20, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.bag(x.long()))


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


class Half(Around):
    """Computes under autocast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(6, 32), nn.Linear(32, 1)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.inner(F.gelu(self.up(x))).float()


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


IMAGES = rows(width=36, label="int64")
WORDS = rows(dtype="int64")
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
    assert tried(make(), **use).output[0] == 4


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


def noise(like: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(like)).float()


def rolled(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([gauss(1, 0.1) for _ in range(len(x))])[:, None]


NOISE = {
    "numpy's factors": lambda x: x * noise(np.random.rand(len(x), 1)),
    "numpy's dropout": lambda x: x * noise(np.random.random(x.shape) < 0.7),
    "a mask that seldom keeps": lambda x: x * noise(np.random.random(x.shape) < 0.3),
    "around values": lambda x: x + noise(np.random.normal(x.detach().numpy(), scale=0.1)),
    "by chances": lambda x: x * noise(np.random.binomial(1, np.full(x.shape, 0.5))),
    "numpy's choice": lambda x: x * noise(np.random.choice([0.0, 1.0, 2.0], len(x)))[:, None],
    "imported by name": lambda x: x * noise(rand(len(x), 1)),
    "Python's factors": lambda x: x * torch.tensor([random.random() for _ in range(len(x))])[:, None],
    "Python's, by name": lambda x: x * rolled(x),
    "one number": lambda x: x * random.gauss(0, 1),
    "torch's mask that seldom keeps": lambda x: x * (torch.rand_like(x) < 0.3),
    "torch's categories": lambda x: x * torch.multinomial(torch.ones(len(x), 4), 1),
    "torch's distributions": lambda x: x * torch.distributions.Gamma(2.0, 1.0).sample((len(x), 1)),
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_no_mixing_and_hides_none(kind: str) -> None:
    assert tried(With(NOISE[kind])).output == (4, 1)
    refused(With(lambda x: NOISE[kind](x - x.mean(0))), "depends on the other rows of its piece")


SEEDED = {
    "numpy": lambda x: x * noise(np.random.default_rng(0).random((len(x), 1))),
    "numpy's old one": lambda x: x * noise(np.random.RandomState(0).rand(len(x), 1)),
    "Python": lambda x: x * noise([random.Random(0).random() + row for row in range(len(x))])[:, None],
    "torch": lambda x: x * torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("kind", SEEDED)
def test_noise_that_starts_anew_in_each_piece_mixes(kind: str) -> None:
    refused(With(SEEDED[kind]), "depends on the other rows of its piece")


def test_a_seeded_projection_is_no_mixing() -> None:
    def projected(x: torch.Tensor) -> torch.Tensor:
        return (
            x
            @ torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
            * np.random.RandomState(0).rand()
        )

    assert tried(With(projected)).output == (4, 1)


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
    assert tried(Ordered(), data=(records, schema)).output == (4, 1)


def branching(draw: Callable[[], Any], low: float, high: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x - x.mean(0) if low <= draw() < high else x


BRANCHES = {
    "half of all": branching(lambda: torch.rand(()), 0, 0.5),
    "a fifth of numpy's": branching(lambda: np.random.rand(), 0.25, 0.45),
    "a fifth of Python's": branching(lambda: random.random(), 0.6, 0.78),
    "a fifth of torch's": branching(lambda: torch.rand(1), 0.75, 0.9),
    **{f"{n} of six of torch's": branching(lambda: torch.randint(6, ()), n, n + 1) for n in range(6)},
    **{f"{n} of six of numpy's": branching(lambda: np.random.randint(6), n, n + 1) for n in range(6)},
    **{f"{n} of six of Python's": branching(lambda: random.randrange(6), n, n + 1) for n in range(6)},
    "near the mean": branching(lambda: torch.randn(()), 0.2, 0.6),
    "without Python": lambda x: x - x.mean(0) * ((torch.rand(()) - 0.35).abs() < 0.05),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_rows_that_mix_by_chance_are_refused(kind: str) -> None:
    refused(With(BRANCHES[kind]), "depends on the other rows of its piece")


def test_masks_need_no_other_levels(monkeypatch) -> None:
    levels = set()

    class Counted(Operations):
        def __init__(self, *args: Any, steady: int | None = None, **kwargs: Any) -> None:
            levels.add(steady)
            super().__init__(*args, steady=steady, **kwargs)

    monkeypatch.setattr("sparksgd.engines.trial.probe.Operations", Counted)
    tried(nn.Sequential(nn.Dropout(), nn.Linear(6, 4), nn.AlphaDropout(), Around(4)))
    assert levels == {None, MIDDLE, HIGH}
    tried(With(lambda x: x + torch.randn_like(x)))
    assert levels == {None, *range(7)}


def test_a_permutation_of_numpy_s_mixes() -> None:
    refused(
        With(lambda x: x + x[torch.from_numpy(np.random.permutation(len(x)))]), "depends on the other rows"
    )


def test_a_dropout_s_complement_is_seen() -> None:
    def swapped(x: torch.Tensor) -> torch.Tensor:
        mask = torch.bernoulli(torch.full_like(x, 0.9))
        return x * mask + x.mean(0) * (1 - mask)

    refused(With(swapped), "depends on the other rows of its piece")


def test_noise_that_cannot_be_held_is_refused_by_what_to_do() -> None:
    def by_default(x: torch.Tensor, draw: Any = np.random.rand) -> torch.Tensor:
        return x * noise(draw(len(x), 1))

    refused(With(by_default), "a default, an attribute or a partial", "model.rows_mix = true")
    assert tried(With(by_default), rows_mix=True).output == (4, 1)


def test_a_loop_that_waits_for_another_number_ends() -> None:
    def pairs(x: torch.Tensor) -> torch.Tensor:
        first = second = random.randrange(4)
        while second == first:
            second = random.randrange(4)
        return x * (first - second)

    assert tried(With(pairs)).output == (4, 1)
    refused(With(lambda x: pairs(x - x.mean(0))), "model.rows_mix = true")


@pytest.mark.parametrize(
    "noisy",
    [
        lambda x: x * noise(np.random.default_rng().random((len(x), 1))),
        lambda x: x * (1 + os.urandom(1)[0] / 256),
    ],
)
def test_what_no_seed_reaches_is_refused(noisy: Any) -> None:
    refused(With(noisy), "two runs of one seed would differ", "default_rng() without a seed", rows_mix=True)


class InEvaluation(Around):
    """Rows mix in evaluation alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x if self.training else x - x.mean(0))


def test_rows_must_not_mix_in_evaluation_either() -> None:
    refused(InEvaluation(), "in evaluation mode, ", "the loss of row", "depends on the other rows")
    assert tried(InEvaluation(), evaluates=False).output == (4, 1)


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
    assert tried(Magnified().double(), dtype=torch.float64).output == (4, 1)


class Logarithm(Around):
    """Moved weights would leave its domain."""

    def __init__(self, first: Any) -> None:
        super().__init__()
        self.small, self.first = nn.Parameter(torch.full((6,), 1e-4)), first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x)) + self.small.log().sum()


def test_mixing_is_found_where_moved_weights_give_nan() -> None:
    assert tried(Logarithm(torch.tanh)).output == (4, 1)
    refused(Logarithm(lambda x: x - x.mean(0)), "depends on the other rows of its piece")


def test_float16_is_seen_and_bfloat16_is_not_it() -> None:
    assert tried(Half(torch.float16)).float16
    assert not tried(Half(torch.bfloat16)).float16


@pytest.mark.parametrize("number", [1, 2, 3])
def test_too_few_different_rows_are_made_to_differ(number: int) -> None:
    refused(With(lambda x: x - x.mean(0)), "depends on the other rows", data=rows(number))


def test_a_clipping_hook_is_refused() -> None:
    module = nn.Linear(6, 1)
    module.weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    refused(module, "parameter 'weight' has a hook", "solver.clip_norm")


class Unused(Around):
    """It has a layer that no row of the trial reaches, so that its gradients are 0."""

    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.dead = nn.Linear(6, 1)
        self.dead.weight.register_hook(hook)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (self.dead(x) - 1e9).relu()


def largest(gradient: torch.Tensor) -> torch.Tensor:
    """Keep the two largest elements: it is proportional to the gradient, but not linear."""
    return gradient * (gradient.abs() >= gradient.abs().flatten().topk(2).values[-1])


@pytest.mark.parametrize(
    "hook", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: g.clamp(-9, 9), torch.abs, torch.sign, largest]
)
def test_a_hook_that_is_not_linear_is_refused_where_the_trial_has_no_gradient(hook: Any) -> None:
    refused(Unused(hook), "parameter 'dead.weight' has a hook", "solver.clip_norm")


@pytest.mark.parametrize(
    "hook",
    [
        lambda g: None,
        lambda g: g * 0.5,
        lambda g: g.mul_(2),
        lambda g: g - g.mean(1, keepdim=True),
        lambda g: g * (torch.rand(6) > 0.5),
        lambda g: g.cumsum(1) / 3,
    ],
)
def test_a_linear_hook_is_none(hook: Any) -> None:
    assert tried(Unused(hook))


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-0.01, 0.01)


def test_an_autograd_function_that_clips_is_refused() -> None:
    refused(nn.Sequential(nn.Linear(6, 1), With(lambda x: Clipped.apply(x).expand(-1, 6))), "times the loss")


def test_a_hook_that_masks_is_kept() -> None:
    module = nn.Linear(6, 1)
    mask = torch.tensor([[1.0, 0, 1, 0, 1, 0]])
    module.weight.register_hook(lambda gradient: gradient * mask)
    assert tried(module).output == (4, 1)


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
