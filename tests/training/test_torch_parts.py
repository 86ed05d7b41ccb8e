"""Modules of torch.nn's own parts: described by plain values, put together again, believed in nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparksgd
from sparksgd.errors import ConfigError, DataError
from sparksgd.runs.model import load_model, save_model
from sparksgd.training.saved_state import load_state, saved_state
from sparksgd.training.torch_parts import assembled, described_parts


class Shared(nn.Linear):
    """A class that is not torch.nn's."""


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    return module


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module[0].weight.requires_grad_(False)
    return module


def one_part_twice() -> nn.Module:
    part = nn.Linear(4, 4)
    return nn.Sequential(part, nn.Sequential(nn.Tanh(), part))


def own_buffer() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 2))
    module[0].register_buffer("scale", torch.ones(3), persistent=False)
    return module


KINDS = [
    lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding="same"), nn.Flatten()),
    lambda: nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GELU(approximate="tanh"), nn.PReLU()),
    lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.Softplus(2, 5)),
    lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
    tied,
    frozen,
    one_part_twice,
    own_buffer,
]


def again(module: nn.Module) -> nn.Module:
    parts, saved = described_parts(module), saved_state(module)
    made = assembled(json.loads(json.dumps(parts)), saved.state, "parts")
    load_state(made, saved)
    return made


@pytest.mark.parametrize("make", KINDS)
def test_a_module_is_put_together_as_it_was(make: Any) -> None:
    torch.manual_seed(1)
    module, x = make(), torch.randn(6, 4)
    module(x)  # moves running statistics
    made = again(module)
    assert repr(made) == repr(module)
    assert [(n, p.requires_grad) for n, p in made.named_parameters()] == [
        (n, p.requires_grad) for n, p in module.named_parameters()
    ]
    assert [n for n, _ in made.named_buffers()] == [n for n, _ in module.named_buffers()]
    assert torch.equal(made.eval()(x), module.eval()(x))
    assert described_parts(made) == described_parts(module)


def hooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


def with_attribute(value: object) -> nn.Module:
    module = nn.Linear(2, 2)
    module.extra = value
    return module


@pytest.mark.parametrize(
    "module",
    [
        Shared(2, 2),
        nn.Sequential(nn.Linear(2, 2), Shared(2, 2)),
        hooked(),
        with_attribute(torch.relu),
        with_attribute(torch.ones(2)),
        with_attribute({"a": 1}),
        nn.LazyLinear(2),
        nn.LSTM(2, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_of_other_parts_is_not_described(module: nn.Module) -> None:
    assert described_parts(module) is None


def put(*path: str, value: Any) -> Any:
    def change(parts: dict[str, Any]) -> None:
        for step in path[:-1]:
            parts = parts[step]
        parts[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("0", "class", value="system"), "class is 'system', but must be a module of torch.nn"),
        (put("0", "class", value="LazyLinear"), "must be a module of torch.nn"),
        (put("0", "class", value="functional"), "must be a module of torch.nn"),
        (put("0", "class", value=["Linear"]), "must be a module of torch.nn"),
        (put("0", "values", "forward", value=1), "a value named 'forward', but its class uses that name"),
        (put("0", "values", "_forward_hooks", value={"list": []}), "but its class uses that name"),
        (put("0", "values", "__class__", value="x"), "but its class uses that name"),
        (put("0", "values", "in_features", value={"set": [1]}), "but must be a number, a text, or a list"),
        (put("0", "parameters", "forward", value=None), "has 'forward' as the name of a part or tensor"),
        (put("0", "parameters", "weight", value={"of": "x"}), "which is no tensor"),
        (put("", "modules", "0", value="9"), "holds '9', which is no part"),
        (put("", "modules", value={}), "which no other part holds"),
        (put("0", "more", value=1), "must be a table of buffers, class, modules, parameters, values"),
        (put("0", value=[]), "must be a table of"),
        (lambda parts: parts.pop(""), "must be a table with the part ''"),
    ],
)
def test_what_a_file_says_of_parts_is_not_believed(change: Any, says: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    parts = json.loads(json.dumps(described_parts(module)))
    change(parts)
    with pytest.raises(DataError, match=says):
        assembled(parts, module.state_dict(), "parts")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANY = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_in_the_place_of_another_is_a_module_or_refused(data: st.DataObject) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    parts = json.loads(json.dumps(described_parts(module)))
    part = parts[data.draw(st.sampled_from(sorted(parts)))]
    key = data.draw(st.sampled_from(sorted(part)))
    if isinstance(part[key], dict) and part[key] and data.draw(st.booleans()):
        part[key][data.draw(st.sampled_from(sorted(part[key])))] = data.draw(ANY)
    else:
        part[key] = data.draw(ANY)
    try:
        made = assembled(parts, module.state_dict(), "parts")
    except DataError:
        return
    assert {type(each).__module__.split(".")[0] for each in made.modules()} == {"torch"}


# In saved models

CONFIG = {
    "data": {"features": "x", "label": "y"},
    "optimizer": {"name": "SGD", "lr": 0.1},
    "engine": {"name": "inline"},
    "train": {"steps": 3, "epochs": 9, "rows_per_step": 4, "num_shards": 2},
}


def trained(folder: Path, module: nn.Module) -> nn.Module:
    table = pa.table({"x": [[float(i), 1.0] for i in range(8)], "y": [i % 2 for i in range(8)]})
    pq.write_table(table, folder / "rows.parquet")
    training = sparksgd.train(CONFIG, str(folder / "rows.parquet"), module=module, out=folder / "run")
    return training.module


def test_a_given_module_of_torch_s_parts_is_loaded_without_it_and_saved_again(tmp_path: Path) -> None:
    module = trained(tmp_path, nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)))
    loaded = load_model(tmp_path / "run" / "model")
    save_model(tmp_path / "again", loaded)
    for model in (loaded, load_model(tmp_path / "again")):
        assert repr(model.module) == repr(module)
        assert all(map(torch.equal, model.module.parameters(), module.parameters()))
        assert not model.module.training


