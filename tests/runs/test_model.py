"""A saved model gives the outputs of the trained module to the bit, also by what no state_dict has."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import random
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from manifests import change_manifest
from torch import nn
from two_workers import rows_of

from sparksgd.config import Config
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import DataError, ModelError, TrainingError
from sparksgd.runs.checked_files import write_checked
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.model import load_model
from sparksgd.storage import location
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training

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


def saved(
    folder: Path,
    name: str,
    module: nn.Module | None = None,
    observers: Sequence[Observer] = (),
    **arguments: Any,
) -> nn.Module:
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
    return train(
        config,
        rows=rows_of(folder / "rows"),
        test=None,
        make_engine=InlineEngine,
        module=module,
        observers=[RunFolder(folder / "run"), *observers],
    ).module.eval()


X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "numpy", "unseeded", "list", "number"])
def test_the_loaded_model_gives_the_same_outputs_to_the_bit(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trained = saved(tmp_path, "RandomFeatures", kind=kind)
    loaded = load_model(tmp_path / "run" / "model", trust=[__name__]).module
    assert torch.equal(loaded(X), trained(X))
    assert not caplog.records
    state = torch.load(tmp_path / "run" / "model" / "weights.pt", weights_only=True)
    assert "out.weight" in state
    torch.load(tmp_path / "run" / "model" / "constants.pt", weights_only=True)


def test_a_module_given_in_python_gets_its_constants_back(tmp_path: Path) -> None:
    trained = saved(tmp_path, "RandomFeatures", RandomFeatures("unseeded"))
    loaded = load_model(tmp_path / "run" / "model", RandomFeatures("unseeded")).module
    assert torch.equal(loaded(X), trained(X))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))


def test_lazy_layers_are_built_again_with_the_shapes_that_they_took(tmp_path: Path) -> None:
    trained = saved(tmp_path, "lazy")
    loaded = load_model(tmp_path / "run" / "model", trust=[__name__]).module
    assert torch.equal(loaded(X), trained(X))
    assert [type(layer) for layer in loaded] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_a_model_without_constants_has_no_file_of_them(tmp_path: Path) -> None:
    saved(tmp_path, "small")
    about = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert (about["format"], about["seed"], about["constants"]) == (8, 7, None)
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
    with pytest.raises(DataError, match=r"constants\.pt is not the file that its manifest names"):
        load_model(tmp_path / "a" / "run" / "model", trust=[__name__])


# Constants of Python, and choices


def drawn(number: int) -> list[float]:
    return [secrets.randbelow(1000) / 1000 for _ in range(number)]


class Options(SimpleNamespace):
    """A configuration of a user's own."""


