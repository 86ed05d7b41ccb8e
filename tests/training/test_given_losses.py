"""A loss that is given in Python: trained as any other, told apart from others, and loaded again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparksgd
from sparksgd.errors import ConfigError, DataError, ModelError
from sparksgd.training.given_loss import given_name
from sparksgd.training.state import Training

STEPS = 3


def focal(output: torch.Tensor, label: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    losses = F.cross_entropy(output, label, reduction="none")
    return (1 - torch.exp(-losses)) ** gamma * losses


def quantile(level: float) -> Callable[..., torch.Tensor]:
    def pinball(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        error = label - output[:, 0]
        return torch.maximum(level * error, (level - 1) * error)

    return pinball


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    source, file = np.random.default_rng(8), tmp_path_factory.mktemp("losses") / "rows.parquet"
    x = source.normal(size=(90, 3)).astype(np.float32)
    pq.write_table(pa.table({"x": x.tolist(), "label": (x[:, 0] > 0).astype(int), "number": x[:, 0]}), file)
    return str(file)


def net(outputs: int) -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(3, outputs)


def trained(rows: str, loss: Any, outputs: int = 1, label: str = "number", **more: Any) -> Training:
    config = {
        "data": {"features": ["x"], "label": label},
        "loss": more.pop("arguments", {}),
        "optimizer": {"lr": 0.3},
        "train": {"rows_per_step": 1000, "num_shards": 2, "epochs": more.pop("epochs", STEPS)},
        "engine": {"name": "inline"},
    }
    return sparksgd.train(config, rows, rows, module=net(outputs), loss=loss, **more)


def by_hand(rows: str, loss: Any, outputs: int, label: str) -> torch.Tensor:
    table = pq.read_table(rows)
    x, y = torch.tensor(table["x"].to_pylist()), torch.tensor(table[label].to_pylist())
    module = net(outputs)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(module(x), y).mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(module.parameters()).detach()


class Scaled(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.scale * (output[:, 0] - label) ** 2


def local_class() -> type[nn.Module]:
    class Local(Scaled):
        pass

    return Local


CASES: dict[str, tuple[Any, dict[str, Any], Any, int, str, str | None]] = {
    "closure": (quantile(0.9), {}, quantile(0.9), 1, "number", None),
    "closure of a kind": (quantile(0.9), {"kind": "numbers"}, quantile(0.9), 1, "number", "numbers"),
    "module": (Scaled(3.0), {}, Scaled(3.0), 1, "number", None),
    "class": (local_class(), {"scale": 3.0}, Scaled(3.0), 1, "number", None),
    "partial": (partial(focal, gamma=1.0), {"kind": "classes"}, partial(focal, gamma=1.0),
                2, "label", "classes"),
    "torch's": (nn.HuberLoss(reduction="none", delta=0.2), {},
                lambda output, label: F.huber_loss(output[:, 0], label, delta=0.2, reduction="none"),
                1, "number", "numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_in_plain_torch_and_is_taken_again_where_it_is_loaded(
    rows: str, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    loss, arguments, plain, outputs, label, kind = CASES[case]
    training = trained(rows, loss, outputs, label, arguments=arguments, out=tmp_path)
    assert (training.flat.parameters - by_hand(rows, plain, outputs, label)).abs().max() < 1e-6
    name = json.loads((tmp_path / "model" / "model.json").read_text())["loss"]["name"]
    assert (training.config.loss.is_given, name) == (True, training.config.loss.name)
    unknown = sparksgd.load_model(tmp_path / "model")
    assert (unknown.loss, unknown.kind) == (None, kind)
    with pytest.raises(
        ConfigError, match=r"loss of model was given in Python.*pass it to load_model, as loss="
    ):
        sparksgd.evaluate(rows, unknown)
    with caplog.at_level(logging.WARNING, "sparksgd"):
        saved = sparksgd.load_model(tmp_path / "model", loss=loss)
    assert not caplog.messages
    table = pq.read_table(rows)
    x, y = torch.tensor(table["x"].to_pylist()), torch.tensor(table[label].to_pylist())
    with torch.no_grad():
        assert saved.loss is not None
        assert torch.equal(saved.loss(saved.module(x), y), plain(saved.module(x), y))
    sparksgd.load_model(tmp_path / "model", loss=Scaled)  # takes the arguments of each
    assert "the loss given to load_model is not that of the training" in caplog.text


def test_what_can_be_imported_is_taken_by_its_path(rows: str, tmp_path: Path) -> None:
    given = trained(rows, focal, 2, "label", arguments={"gamma": 1.0, "kind": "classes"}, out=tmp_path)
    assert given.config.loss.name == "test_given_losses:focal"
    with pytest.raises(DataError, match="test_given_losses is not trusted"):
        sparksgd.load_model(tmp_path / "model")
    assert sparksgd.load_model(tmp_path / "model", trust=["test_given_losses"]).kind == "classes"
    assert sparksgd.load_model(tmp_path / "model", loss=focal).loss is not None
    for loss, name in ((sparksgd.models.losses.squared_error, "squared_error"), (nn.HuberLoss, "HuberLoss")):
        assert trained(rows, loss).config.loss.name == name


def test_a_run_goes_on_with_the_same_loss_alone(rows: str, tmp_path: Path) -> None:
    trained(rows, quantile(0.9), epochs=1, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"loss\.name is 'given in Python \w+', but was 'given in Python"):
        trained(rows, quantile(0.8), out=tmp_path / "other", resume_from=tmp_path / "run")
    again = trained(rows, quantile(0.9), out=tmp_path / "run", resume_from=tmp_path / "run")
    alone = trained(rows, quantile(0.9))
    assert len(again.resumed) == 1
    assert torch.equal(again.flat.parameters, alone.flat.parameters)
    config = sparksgd.Config.load(None, [f"loss.name={again.config.loss.name}", "engine.name=inline"])
    with pytest.raises(ConfigError, match=r"loss\.name is 'given in Python \w+': pass that loss, as loss="):
        sparksgd.train(config, rows, module=net(1))


def test_a_replay_and_checkpoints_of_many_runs_tell_losses_apart(rows: str, tmp_path: Path) -> None:
    first = trained(rows, quantile(0.9), out=tmp_path / "run")
    replay = sparksgd.read_replay(tmp_path / "run")
    again = trained(rows, quantile(0.9), replay=replay)
    assert again.flat.parameters_sha256() == first.flat.parameters_sha256()
    with pytest.raises(
        ConfigError, match=r"loss\.name is .*shapes the parameters: pass the loss of that run, a"
    ):
        trained(rows, quantile(0.8), replay=replay)
    ended = [trained(rows, quantile(level), checkpoint_dir=tmp_path / "many") for level in (0.9, 0.8, 0.9)]
    assert [len(run.resumed) for run in ended] == [0, 0, 1]
    assert len(list((tmp_path / "many").iterdir())) == 2


@pytest.mark.parametrize(
    ("loss", "arguments", "error", "says"),
    [
        (3, {}, ConfigError, r"loss is 3, but must be a function \(output, label\), an nn\.Module, or a"),
        (nn.MSELoss(reduction="none"), {"kind": "binary"}, ConfigError,
         r'loss\.kind is "binary", but loss is a MSELoss, whose kind is "numbers": leave loss\.kind out'),
        (nn.MSELoss(), {}, ModelError, r"the loss gave \(\) for 4 rows.*use reduction='none'"),
        (quantile(0.9), {"level": 1}, ConfigError, r"loss\.level is no argument of given in Python"),
        (local_class(), {"level": 1}, ConfigError, r"loss\.level is no argument of given in Python"),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_refused(
    rows: str, loss: Any, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        trained(rows, loss, arguments=arguments)


PROGRAM = """
import torch
from torch import nn
FLOOR = {floor}
def helper(x):
    return x.clamp(min=FLOOR)
