"""Modules and losses that a worker could not compute with are refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_jobs import ROWS, Job, noisy_job, picky, slope
from torch import nn

from sparksgd.errors import ModelError, UserCodeError
from sparksgd.models.losses import squared_error


class Summing(nn.Module):
    """Adds up what it sees, in a buffer."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.inner = slope()
        self.in_place = in_place
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            self.seen += x.sum()
        else:
            self.seen = self.seen + x.sum()
        return self.inner(x)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_that_changes_with_the_rows_is_refused(tmp_path: Path, in_place: bool) -> None:
    job = Job(tmp_path, Summing(in_place), [ROWS])
    with pytest.raises(ModelError, match=r"forward changes seen, .* element 0 becomes [\d.]+ and [\d.]+\."):
        job.tried()


def test_a_batch_norm_s_buffers_may_change(tmp_path: Path) -> None:
    job = noisy_job(tmp_path)
    assert job.tried(rows=1) == ((4,), False)  # the other rows are variants of the one


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda output, label: output.sum(), "()"),
        (lambda output, label: output, "(4, 1)"),
        (lambda output, label: (output - label).square(), "(4, 4)"),
        (lambda output, label: 0.5, "float"),
    ],
    ids=["a mean", "a column", "a square", "a number"],
)
def test_a_loss_without_one_value_per_row_is_refused(
    tmp_path: Path, loss: Callable[..., Any], shape: str
) -> None:
    job = Job(tmp_path, slope(), [ROWS], loss=loss)
    with pytest.raises(ModelError) as refused:
        job.tried()
    assert str(refused.value).startswith(
        f"the loss gave {shape} for 4 rows, but must give one value per row, (4,)"
    )


def test_a_loss_on_another_device_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path, slope(), [ROWS], loss=lambda output, label: output[:, 0].to("meta"))
    with pytest.raises(ModelError, match="the loss is on meta, but only the CPU is supported"):
        job.tried()


def test_a_module_that_gives_no_tensor_is_refused(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = slope()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return self.inner(x), 1

    def first(output: tuple[torch.Tensor, int], label: torch.Tensor) -> torch.Tensor:
        return squared_error(output[0], label)

    with pytest.raises(ModelError, match="gives a tuple with a int as output_1, but must give a tensor, a"):
        Job(tmp_path, Pair(), [ROWS], loss=first).tried()


def test_a_loss_that_raises_is_the_user_s_error(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="the module or its loss raised KeyError: 'no such label'"):
        Job(tmp_path, slope(), [ROWS], loss=picky).tried()
