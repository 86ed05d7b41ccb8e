"""Which parameters train, what their gradients may do, and how lazy ones get their shapes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.models.losses import cross_entropy
from tests.engines.trials import Around, refused, rows, tried

# Gradients


def test_no_parameter_gets_a_gradient() -> None:
    class Cut(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).detach()

    refused(Cut(), "no parameter gets a gradient", "detach()")


def test_parameters_without_a_gradient_are_named(caplog: pytest.LogCaptureFixture) -> None:
    module = Around()
    module.spare = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        tried(module)
    assert "no gradient reached spare.weight, spare.bias in the trial's 4 steps" in caplog.text


def test_a_post_accumulate_hook() -> None:
    module = Around()
    module.inner.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    refused(module, "parameter 'inner.bias' has a post-accumulate-grad hook")


class KeepsGradients(Around):
    """A buffer that follows the size of gradients."""

    def __init__(self, *, by: str) -> None:
        super().__init__()
        self.register_buffer("size", torch.zeros(()))
        if by == "module":
            self.inner.register_full_backward_hook(lambda module, into, out: self.keep(out[0]))
        elif by == "parameter":
            self.inner.weight.register_hook(self.keep)

    def keep(self, gradient: torch.Tensor) -> None:
        self.size.copy_(gradient.abs().mean())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.size.grad_fn is None and not self.inner.weight._backward_hooks and y.requires_grad:
            y.register_hook(self.keep)
        return y


@pytest.mark.parametrize("by", ["module", "parameter", "activation"])
@pytest.mark.parametrize("has_pieces", [True, False])
def test_what_the_backward_pass_keeps_of_gradients_is_refused(by: str, has_pieces: bool) -> None:
    refused(KeepsGradients(by=by), "size", has_pieces=has_pieces)


# parameters() and lazy modules


class Adapted(nn.Module):
    """Gives its adapter alone as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter(x)

    def parameters(self, recurse: bool = True) -> Any:
        return self.adapter.parameters(recurse)


def test_only_what_parameters_gives_is_trained() -> None:
    tried(Adapted())
    flat = FlatModule(Adapted())
    assert flat.parameters.shape == (7,)
    assert [name for name, _ in flat.constants()] == ["base.weight", "base.bias"]


def test_parameters_that_are_not_the_module_s() -> None:
    class Strange(Around):
        def parameters(self, recurse: bool = True) -> Any:
            return [torch.zeros(3, requires_grad=True)]

    refused(Strange(), "parameters() of Strange gives a tensor of shape (3,)", "register it")


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


def test_lazy_modules_get_their_shapes_from_the_seed() -> None:
    data = rows(width=36, label="int64")
    one, two, other = lazy(), lazy(), lazy()
    weight, state = one[5].weight, torch.get_rng_state()
    for module, seed in ((one, 1), (two, 1), (other, 2)):
        tried(module, cross_entropy, data, classifies=True, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert one[5].weight is weight
    assert [type(part).__name__ for part in one][1:3] == ["Conv2d", "BatchNorm2d"]
    assert (one[5].weight.shape, one[5].in_features, one[2].num_features) == ((3, 64), 64, 4)
    assert torch.equal(one[5].weight, two[5].weight)
    assert not torch.equal(one[5].weight, other[5].weight)
    assert float(one[2].num_batches_tracked) == 0
    assert torch.equal(one[2].running_mean, torch.zeros(4))
    assert one(torch.zeros(2, 36)).shape == (2, 3)
    copy.deepcopy(one)


def test_a_lazy_part_that_forward_does_not_reach() -> None:
    module = Around()
    module.spare = nn.LazyLinear(3)
    refused(module, "spare.weight has no shape yet", "remove it, or use it")
