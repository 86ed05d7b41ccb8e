"""What refers to the module, of what it holds or of its loss, refers to the copy in a copy."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Scaled
from torch import nn
from two_workers import by_plain_torch, train_here

from sparksgd.models.losses import squared_error

# Of the module


def by_lambda() -> nn.Module:
    module = Scaled(width=4)
    module.reach = lambda: module.scale
    return module


def by_weak_reference() -> nn.Module:
    module = Scaled(width=4)
    reference = weakref.ref(module)
    module.reach = lambda: reference().scale
    module.alive = [lambda: module]
    return module


def by_hook() -> nn.Module:
    module = Scaled(width=4)
    module.inner.register_forward_hook(lambda part, given, made: made * module.scale)
    return module


def by_hook_of_a_parameter() -> nn.Module:
    module = Scaled(width=4)
    module.inner.weight.register_hook(lambda gradient: gradient * (2 - module.scale.detach()))
    return module


def wholly() -> nn.Module:
    module = nn.Linear(4, 1)
    around = nn.Module()
    around.inner = module
    around.forward = lambda x: module(x)
    return around


def detached() -> nn.Module:
    module = Scaled(width=4)
    module.reach = lambda: 1 + module.scale * module.inner.bias.detach()
    return module


def a_buffer() -> nn.Module:
    module = Scaled(width=4)
    module.register_buffer("size", torch.full((1,), 2.0))
    module.reach = lambda: module.size * module.scale
    return module


def an_attribute() -> nn.Module:
    module = Scaled(width=4)
    module.tables = {"a": [torch.full((1,), 2.0)]}
    module.reach = lambda: module.tables["a"][0] * module.scale
    return module


def storing() -> nn.Module:
    module = Scaled(width=4)

    def store(part: nn.Module, given: Any, made: torch.Tensor) -> None:
        module.seen = made

    module.inner.register_forward_hook(store)
    module.reach = lambda: module.scale + 0.1 * module.seen
    return module


REACHES = [
    by_lambda, by_weak_reference, by_hook, by_hook_of_a_parameter, wholly, detached, a_buffer, an_attribute,
    storing,
]  # fmt: skip


@pytest.mark.parametrize("make", REACHES)
def test_what_a_module_reaches_by_what_it_holds_trains_as_in_plain_torch(tmp_path: Path, make: Any) -> None:
    def made() -> nn.Module:
        torch.manual_seed(1)
        return make()

    modules = made(), made()
    one, two = (
        train_here(tmp_path, workers, module=module, train={"rows_per_step": 48, "epochs": 5})
        for workers, module in enumerate(modules, 1)
    )
    assert one.flat.parameters_sha256() == two.flat.parameters_sha256()
    assert one.flat.parameters.tolist() == pytest.approx(by_plain_torch(tmp_path, made(), 5), abs=1e-5)
    assert not hasattr(modules[0], "seen")


# Of its loss


def squared_with_decay(module: nn.Module) -> Any:
    return lambda output, label: squared_error(output, label) + 0.3 * module.weight.square().sum()


class Decaying(nn.Module):
    """A loss that has the module as its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return squared_error(output, label) + 0.3 * self.module.weight.square().sum()


LOSS: Any = None


@pytest.mark.parametrize("of_module", [squared_with_decay, Decaying])
def test_a_loss_that_refers_to_the_module_trains_as_in_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_module: Any
) -> None:
    ended = []
    for workers in (0, 1, 2):
        torch.manual_seed(1)
        module = nn.Linear(4, 1)
        loss = of_module(module)
        if not workers:
            ended.append(by_plain_torch(tmp_path, module, 5, loss))
            continue
        monkeypatch.setattr(sys.modules[__name__], "LOSS", loss)
        sections = {"loss": {"name": f"{__name__}:LOSS"}, "train": {"rows_per_step": 48, "epochs": 5}}
        ended.append(train_here(tmp_path, workers, module=module, **sections).flat.parameters.tolist())
    assert ended[1] == ended[2]
    assert ended[1] == pytest.approx(ended[0], abs=1e-5)
