"""Evaluation is as torch's own loops make it, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.engines.modes import evaluating


def standing(module: nn.Module) -> FlatModule:
    flat = FlatModule(module)
    flat.standing.at(flat.parameters.numpy())
    return flat


def test_evaluation_mode_ends_with_each_part_in_its_own_mode() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    module.append(nn.Linear(1, 1))
    flat = standing(module)

    def evaluate() -> None:
        with evaluating(flat):
            assert [part.training for part in module.modules()] == [False] * 4
            assert not torch.is_grad_enabled()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate()
    assert [part.training for part in module.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()