class Chosen(nn.Module):
    """y = act(w x), with constants of the system's entropy.

    Args:
        kind: what holds them.
    """

    def __init__(self, kind: str = "list") -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind
        self.held: Any = None
        if kind == "list":
            self.held = drawn(4)
        elif kind == "tuple":
            self.held = tuple(drawn(4))
        elif kind == "numpy numbers":
            self.held = [np.float32(number) for number in drawn(4)]
        elif kind == "dictionary":
            self.held = {"deep": [{"scales": drawn(4)}]}
        elif kind == "counter":
            self.held = OrderedDict(zip("dcba", drawn(4), strict=True))
        elif kind == "mixed":
            self.held = [nn.functional.relu, drawn(4)]
        elif kind == "text":
            self.held = secrets.choice(["tanh", "relu", "sigmoid", "exp", "cos", "abs"])
        elif kind == "order":
            self.held = random.SystemRandom().sample(range(4), 4)
        elif kind == "environment":
            self.held = float(os.environ.get("SCALE", "1"))
        elif kind == "torch's own":
            self.slope = nn.LeakyReLU(drawn(1)[0])
        elif kind == "object":
            self.held = Options(scales=drawn(4))
        elif kind == "tensor of an object":
            self.held = Options(scales=torch.tensor(drawn(4)))
        elif kind == "closure":
            scales = drawn(4)
            self.act = lambda x: x * torch.tensor(scales)
        elif kind == "default":
            (scale,) = drawn(1)
            self.act = lambda x, scale=scale: x * scale
        elif kind == "hook":
            (scale,) = drawn(1)
            self.linear.register_forward_hook(lambda module, inputs, output: output * scale)
        elif kind == "function":
            self.act = next(each_function)
        elif kind == "layer":
            self.layer = next(each_layer)()
        elif kind == "layers in an order":
            names = next(each_order)
            self.layers = nn.ModuleDict({name: nn.Tanh() if name == "a" else nn.ReLU() for name in names})
        elif kind == "number of layers":
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(next(each_number)))
        elif kind == "number of tensors":
            self.tables = [torch.zeros(2) for _ in range(next(each_number))]
        elif kind == "identity":
            self.held = uuid.uuid4()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        for layer in [*getattr(self, "layers", {"": None}).values()] if self.kind.endswith("order") else []:
            y = y if layer is None else layer(y - 0.1)
        if self.kind in ("list", "tuple", "numpy numbers"):
            y = y * torch.tensor([float(number) for number in self.held])
        elif self.kind == "dictionary":
            y = y * torch.tensor(self.held["deep"][0]["scales"])
        elif self.kind == "counter":
            y = y * torch.tensor([*self.held.values()])
        elif self.kind == "mixed":
            y = self.held[0](y) * torch.tensor(self.held[1])
        elif self.kind == "text":
            y = getattr(torch, self.held)(y)
        elif self.kind == "order":
            y = y * torch.tensor(self.held)
        elif self.kind == "environment":
            y = y * self.held
        elif self.kind == "torch's own":
            y = self.slope(y)
        elif "object" in self.kind:
            y = y * torch.as_tensor(self.held.scales)
        elif hasattr(self, "act"):
            y = self.act(y)
        elif hasattr(self, "layer"):
            y = self.layer(y)
        return y.sum(1, keepdim=True)


each_function = itertools.cycle([torch.tanh, torch.relu])
each_layer = itertools.cycle([nn.Tanh, nn.ReLU])
each_order = itertools.cycle(["ab", "ba"])
each_number = itertools.count(1)

RESTORED = [
    "list", "tuple", "numpy numbers", "dictionary", "counter", "mixed", "text", "order", "torch's own",
]  # fmt: skip