def test_a_given_module_of_other_parts_must_be_given_again(tmp_path: Path) -> None:
    trained(tmp_path, Shared(2, 2))
    with pytest.raises(DataError, match="was trained from a module given in Python: pass it as module="):
        load_model(tmp_path / "run" / "model")
    loaded = load_model(tmp_path / "run" / "model", Shared(2, 2))
    save_model(tmp_path / "again", loaded)
    again = load_model(tmp_path / "again", Shared(2, 2))
    assert torch.equal(again.module.weight, loaded.module.weight)


def test_a_model_of_the_format_before_is_loaded_and_saved_again(tmp_path: Path) -> None:
    before = Path(__file__).parents[1] / "runs" / "saved_format_5"
    loaded = load_model(before, trust=["torch.nn"])
    assert loaded.module.weight.tolist() == [
        [pytest.approx(1.3220, abs=5e-5), pytest.approx(0.1688, abs=5e-5)]
    ]
    save_model(tmp_path, loaded)
    again = load_model(tmp_path, trust=["torch.nn"], strict=True)
    assert torch.equal(again.module.weight, loaded.module.weight)


def test_a_module_that_was_changed_after_the_training_is_saved_as_it_is(tmp_path: Path) -> None:
    trained(tmp_path, nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(), nn.Linear(4, 2)))
    loaded = load_model(tmp_path / "run" / "model")
    loaded.module[1].negative_slope = 0.9
    save_model(tmp_path / "slope", loaded)
    assert load_model(tmp_path / "slope").module[1].negative_slope == 0.9
    loaded.module[1] = nn.Identity()
    save_model(tmp_path / "identity", loaded)
    assert type(load_model(tmp_path / "identity").module[1]) is nn.Identity
    before = Path(__file__).parents[1] / "runs" / "saved_format_5"
    named = load_model(before, trust=["torch.nn"])
    changed = replace(named, module=nn.Sequential(named.module))
    save_model(tmp_path / "changed", changed)
    with pytest.raises(DataError, match="the module was changed after it was trained or loaded"):
        load_model(tmp_path / "changed", trust=["torch.nn"])


def test_a_model_made_by_hand_cannot_be_saved(tmp_path: Path) -> None:
    trained(tmp_path, nn.Linear(2, 2))
    loaded = load_model(tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match="was neither trained nor loaded by sparksgd"):
        save_model(tmp_path / "saved", replace(loaded, about={}))
