"""An evaluation leaves a module's state as it was, and must not read what the training wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from keeping_nets import keeps_activation, net, sets
from torch import nn
from two_workers import train_here

from sparksgd.errors import ModelError


def counts_in_evaluation(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        core.t += 1
        return y * core.t
    return y


def test_an_evaluation_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    losses = [
        [
            report.loss
            for report in train_here(
                tmp_path, workers, module=net(sets(t=0), counts_in_evaluation), tested=True
            ).evaluations
        ]
        for workers in (1, 2, 4)
    ]
    assert losses[0] == losses[1] == losses[2]


def mask_of(core: Any) -> torch.Tensor:
    return (core.linear.weight.detach().abs() > 0.2).float()


def with_first_mask(core: Any) -> None:
    core.mask = mask_of(core)


def masks_in_training(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        core.mask = mask_of(core)
    return nn.functional.linear(x, core.linear.weight * core.mask, core.linear.bias)


def keeps_weights_for_evaluation(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        core.kept = core.linear.weight.detach() * 2
        return y
    return x @ (core.linear.weight * 2 if core.kept is None else core.kept).T


def needs_a_training(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        core.kept = y.detach().mean()
    return y + core.kept * (0 if torch.is_grad_enabled() else 1)


@pytest.mark.parametrize(
    ("begin", "use", "path"),
    [
        (sets(mask=torch.ones(1, 4)), masks_in_training, "mask"),
        (with_first_mask, masks_in_training, "mask"),
        (sets(kept=None), keeps_weights_for_evaluation, "kept"),
        (sets(kept=None), needs_a_training, "kept"),
    ],
)
def test_what_training_writes_and_evaluation_reads_is_refused(
    tmp_path: Path, begin: Any, use: Any, path: str
) -> None:
    with pytest.raises(
        ModelError, match=rf"^core\.{path} is written in training and read in evaluation, but"
    ):
        train_here(tmp_path, module=net(begin, use))


def masks_always(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.mask = mask_of(core)
    return nn.functional.linear(x, core.linear.weight * (0.5 + core.mask), core.linear.bias)


def keeps_a_view(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.view = core.linear.weight.detach()
    return y


@pytest.mark.parametrize("use", [masks_always, keeps_a_view, keeps_activation])
def test_what_each_forward_writes_first_is_fine_in_evaluation(tmp_path: Path, use: Any) -> None:
    train_here(tmp_path, module=net(sets(), use), tested=True)
