"""A saved model whose attributes lie in the memory of weights: each tensor is loaded with its own values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from two_workers import rows_of

import sparksgd

CONFIG = {
    "data": {"features": "x", "label": "y"},
    "loss": {"name": "squared_error"},
    "engine": {"name": "inline"},
    "optimizer": {"lr": 0.05},
    "train": {"rows_per_step": 12, "num_shards": 4, "epochs": 3},
}


def spectral(**options: int) -> nn.Module:
    """The attribute `weight` is in the memory of `weight_orig` until the first forward."""
    normed = nn.utils.spectral_norm(nn.Linear(4, 8), **options)
    return nn.Sequential(normed, nn.Tanh(), nn.utils.spectral_norm(nn.Linear(8, 1)), nn.Flatten(0))


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 1), nn.Flatten(0))


class Begun(nn.Module):
    """What its buffer was at first, in memory of its own once forward has run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(1, 4))
        self.first = self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first.data_ptr() == self.scale.data_ptr():
            self.first = torch.full((1, 4), 0.5)
        return self.linear(x * self.scale + self.first).squeeze(1)


class Viewing(nn.Module):
    """Attributes that are views when it is made, and have memory of their own once forward has run."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(1, 4), persistent=kind != "a view of a constant")
        self.table = torch.ones(1, 4)
        self.kind, self.first, self.of_numpy = kind, self.table[:, :4], np.ones((1, 4), np.float32)
        if kind == "a view of a constant":
            self.first = self.scale[:, :]
        elif kind == "an array in a buffer":
            self.of_numpy = self.scale.numpy()

    def part(self) -> Viewing:
        """Do what the first forward does."""
        self.first = torch.full((1, 4), 0.5)
        self.of_numpy = np.full((1, 4), 0.25, np.float32)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(
            x * self.scale + self.first + self.table + torch.from_numpy(self.of_numpy)
        ).squeeze(1)


VIEWS = ["a view of a constant", "a view of an attribute", "an array in a buffer"]


@pytest.mark.parametrize("kind", VIEWS)
def test_what_was_parted_before_the_training_is_loaded_apart(tmp_path: Path, kind: str) -> None:
    rows_of(tmp_path / "rows")
    module = Viewing(kind).part()
    sparksgd.train(CONFIG, tmp_path / "rows", module=module, out=tmp_path / "run")
    loaded = sparksgd.load_model(tmp_path / "run" / "model", Viewing(kind)).module
    assert torch.equal(outputs(loaded), outputs(module))


class Tail(nn.Module):
    """A view of a part of its buffer, which stays one."""

    def __init__(self, scale: float = 1.0, *, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("scale", torch.full((1, 4), scale), persistent=persistent)
        if persistent:
            self.tail = self.scale[:, 2:]
        else:
            self.register_buffer("tail", self.scale[:, 2:], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.scale).squeeze(1)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "spectral_norm": spectral,
    "spectral_norm with more iterations": lambda: spectral(n_power_iterations=3),
    "spectral_norm over the other dimension": lambda: spectral(dim=1),
    "weight_norm": weight_normed,
    "an attribute in a buffer's memory": Begun,
}


def outputs(module: nn.Module) -> torch.Tensor:
    module.eval()
    with torch.no_grad():
        output: torch.Tensor = module(torch.linspace(-1, 1, 40).view(10, 4))
    return output


@pytest.mark.parametrize("name", MAKERS)
def test_a_given_module_is_loaded_as_it_was_saved(tmp_path: Path, name: str) -> None:
    rows_of(tmp_path / "rows")
    module = MAKERS[name]()
    sparksgd.train(CONFIG, tmp_path / "rows", tmp_path / "rows", module=module, out=tmp_path / "run")
    loaded = sparksgd.load_model(tmp_path / "run" / "model", MAKERS[name]()).module
    assert torch.equal(outputs(loaded), outputs(module))
    saved = module.state_dict()
    assert [key for key, value in loaded.state_dict().items() if not torch.equal(value, saved[key])] == []


@pytest.mark.parametrize("name", MAKERS)
def test_a_named_module_is_loaded_as_it_was_saved(tmp_path: Path, name: str) -> None:
    rows_of(tmp_path / "rows")
    named = CONFIG | {"model": {"name": f"{__name__}:by_number", "number": list(MAKERS).index(name)}}
    run = sparksgd.train(named, tmp_path / "rows", tmp_path / "rows", out=tmp_path / "run")
    loaded = sparksgd.load_model(tmp_path / "run" / "model", trust=[__name__]).module
    assert torch.equal(outputs(loaded), outputs(run.module))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_view_of_a_buffer_stays_one(tmp_path: Path, persistent: bool) -> None:
    rows_of(tmp_path / "rows")
    module = Tail(3.0, persistent=persistent)
    sparksgd.train(CONFIG, tmp_path / "rows", module=module, out=tmp_path / "run")
    loaded = sparksgd.load_model(tmp_path / "run" / "model", Tail(persistent=persistent)).module
    assert loaded.scale.tolist() == [[3.0] * 4]
    loaded.scale.zero_()
    assert not loaded.tail.any()


def by_number(number: int) -> nn.Module:
    return list(MAKERS.values())[number]()
