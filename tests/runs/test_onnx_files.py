"""Modules as ONNX files: the values of torch, for any number of rows; what cannot be written is told."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predicted_modules import Gaussian, TwoInputs  # tests/modules
from torch import nn

from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import ConfigError, ModelError
from sparksgd.runs.model import SavedModel
from sparksgd.runs.onnx_files import to_onnx


def model_of(module: nn.Module, *features: tuple[str, str, int | None]) -> SavedModel:
    schema = RowSchema(
        features=tuple(Feature(name=name, dtype=dtype, length=length) for name, dtype, length in features),
        label="y", label_dtype="float32",
    )  # fmt: skip
    return SavedModel(module=module.eval(), schema=schema, loss=None, kind=None)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))


X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
CASES: dict[str, tuple[SavedModel, dict[str, Any], list[str]]] = {
    "layers": (model_of(layers(), ("x.1", "float32", 3)), {"x.1": X}, ["output"]),
    "one number": (model_of(nn.Unflatten(0, (-1, 1)), ("x", "float32", None)), {"x": X[:, 0]}, ["output"]),
    "several columns": (
        model_of(TwoInputs(), ("image", "uint8", 4), ("code", "int64", None), ("price", "float32", None)),
        {"image": np.arange(20, dtype=np.uint8).reshape(5, 4), "code": np.arange(5), "price": X[:, 0]},
        ["output"],
    ),
    "several outputs": (model_of(Gaussian(3), ("x", "float32", 3)), {"x": X}, ["mean", "spread", "hidden"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_values_of_torch_for_any_number_of_rows(tmp_path: Path, case: str) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, rows, names = CASES[case]
    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    to_onnx(model, tmp_path / "model.onnx")
    assert all(map(torch.equal, model.module.parameters(), before))
    evaluator = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    assert (evaluator.input_names, evaluator.output_names) == (list(rows), names)
    for count in (5, 1):
        some = {name: values[:count] for name, values in rows.items()}
        given = {name: torch.tensor(values) for name, values in some.items()}
        with torch.no_grad():
            output = model.module(*given.values()) if len(given) == 1 else model.module(**given)
        expected = list(output.values()) if isinstance(output, dict) else [output]
        for found, right in zip(evaluator.run(None, some), expected, strict=True):
            np.testing.assert_allclose(found, right.numpy(), rtol=1e-5, atol=1e-6)


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Branches(), ("x", "float32", 3))
    if find_spec("onnx") and find_spec("onnxscript"):
        with pytest.raises(ModelError, match=r"torch cannot write Branches as ONNX: .*without branches by v"):
            to_onnx(model, tmp_path / "model.onnx")
        with pytest.raises(ConfigError, match=r"there is no folder .*nowhere.*: make it"):
            to_onnx(model, tmp_path / "nowhere" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs the package onnx, which is not installed: pip install 's"):
        to_onnx(model, tmp_path / "model.onnx")
