"""A saved model gives the outputs of the trained module to the bit, also by what no state_dict has."""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from two_workers import rows_of

from sparksgd.config import Config
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import DataError, ModelError
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.model import load_model
from sparksgd.training.loop import train

HERE = Path(__file__).parent


class RandomFeatures(nn.Module):
    """y = w cos(x A + b), with random A, b of torch's, numpy's or no known generator."""

    def __init__(self, kind: str = "buffer") -> None:
        super().__init__()
        self.out = nn.Linear(16, 1)
        drawn = torch.randn(4, 16)
        self.kind, self.scale, self.tables = kind, 1.0, []
        if kind == "buffer":
            self.register_buffer("drawn", drawn, persistent=False)
        elif kind == "attribute":
            self.drawn = drawn
        elif kind == "numpy":
            self.drawn = np.random.standard_normal((4, 16)).astype(np.float32)
        elif kind == "unseeded":
            self.drawn = np.random.default_rng().standard_normal((4, 16)).astype(np.float32)
        elif kind == "list":
            self.tables = [torch.from_numpy(np.random.default_rng().standard_normal((4, 16))).float()]
            self.drawn = None
        elif kind == "number":
            self.register_buffer("drawn", drawn)
            self.scale = secrets.randbelow(1000) / 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drawn = self.tables[0] if self.drawn is None else torch.as_tensor(self.drawn)
        return self.out(torch.cos(x @ drawn * self.scale))


def saved(folder: Path, name: str, module: nn.Module | None = None, **arguments: Any) -> nn.Module:
    """Train a module, and save it at run/; return it."""
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y"},
            "model": {"name": f"{__name__}:{name}", **arguments},
            "loss": {"name": "squared_error"},
            "optimizer": {"lr": 0.05},
            "train": {"rows_per_step": 12, "num_shards": 2, "epochs": 1, "seed": 7},
        }
    )
    rows, observers = rows_of(folder / "rows"), [RunFolder(folder / "run")]
    return train(
        config, rows=rows, test=None, make_engine=InlineEngine, module=module, observers=observers
    ).module.eval()


X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "numpy", "unseeded", "list", "number"])
def test_the_loaded_model_gives_the_same_outputs_to_the_bit(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trained = saved(tmp_path, "RandomFeatures", kind=kind)
    loaded = load_model(tmp_path / "run" / "model").module
    assert torch.equal(loaded(X), trained(X))
    assert not caplog.records
    state = torch.load(tmp_path / "run" / "model" / "weights.pt", weights_only=True)
    assert "out.weight" in state
    torch.load(tmp_path / "run" / "model" / "constants.pt", weights_only=True)


def test_a_module_given_in_python_gets_its_constants_back(tmp_path: Path) -> None:
    trained = saved(tmp_path, "RandomFeatures", RandomFeatures("unseeded"))
    loaded = load_model(tmp_path / "run" / "model", RandomFeatures("unseeded")).module
    assert torch.equal(loaded(X), trained(X))


def test_a_model_without_constants_has_no_file_of_them(tmp_path: Path) -> None:
    saved(tmp_path, "small")
    about = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert (about["format"], about["seed"], about["constants"]) == (3, 7, None)
    assert sorted(file.name for file in (tmp_path / "run" / "model").iterdir()) == [
        "model.json",
        "weights.pt",
    ]


def small() -> nn.Module:
    return nn.Linear(4, 1)


def test_constants_of_another_run_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", "RandomFeatures", kind="unseeded")
    saved(tmp_path / "b", "RandomFeatures", kind="unseeded")
    constants = (tmp_path / "b" / "run" / "model" / "constants.pt").read_bytes()
    (tmp_path / "a" / "run" / "model" / "constants.pt").write_bytes(constants)
    with pytest.raises(DataError, match=r"constants\.pt and model\.json are of different runs"):
        load_model(tmp_path / "a" / "run" / "model")


class Undecided(nn.Module):
    """Has a table in a list of another length whenever it is built."""

    built = iter(range(1, 99))

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.tables = [torch.zeros(2)] * next(Undecided.built)
        self.tables = [table.clone() for table in self.tables]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_a_module_that_cannot_be_rebuilt_is_saved_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        saved(tmp_path, "Undecided")
    assert "the saved model is another one: tables[1] differs when the module is built again" in caplog.text


def test_format_2_is_still_read() -> None:
    module = load_model(HERE / "saved_format_2").module
    assert module.weight.tolist() == [[pytest.approx(0.5034, abs=5e-5), pytest.approx(-0.0670, abs=5e-5)]]


# state_dict of one's own


class ExtraState(nn.Linear):
    """Has an extra state."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__(4, 1)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_an_extra_state_of_plain_values_is_saved(tmp_path: Path) -> None:
    saved(tmp_path, "ExtraState", extra="a text")
    assert load_model(tmp_path / "run" / "model", ExtraState()).module.extra == "a text"


def test_an_extra_state_that_is_no_plain_value_is_refused_before_a_row_is_dealt(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^state_dict\(\) of the module gives _extra_state as a Path|PosixPath"
    ):
        saved(tmp_path, "ExtraState", ExtraState(Path("x")))


def renaming(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state["other"] = state.pop("weight")


def leaving_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    del state["bias"]


def halving(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state["weight"] = state["weight"].half()


def hooked(hook: Any) -> nn.Module:
    module = nn.Linear(4, 1)
    module.register_state_dict_post_hook(hook)
    return module


def test_a_state_dict_that_cannot_be_loaded_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load what its own state_dict\(\) gives.*unexpected other"):
        saved(tmp_path, "small", hooked(renaming))


@pytest.mark.parametrize("hook", [leaving_out, halving])
def test_what_a_hook_leaves_out_or_rounds_is_saved_beside(tmp_path: Path, hook: Any) -> None:
    trained = saved(tmp_path, "small", hooked(hook))
    loaded = load_model(tmp_path / "run" / "model", nn.Linear(4, 1)).module
    assert torch.equal(loaded(X), trained(X))