@pytest.mark.parametrize("kind", [*RESTORED, "identity"])
def test_constants_of_python_are_loaded_to_the_bit(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trained = saved(tmp_path, "Chosen", kind=kind)
        for _ in range(4):
            loaded = load_model(tmp_path / "run" / "model", trust=[__name__]).module
            assert torch.equal(loaded(X), trained(X))
            assert type(loaded.held) is type(trained.held)
            assert kind == "identity" or loaded.held == trained.held
    assert not caplog.records


def test_constants_are_read_without_running_code(tmp_path: Path) -> None:
    saved(tmp_path, "Chosen", kind="list")
    folder = tmp_path / "run" / "model"
    constants = torch.load(folder / "constants.pt", weights_only=True)
    values = pickle.dumps(partial(print, "run"))
    constants["held"]["bytes"] = torch.frombuffer(bytearray(values), dtype=torch.uint8)
    entry = write_checked(location(folder), "constants.pt", constants)
    change_manifest(folder, lambda about: about.update(constants=asdict(entry)))
    with pytest.raises(DataError, match=r"functools\.partial is no plain value"):
        load_model(folder, trust=[__name__])


def test_a_constant_of_the_environment_is_loaded_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALE", "0.25")
    trained = saved(tmp_path, "Chosen", kind="environment")
    monkeypatch.setenv("SCALE", "4")
    loaded = load_model(tmp_path / "run" / "model", trust=[__name__]).module
    assert loaded.held == 0.25
    assert torch.equal(loaded(X), trained(X))


@pytest.mark.parametrize("kind", ["list", "text"])
def test_a_module_given_to_load_model_gets_the_constants_of_the_trained_one(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained = saved(tmp_path, "Chosen", Chosen(kind))
    given = Chosen(kind)
    while given.held == trained.held:
        given = Chosen(kind)
    was = given.held
    loaded = load_model(tmp_path / "run" / "model", given).module
    assert torch.equal(loaded(X), trained(X))
    assert f"held is {trained.held!r}, but was built as {was!r}" in caplog.text


REFUSED = {
    "object": r"its outputs differ, and held\.scales was \[0.*, but is \[0",
    "tensor of an object": r"its outputs differ, and held\.scales was tensor\(\[0.*, but is tensor\(\[0",
    "closure": r"its outputs differ, and act's variable scales was \[0.*, but is \[0",
    "default": r"its outputs differ, and act's default of scale was 0.*, but is 0",
    "hook": r"its outputs differ",
    "function": r"act was (tanh|relu), but is (tanh|relu) when it is built again",
    "layer": r"layer was (Tanh|ReLU), but is (Tanh|ReLU) when it is built again",
    "layers in an order": r"layers\.(a|b) is in the place of layers\.(a|b) when",
    "number of layers": r"layers\.\d was nothing, but is Linear when",
    "number of tensors": r"tables\[\d\] differs, and cannot be saved beside",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_module_that_is_another_one_when_built_again_is_refused_before_a_row_is_dealt(
    tmp_path: Path, kind: str
) -> None:
    with pytest.raises(ModelError, match=REFUSED[kind]) as refused:
        saved(tmp_path, "Chosen", kind=kind)
    assert "'test_model:Chosen', which gives another module whenever it is built" in str(refused.value)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("kind", ["function", "layer"])
def test_an_instance_may_hold_any_choice(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    trained = saved(tmp_path, "Chosen", Chosen(kind))
    other, same = Chosen(kind), Chosen(kind)  # every second one is the same
    assert torch.equal(load_model(tmp_path / "run" / "model", same).module(X), trained(X))
    assert not caplog.records
    load_model(tmp_path / "run" / "model", other)
    assert "the module given to load_model is not built as the trained one" in caplog.text


class Late(nn.Module):
    """Has a layer, and a variable of a function, of the environment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.layer = nn.Linear(4, 1), getattr(nn, os.environ.get("LAYER", "Tanh"))()
        scale = float(os.environ.get("SCALE", "1"))
        self.act = lambda x: x * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.layer(self.linear(x)))


class Later(Observer):
    """Sets a variable of the environment when the training begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        self.change = partial(monkeypatch.setenv, name, value)

    def started(self, training: Training) -> None:
        self.change()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LAYER", "ReLU", r"layer was Tanh, but is ReLU when it is built again"),
        ("SCALE", "2", r"its outputs differ, and act's variable scale was 1\.0, but is 2\.0 when"),
    ],
)
def test_what_differs_only_when_it_is_saved_is_an_error_that_keeps_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    kept: list[Training] = []
    with pytest.raises(TrainingError, match=told) as raised:
        saved(tmp_path, "Late", observers=[Later(monkeypatch, name, value), Keeping(kept)])
    assert "Nothing is lost: load_model(" in str(raised.value)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "TrainingError"
    trained = kept[0].module.eval()
    with pytest.raises(DataError, match=told + r".*as module="):
        load_model(tmp_path / "run" / "model", trust=[__name__])
    monkeypatch.undo()
    assert torch.equal(load_model(tmp_path / "run" / "model", Late()).module(X), trained(X))


class Keeping(Observer):
    """Keeps the run."""

    def __init__(self, kept: list[Training]) -> None:
        self.kept = kept

    def started(self, training: Training) -> None:
        self.kept.append(training)


def test_a_module_that_is_built_otherwise_later_is_not_loaded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "Late")
    monkeypatch.setenv("LAYER", "ReLU")
    with pytest.raises(DataError, match=r"layer was Tanh, but is ReLU when it is built again"):
        load_model(tmp_path / "run" / "model", trust=[__name__])


class Once(nn.Linear):
    """Can be built once."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        if not Once.free:
            raise ValueError("there is one already")
        Once.free = False

    free = True


def test_a_module_that_can_be_built_once_in_a_process_is_saved_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Once, "free", True)
    trained = saved(tmp_path, "Once")
    assert "cannot be built twice in one process" in caplog.text
    monkeypatch.setattr(Once, "free", True)
    assert torch.equal(load_model(tmp_path / "run" / "model", trust=[__name__]).module(X), trained(X))


def test_format_2_is_still_read() -> None:
    module = load_model(HERE / "saved_format_2", trust=["torch.nn"]).module
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
