"""Parameters that share memory with each other, or with what somebody keeps, are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.models.losses import squared_error
from tests.engines.trials import Around, refused, tried


def transposed() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 1))
    module[1].weight = nn.Parameter(module[0].weight.t())
    return module


def overlapping() -> nn.Module:
    module, vector = Around(), torch.randn(9)
    module.a, module.b = nn.Parameter(vector[:6]), nn.Parameter(vector[3:])
    return module


def a_detached_buffer() -> nn.Module:
    module = Around()
    module.register_buffer("first", module.inner.weight.detach())
    return module


def a_view() -> nn.Module:
    module = Around()
    module.row = module.inner.weight.data[0]
    return module


def expanded() -> nn.Module:
    module = Around()
    module.inner.weight = nn.Parameter(torch.zeros(1, 1).expand(1, 6))
    return module


def an_array() -> nn.Module:
    module = Around()
    module.numbers = module.inner.weight.detach().numpy()[0, 1:]
    return module


def a_closure_s_view() -> nn.Module:
    module = Around()
    weight = module.inner.weight.detach()
    module.inner.register_forward_hook(lambda part, given, made: made * weight.norm())
    return module


@pytest.mark.parametrize(
    ("make", "phrases"),
    [
        (transposed, ["'0.weight' and '1.weight' share memory", "transpose or slice it in forward"]),
        (overlapping, ["'a' and 'b' share memory"]),
        (a_detached_buffer, ["'inner.weight' and 'first' share memory", "keep a clone"]),
        (a_view, ["'inner.weight' and 'row' share memory"]),
        (an_array, ["'inner.weight' and 'numbers' share memory"]),
        (a_closure_s_view, ["'inner.weight' and ", "'s variable weight\" share memory"]),
        (expanded, ["'inner.weight' is expanded"]),
    ],
)
def test_tensors_that_share_memory(make: Any, phrases: list[str]) -> None:
    refused(make(), *phrases)


def test_a_loss_that_keeps_a_view_of_a_weight() -> None:
    module = nn.Linear(6, 1)
    weight = module.weight.detach()
    refused(
        module,
        "'weight' and \"loss's variable weight\" share memory",
        loss=lambda output, label: squared_error(output, label) + weight.square().sum(),
    )


def test_parts_of_one_vector_that_do_not_overlap_are_no_false_alarm() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    FlatModule(module)  # as after an earlier training
    tried(module)
    columns, module = torch.randn(1, 12), Around()
    module.inner.weight, module.other = nn.Parameter(columns[:, ::2]), nn.Parameter(columns[:, 1::2])
    tried(module)
