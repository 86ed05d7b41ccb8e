"""Trainings inside `with` blocks of torch: as without them, as in forward, or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from two_workers import by_plain_torch, rows_of, train_here

from sparksgd.errors import ModelError
from sparksgd.training.state import Training

BITS_16 = (torch.bfloat16, torch.float16)


class Net(nn.Module):
    """Computes in 16 bits, if `dtype` is such a type; its output then is of that type."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.inner, self.outer = nn.Linear(4, 64), nn.Linear(64, 1)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype):
            return self.outer(self.inner(x).tanh()).squeeze(1)


def bits(run: Training) -> object:
    return run.flat.parameters_sha256(), [evaluation.loss for evaluation in run.evaluations]


@pytest.mark.parametrize("dtype", BITS_16)
@pytest.mark.parametrize("workers", [1, 3])
def test_losses_of_16_bits_train_as_plain_torch_does(
    tmp_path: Path, dtype: torch.dtype, workers: int
) -> None:
    module = Net(dtype)
    train_here(
        tmp_path / "ours", workers, module=module, tested=True, train={"rows_per_step": 48, "epochs": 8}
    )
    right = by_plain_torch(tmp_path / "plain", Net(dtype), 8)
    ours = [value for parameter in module.parameters() for value in parameter.flatten().tolist()]
    assert ours == pytest.approx(right, rel=0.02, abs=0.01)
    assert ours != pytest.approx([v for p in Net().parameters() for v in p.flatten().tolist()], abs=0.05)


class PartlySingle(Net):
    """One of its layers is in 32 bits, also in its backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype):
            hidden = self.inner(x).tanh()
            with torch.autocast("cpu", enabled=False):
                return self.outer(hidden.float()).squeeze(1)


class Orthogonal(torch.optim.SGD):
    """A step along the gradient, made nearly orthogonal by products of matrices."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                direction = p.grad.reshape(len(p), -1)
                direction = direction / (direction.norm() + 1e-6)
                direction = 1.5 * direction - 0.5 * (direction @ direction.t()) @ direction
                p.sub_(group["lr"] * direction.view_as(p))


@pytest.mark.parametrize("dtype", BITS_16)
@pytest.mark.parametrize("kind", [Net, PartlySingle])
@pytest.mark.parametrize(
    "sections",
    [{}, {"optimizer": {"name": f"{__name__}:Orthogonal", "lr": 0.05}}, {"train": {"rows_per_backward": 2}}],
    ids=["SGD", "an own optimiser", "backward passes of two rows"],
)
def test_autocast_around_the_training_is_autocast_in_forward(
    tmp_path: Path, dtype: torch.dtype, kind: type[Net], sections: dict[str, Any]
) -> None:
    """Not with what it has cast of the weights of the first step, nor in backward, on any worker."""
    inside = train_here(tmp_path / "inside", module=kind(dtype), tested=True, **sections)
    for workers in (1, 3):
        for cached in (True, False):
            with torch.autocast("cpu", dtype, cache_enabled=cached):
                where = tmp_path / f"around {workers} {cached}"
                around = train_here(where, workers, module=kind(), tested=True, **sections)
            assert bits(around) == bits(inside)


HARMLESS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "the CPU": lambda: torch.device("cpu"),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_block_that_changes_no_training(tmp_path: Path, name: str) -> None:
    right, module = train_here(tmp_path / "without", module=Net(), tested=True), Net()
    with HARMLESS[name]():
        assert bits(train_here(tmp_path / "inside", module=module, tested=True)) == bits(right)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is nn.functional.linear else result


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


REFUSED: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "a function mode": (Doubled, f"the training runs inside {__name__}.Doubled, which may change"),
    "a dispatch mode": (Seen, f"the training runs inside {__name__}.Seen, which may change"),
    "another device": (
        lambda: torch.device("meta"),
        "torch's default device is meta, but only the CPU is supported",
    ),
    "hooks of saved tensors": (
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.bfloat16(), lambda x: x.float()),
        "the training runs inside torch.autograd.graph.saved_tensors_hooks, or save_on_cpu",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_workers_would_not_have_is_refused(tmp_path: Path, name: str) -> None:
    make, called = REFUSED[name]
    rows_of(tmp_path)
    module = Net()
    with make(), pytest.raises(ModelError, match=f"^{called}"):
        train_here(tmp_path, module=module)


def test_a_module_that_was_made_in_inference_mode_is_refused(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = Net()
    with pytest.raises(
        ModelError, match=r"^inner\.weight was made in torch\.inference_mode, so it cannot be"
    ):
        train_here(tmp_path, module=module)
