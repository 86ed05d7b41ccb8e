"""A forward or a loss that reaches tensors which are not the copy's is refused; what only looks so is not."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from pyspark import cloudpickle
from small_nets import Scaled
from torch import nn

from sparksgd.arithmetic.copies import copied, pickled
from sparksgd.models.losses import squared_error
from tests.engines.trials import Around, refused, tried

PAST = "of the module that was copied, not of the copy"

KEPT: dict[str, Any] = {}


class ByClass(Scaled):
    """Reaches its parameter by its class."""

    module: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * ByClass.module[0].scale


def by_global() -> nn.Module:
    KEPT["module"] = Scaled(lambda: KEPT["module"].scale)
    return KEPT["module"]


def by_global_detached() -> nn.Module:
    KEPT["module"] = Scaled(lambda: KEPT["module"].scale.detach())
    return KEPT["module"]


def by_default() -> nn.Module:
    module = Scaled()
    module.reach = lambda module=module: module.scale
    return module


def by_class() -> nn.Module:
    ByClass.module = [ByClass()]
    return ByClass.module[0]


def a_global_buffer() -> nn.Module:
    module = KEPT["module"] = Scaled(lambda: KEPT["module"].size)
    module.register_buffer("size", torch.ones(1))
    return module


def a_global_attribute() -> nn.Module:
    module = KEPT["module"] = Scaled(lambda: KEPT["module"].tables["a"][0])
    module.tables = {"a": [torch.ones(1)]}
    return module


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (by_global, "'scale'"),
        (by_global_detached, "'scale'"),
        (by_class, "'scale'"),
        (a_global_buffer, "'size'"),
        (a_global_attribute, "\"tables['a'][0]\""),
    ],
)
def test_a_forward_that_reaches_past_the_copy(make: Any, name: str) -> None:
    refused(make(), f"uses {name} {PAST}", "Reach it by self")


def test_a_default_of_a_lambda_is_the_copy_s() -> None:
    module = by_default()
    copy = copied(module)
    assert copy.reach.__defaults__ == (copy,)
    assert module.reach.__defaults__ == (module,)
    travelled = pickle.loads(pickled(module, {"": module}, cloudpickle.CloudPickler))
    assert travelled.reach.__defaults__ == (travelled,)
    tried(module)


def test_a_loss_that_reaches_past_the_copy() -> None:
    module = KEPT["module"] = nn.Linear(6, 1)
    refused(module, f"uses 'weight' {PAST}", loss=_decayed_globally)


def _decayed_globally(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return squared_error(output, label) + 0.1 * KEPT["module"].weight.square().sum()


def clamps_globally() -> torch.Tensor:
    numbers = KEPT["module"].inner.weight.detach().numpy()
    numbers[:] = numbers * 0.5  # past torch
    return torch.ones(1)


def keeps_globally() -> torch.Tensor:
    KEPT["module"].seen = 1
    return torch.ones(1)


@pytest.mark.parametrize(
    ("reach", "phrases"),
    [
        (clamps_globally, [f"uses 'inner.weight' {PAST}"]),
        (keeps_globally, [f"set 'seen' {PAST}", "Let it set an attribute of self"]),
    ],
)
def test_what_a_copy_changes_of_the_caller_s_is_refused_and_put_back(reach: Any, phrases: list[str]) -> None:
    module = KEPT["module"] = Scaled(reach)
    before = module.inner.weight.tolist()
    refused(module, *phrases)
    assert (module.inner.weight.tolist(), hasattr(module, "seen")) == (before, False)


# What requires a gradient, and is no parameter of the module


GLOBAL = torch.ones(1, requires_grad=True)


def test_a_global_that_requires_a_gradient() -> None:
    refused(Scaled(lambda: GLOBAL), "a tensor of shape (1,)", "a global, a closure or the loss holds it")


def test_a_global_constant_is_no_false_alarm() -> None:
    tried(Scaled(lambda: GLOBAL.detach()))


def test_an_attribute_that_requires_a_gradient() -> None:
    module = Around()
    module.bias2 = torch.zeros(1, requires_grad=True)
    module.forward = functools.partial(_plus_bias2, module)  # type: ignore[method-assign]
    refused(module, "'bias2' requires a gradient, but is no parameter", "make it an nn.Parameter")


def _plus_bias2(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.inner(x) + module.bias2


class Forces(nn.Module):
    """The derivative of an energy for positions, which forward lets require a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force[:, :1]


def test_a_leaf_that_each_forward_makes_is_no_false_alarm() -> None:
    tried(Forces())


class ArcFace(nn.Module):
    """A loss with a weight."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=not frozen)

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return squared_error(output, label) * self.weight


def test_a_loss_with_a_parameter() -> None:
    refused(nn.Linear(6, 1), "the loss ArcFace has the trainable parameter 'weight'", loss=ArcFace())
    tried(nn.Linear(6, 1), loss=ArcFace(frozen=True))


# A method of the copy


class Keeps(Around):
    """A hook of its own keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.register_forward_hook(self.keep)

    def keep(self, part: nn.Module, given: Any, made: torch.Tensor) -> None:
        self.seen = made


def test_a_hook_that_is_a_method_keeps_what_it_likes_on_the_copy() -> None:
    module = Keeps()
    tried(module)
    assert not hasattr(module, "seen")
