"""Modules with modes of their own train as in torch's loops, and evaluations shape nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from changing_modules import Adapter
from compared_states import NUMBERS, WORDS, Rows, States, assert_equal, plain, product, squared
from torch import nn


class Adapted(nn.Module):
    """Two adapters, one of which is trained with its base."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.one, self.two = Adapter(6, 1), Adapter(6, 1)
        self.two.base.weight.requires_grad_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.one(x) + self.two(x))[:, 0]


class Freezing(nn.Module):
    """Training mode freezes the backbone, and its batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 1)

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        self.backbone.eval()
        self.backbone.requires_grad_(False)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x).relu())[:, 0]


class Restless(nn.Module):
    """Changes its parameters and statistics when it is evaluated; a constant may not change there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.words = nn.Embedding(6, 4, max_norm=1.0)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("cache", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.norm.running_mean += 1
            self.out.weight.data = self.out.weight.data * 2
            self.out.bias.data.add_(1)
            self.cache = self.out.weight.detach() * 2 if self.cache is None else self.cache
        return self.out(self.norm(self.words(x[:, 0].long())))[:, 0]


def evaluated(module: nn.Module) -> None:
    """Evaluate as torch's own loops do."""
    module.eval()
    with torch.no_grad():
        module(torch.tensor([x for x, _ in NUMBERS]))
    module.train()


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("make", [Adapted, Freezing])
def test_with_modes_of_its_own_a_module_trains_as_in_torch_s_loops(
    tmp_path: Path, make: Callable[[], nn.Module], shards: int
) -> None:
    expected = plain(make().train(), NUMBERS, 9, between=evaluated)
    states = States()
    made = product(tmp_path, make(), NUMBERS, 9, shards, test=True, states=states, train={"eval_every": 1})
    assert_equal(made, expected, rtol=1e-4, atol=1e-5)
    assert states.training is not None
    module, losses = make(), [report.loss for report in states.training.evaluations]
    for state, loss in zip(made, losses, strict=True):
        module.load_state_dict(state)
        output = module.train()(torch.tensor([x for x, _ in NUMBERS]))  # not merged
        assert squared(output, torch.tensor([y for _, y in NUMBERS])).mean().item() == pytest.approx(
            loss, rel=1e-4
        )


@pytest.mark.parametrize(("make", "rows"), [(Adapted, NUMBERS), (Freezing, NUMBERS), (Restless, WORDS)])
def test_when_it_is_evaluated_shapes_nothing(
    tmp_path: Path, make: Callable[[], nn.Module], rows: Rows
) -> None:
    never = product(tmp_path, make(), rows, 7, 4)
    for every in (1, 3):
        often = product(tmp_path, make(), rows, 7, 4, test=True, train={"eval_every": every})
        assert_equal(often, never, rtol=0, atol=0)


class Forces(nn.Module):
    """Its output is a gradient by its features, as force fields have it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(at).square().sum(), at, create_graph=True)
        return force.sum(1)


def test_a_forward_that_takes_gradients_is_evaluated(tmp_path: Path) -> None:
    assert len(product(tmp_path, Forces(), NUMBERS, 2, 4, test=True)) == 2


def test_modes_that_the_caller_set_stay(tmp_path: Path) -> None:
    module = Adapted()
    module.two.base.eval()
    product(tmp_path, module, NUMBERS, 2, 2, test=True)
    assert [part.training for part in module.modules()] == [True, True, True, True, False]