class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.inner, self.table = {{"b", "a", "c"}}, nn.Linear(2, 2), torch.tensor([{table}])
    def forward(self, output, label):
        return (lambda value: helper(value) * {factor})(output[:, 0] - label)
with torch.no_grad():
    loss = Outer()
    for parameter in loss.parameters():
        parameter.fill_({weight})
from sparksgd.training.given_loss import given_name
"""
FIRST = {"floor": 0.5, "table": 1.0, "factor": 2, "weight": 3.0}


def names_in_a_process(seed: int, **changed: float) -> list[str]:
    code = PROGRAM.format(**FIRST | changed) + "print(given_name(loss), given_name(helper), sep='|')\n"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    return ran.stdout.strip().split("|")


def test_another_process_finds_the_same_name_wherever_the_code_stands() -> None:
    here: dict[str, Any] = {"__name__": "__main__"}
    exec("\n\n# a comment\n" + PROGRAM.format(**FIRST), here)
    assert names_in_a_process(1) == [given_name(here["loss"]), given_name(here["helper"])]


def test_code_and_values_that_differ_have_other_names() -> None:
    def loss_of(floor: float, factor: float, default: float = 0.0) -> Any:
        def inner(output: torch.Tensor, label: torch.Tensor, shift: float = default) -> torch.Tensor:
            return (output[:, 0] - label - shift).clamp(min=floor) * factor

        return inner

    def module_of(value: float) -> nn.Module:
        module = Scaled(1.0)
        module.register_buffer("table", torch.tensor([value]))
        module.inner = nn.ModuleList([Scaled(2.0)])
        return module

    def of_main(shift: float) -> Any:
        found: dict[str, Any] = {"__name__": "__main__"}
        exec(f"def top(output, label, shift={shift}):\n    return output[:, 0] - label - shift", found)
        return found["top"]

    assert given_name(of_main(1.0)) == given_name(of_main(1.0)) != given_name(of_main(2.0))
    same = [given_name(loss_of(1.0, 2.0)) for _ in range(2)] + [given_name(loss_of(1.0, 2.0, 0.0))]
    others = [given_name(loss_of(*each)) for each in ((1.5, 2.0), (1.0, 3.0), (1.0, 2.0, 1.0))]
    assert (len(set(same)), len({*same, *others})) == (1, 4)
    modules = [module_of(1.0), module_of(2.0), module_of(1.0), module_of(1.0).eval()]
    modules[2].inner[0].scale = 5.0  # type: ignore[index, union-attr]  # of a list of modules
    names = [given_name(each) for each in modules]
    assert (len(set(names)), names[0]) == (3, names[3])


@pytest.mark.soak
@pytest.mark.parametrize("changed", [{"floor": 0.25}, {"table": 2.0}, {"factor": 3}, {"weight": 4.0}])
def test_a_change_of_a_notebook_s_cell_is_another_name(changed: dict[str, float]) -> None:
    assert names_in_a_process(1)[0] != names_in_a_process(1, **changed)[0]
