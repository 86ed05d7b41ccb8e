"""Modules that give several tensors, with losses that take them: trained, evaluated, saved, loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import sparksgd
from sparksgd.errors import ConfigError, ModelError
from sparksgd.models.outputs import Output
from sparksgd.runs import manifest
from sparksgd.training.state import Training

STEPS = 3


class Gaussian(nn.Module):
    """Gives the mean and the logarithm of the spread of a number, and what these are computed from."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form = form
        self.first, self.mean, self.spread = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        mean, spread = self.mean(hidden)[:, 0], self.spread(hidden)[:, 0]
        if self.form == "tensor in evaluation" and not self.training:
            return mean
        if self.form == "a number in evaluation":
            return mean, spread, torch.zeros_like(mean) if self.training else torch.zeros(())
        if self.form == "dict":
            return {"mean": mean, "spread": spread, "hidden": hidden}
        return mean, spread


def likelihood(output: Any, label: torch.Tensor) -> torch.Tensor:
    """Minus the logarithm of a normal density, without its constant; [B]."""
    if isinstance(output, torch.Tensor):
        return (label - output) ** 2
    mean, spread, *_ = output.values() if isinstance(output, dict) else output
    return ((label - mean) / spread.exp()) ** 2 / 2 + spread


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    source, file = np.random.default_rng(8), tmp_path_factory.mktemp("outputs") / "rows.parquet"
    x = source.normal(size=(90, 3)).astype(np.float32)
    pq.write_table(
        pa.table({"x": x.tolist(), "number": x[:, 0] * 2, "label": (x[:, 0] > 0).astype(int)}), file
    )
    return str(file)


def gaussian(form: str = "dict") -> nn.Module:
    torch.manual_seed(2)
    return Gaussian(form)


OWN = {"name": "test_named_outputs:likelihood"}


def trained(rows: str, module: nn.Module, loss: dict[str, Any] = OWN, **where: Any) -> Training:
    config = {
        "data": {"features": ["x"], "label": "label" if "entropy" in loss["name"] else "number"},
        "loss": loss,
        "optimizer": {"lr": 0.1},
        "train": {"rows_per_step": 1000, "num_shards": 2, "steps": STEPS, "epochs": STEPS},
        "engine": {"name": "inline"},
    }
    return sparksgd.train(config, rows, rows, module=module, **where)


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_named_outputs_train_as_in_plain_torch_and_are_saved(rows: str, tmp_path: Path, form: str) -> None:
    training = trained(rows, gaussian(form), out=tmp_path)
    table = pq.read_table(rows)
    x, y = torch.tensor(table["x"].to_pylist()), torch.tensor(table["number"].to_pylist())
    plain = gaussian(form)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        likelihood(plain(x), y).mean().backward()
        optimizer.step()
    expected = nn.utils.parameters_to_vector(plain.parameters()).detach()
    assert (training.flat.parameters - expected).abs().max() < 1e-6
    with torch.no_grad():
        loss = float(likelihood(plain(x), y).mean())
    assert training.evaluations[-1].loss == pytest.approx(loss, rel=1e-5)
    assert training.evaluations[-1].accuracy is None
    names = ["mean", "spread"] if form == "dict" else ["output_0", "output_1"]
    outputs = [Output(name=name, length=None, dtype="float32") for name in names]
    outputs += [Output(name="hidden", length=4, dtype="float32")] * (form == "dict")
    loaded = sparksgd.load_model(tmp_path / "model", gaussian(form), trust=["test_named_outputs"])
    assert loaded.outputs == training.outputs == tuple(outputs)


def test_the_outputs_of_one_tensor_have_no_name_and_earlier_formats_none(rows: str, tmp_path: Path) -> None:
    trained(rows, nn.Linear(3, 1), {"name": "squared_error"}, out=tmp_path)
    folder = tmp_path / "model"
    about = json.loads((folder / "model.json").read_text())
    assert (about["format"], about["outputs"]) == (8, [{"name": "", "length": None, "dtype": "float32"}])
    del about["sha256"], about["outputs"], about["label"]["num_labels"]
    manifest.write_manifest(sparksgd.storage.location(folder), about | {"format": 7})
    loaded = sparksgd.load_model(folder)
    assert (loaded.outputs, loaded.about["outputs"]) == ((), [])
    sparksgd.runs.model.save_model(tmp_path / "again", loaded)
    assert json.loads((tmp_path / "again" / "model.json").read_text())["format"] == 8
    assert sparksgd.load_model(tmp_path / "again").outputs == ()


@pytest.mark.parametrize(
    ("form", "loss", "says"),
    [
        ("dict", {"name": "cross_entropy"}, "module gives a dict, but cross_entropy takes one tensor: let"),
        ("tuple", {"name": "binary_cross_entropy"}, "a tuple, but binary_cross_entropy takes one tensor"),
        ("tuple", {"name": "squared_error"}, "the module gives a tuple, but squared_error takes one tensor"),
        ("tuple", {"name": "HuberLoss"}, "the module gives a tuple, but HuberLoss takes one tensor"),
        ("tuple", {**OWN, "kind": "numbers"},
         r'by names \(output_0, output_1\), but a loss whose kind is "numbers" takes one'),
        ("tensor in evaluation", OWN,
         r"evaluation .*\(1,\) for one row, but {'output_0': \(1,\), 'output_1': \(1,\)} in training"),
        ("a number in evaluation", OWN, r"'output_2': \(\)} for one row, but .* a row of it for each row"),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_are_refused_before_the_first_step(
    rows: str, form: str, loss: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        trained(rows, gaussian(form), loss)


def test_a_model_of_named_outputs_has_no_column_of_predictions(rows: str, tmp_path: Path) -> None:
    trained(rows, gaussian(), out=tmp_path)
    model = sparksgd.load_model(tmp_path / "model", gaussian(), trust=["test_named_outputs"])
    with pytest.raises(ConfigError, match=r"outputs by names \(mean, spread, hidden\), but predict .*TorchM"):
        sparksgd.predict(rows, model)
