"""Numbers that forward draws are no mixing and hide none; what no seed reaches is refused."""

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
from small_nets import With
from torch import nn

from sparksgd.engines.trial.chance import HIGH, MIDDLE
from sparksgd.engines.trial.operations import Operations
from tests.engines.trials import Around, refused, tried

# Noise


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
    assert tried(With(NOISE[kind])).shapes[""] == (4, 1)
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

    assert tried(With(projected)).shapes[""] == (4, 1)


def test_a_permutation_of_numpy_s_mixes() -> None:
    refused(
        With(lambda x: x + x[torch.from_numpy(np.random.permutation(len(x)))]), "depends on the other rows"
    )


def test_a_dropout_s_complement_is_seen() -> None:
    def swapped(x: torch.Tensor) -> torch.Tensor:
        mask = torch.bernoulli(torch.full_like(x, 0.9))
        return x * mask + x.mean(0) * (1 - mask)

    refused(With(swapped), "depends on the other rows of its piece")


# Branches of chance


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


# Noise that cannot be held


def test_noise_that_cannot_be_held_is_refused_by_what_to_do() -> None:
    def by_default(x: torch.Tensor, draw: Any = np.random.rand) -> torch.Tensor:
        return x * noise(draw(len(x), 1))

    refused(With(by_default), "a default, an attribute or a partial", "model.rows_mix = true")
    assert tried(With(by_default), rows_mix=True).shapes[""] == (4, 1)


def test_a_loop_that_waits_for_another_number_ends() -> None:
    def pairs(x: torch.Tensor) -> torch.Tensor:
        first = second = random.randrange(4)
        while second == first:
            second = random.randrange(4)
        return x * (first - second)

    assert tried(With(pairs)).shapes[""] == (4, 1)
    refused(With(lambda x: pairs(x - x.mean(0))), "model.rows_mix = true")


@pytest.mark.parametrize(
    "noisy",
    [
        lambda x: x * noise(np.random.default_rng().random((len(x), 1))),
        lambda x: x * (1 + int.from_bytes(os.urandom(4), "big") / 2**32),
    ],
)
def test_what_no_seed_reaches_is_refused(noisy: Any) -> None:
    refused(With(noisy), "two runs of one seed would differ", "default_rng() without a seed", rows_mix=True)
