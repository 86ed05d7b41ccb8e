"""Losses with arguments, and of a declared kind: trained, evaluated, saved and loaded."""

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
from torch.nn import functional as F

import sparksgd
from sparksgd.config import Config
from sparksgd.errors import BadRows, ConfigError, DataError, ModelError
from sparksgd.runs import manifest
from sparksgd.training.state import Training

STEPS = 3


def focal(output: torch.Tensor, label: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Lin et al. 2017, equation 5, without alpha."""
    losses = F.cross_entropy(output, label, reduction="none")
    return (1 - torch.exp(-losses)) ** gamma * losses


def of_one_logit(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return F.softplus(-(2 * label - 1) * output.reshape(len(label)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    source, file = np.random.default_rng(8), tmp_path_factory.mktemp("losses") / "rows.parquet"
    x = source.normal(size=(90, 3)).astype(np.float32)
    label = (x.sum(axis=1) > 0).astype(np.int64)
    pq.write_table(pa.table({"x": x.tolist(), "label": label, "three": label * 2, "number": x[:, 0]}), file)
    return str(file)


def net(outputs: int) -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(3, outputs)


def trained(rows: str, outputs: int, loss: dict[str, Any], label: str = "label", **where: Any) -> Training:
    config = {
        "data": {"features": ["x"], "label": label},
        "loss": loss,
        "optimizer": {"lr": 0.3},
        "train": {"rows_per_step": 1000, "num_shards": 2, "steps": STEPS, "epochs": STEPS},
        "engine": {"name": "inline"},
    }
    return sparksgd.train(config, rows, rows, module=net(outputs), **where)


def by_hand(rows: str, outputs: int, loss: Any, label: str = "label") -> np.ndarray[Any, Any]:
    table = pq.read_table(rows)
    x, y = torch.tensor(table["x"].to_pylist()), torch.tensor(table[label].to_pylist())
    module = net(outputs)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(module(x), y).mean().backward()
        optimizer.step()
    found: np.ndarray[Any, Any] = nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    return found


CASES: list[tuple[int, dict[str, Any], Any, str]] = [
    (2, {"label_smoothing": 0.2}, nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none"), "label"),
    (2, {"weight": [1, 3.5]}, nn.CrossEntropyLoss(torch.tensor([1, 3.5]), reduction="none"), "label"),
    (2, {"name": "test_losses_of_all_kinds:focal", "kind": "classes", "gamma": 1.5},
     lambda output, label: focal(output, label, 1.5), "label"),
    (1, {"name": "test_losses_of_all_kinds:of_one_logit", "kind": "binary"}, of_one_logit, "label"),
    (1, {"name": "HuberLoss", "delta": 0.2},
     lambda output, label: F.huber_loss(output[:, 0], label, delta=0.2, reduction="none"), "number"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_loss_trains_as_in_plain_torch_and_is_saved_with_all_that_it_is(
    rows: str, tmp_path: Path, case: int
) -> None:
    outputs, loss, plain, label = CASES[case]
    training = trained(rows, outputs, loss, label, out=tmp_path)
    assert np.abs(training.flat.parameters.numpy() - by_hand(rows, outputs, plain, label)).max() < 1e-6
    has_classes = label == "label"
    assert (training.evaluations[-1].accuracy is not None) == has_classes
    saved = sparksgd.load_model(tmp_path / "model", trust=["test_losses_of_all_kinds"])
    table = pq.read_table(rows)
    x, y = torch.tensor(table["x"].to_pylist()), torch.tensor(table[label].to_pylist())
    with torch.no_grad():
        assert torch.equal(saved.loss(saved.module(x), y), plain(saved.module(x), y))
    assert saved.kind == ("numbers" if not has_classes else "binary" if outputs == 1 else "classes")
    assert (saved.schema.classes, saved.schema.label_dtype) == (
        (2, "int64") if has_classes else (None, "float32")
    )


def test_labels_of_a_declared_kind_are_checked(rows: str) -> None:
    own = {"name": "test_losses_of_all_kinds:focal", "kind": "classes"}
    with pytest.raises(BadRows, match=r"a label outside 0\.\.1"):
        trained(rows, 2, own, "three")
    with pytest.raises(ModelError, match=r'whose kind is "classes" takes a logit for each class, \[B, C\]'):
        trained(rows, 1, {"name": "test_losses_of_all_kinds:of_one_logit", "kind": "classes"})
    with pytest.raises(ModelError, match=r'whose kind is "binary" takes one logit for each row, \[B\]'):
        trained(rows, 2, {**own, "kind": "binary"})
    with pytest.raises(ModelError, match=r'whose kind is "numbers" takes one number for each row'):
        trained(rows, 2, {**own, "kind": "numbers"})
    with pytest.raises(
        ConfigError,
        match=r"loss\.kind is 'class'.*must be 'classes' or 'binary' or 'several labels' or 'numbers'",
    ):
        Config.load(None, ["model.name=lenet", "loss.kind=class"])


def test_a_loss_without_a_kind_has_no_accuracy_as_before(rows: str) -> None:
    training = trained(rows, 2, {"name": "test_losses_of_all_kinds:focal"})
    assert training.evaluations[-1].accuracy is None
    assert training.plan.schema.classes is None


def test_arguments_of_a_loss_are_of_the_experiment() -> None:
    one, other = (
        Config.load(None, ["model.name=lenet", f"loss.label_smoothing={value}"]).experiment()
        for value in (0.1, 0.2)
    )
    assert {key for key in one if one[key] != other[key]} == {"loss.label_smoothing"}


def test_a_model_of_the_version_before_is_read(rows: str, tmp_path: Path) -> None:
    trained(rows, 2, {}, out=tmp_path)
    file = tmp_path / "model" / "model.json"
    about = json.loads(file.read_text())
    assert about["loss"] == {"name": "cross_entropy", "kind": None, "arguments": {}}
    del about["sha256"], about["outputs"], about["label"]["num_labels"]
    about |= {"format": 6, "loss": "cross_entropy"}
    manifest.write_manifest(sparksgd.storage.location(file.parent), about)
    loaded = sparksgd.load_model(file.parent)
    assert (loaded.kind, loaded.loss) == ("classes", sparksgd.models.losses.cross_entropy)
    about |= {"format": 7}
    manifest.write_manifest(sparksgd.storage.location(file.parent), about)
    with pytest.raises(DataError, match="loss is 'cross_entropy', but must be a table"):
        sparksgd.load_model(file.parent)


def test_areas_are_metrics_of_a_run_and_stop_it(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(engine: str, shards: int) -> dict[str, Any]:
        return {
            "data": {"features": ["x"], "label": "label"},
            "loss": {"name": "binary_cross_entropy"},
            "optimizer": {"lr": 0.3},
            "early_stopping": {"patience": 2, "metric": "area_under_pr"},
            "train": {
                "rows_per_step": 1000,
                "num_shards": shards,
                "metrics": ["area_under_roc"],
                "epochs": 50,
            },
            "engine": {"name": engine},
        }

    runs = [sparksgd.train(config(*where), rows, rows, module=net(1))
            for where in (("inline", 1), ("inline", 3), ("simulated", 3))]  # fmt: skip
    table = pq.read_table(rows)
    x, label = torch.tensor(table["x"].to_pylist()), table["label"].to_numpy()
    with torch.no_grad():
        scores = runs[0].module(x)[:, 0].numpy()
    pairs = np.subtract.outer(scores[label == 1], scores[label == 0])
    best = runs[0].last_evaluation
    assert best is not None
    assert best.metrics["area_under_roc"] == pytest.approx(
        ((pairs > 0) + 0.5 * (pairs == 0)).mean(), rel=1e-12
    )
    assert runs[0].stopped_by == "early_stopping"
    one, other = ([report.metrics for report in run.evaluations] for run in runs[1:])
    assert one == other
    monkeypatch.setattr("sparksgd.models.metrics.MOST_RANKED", 89)
    with pytest.raises(ConfigError, match="rows to evaluate on: these are 90, but may be 89"):
        sparksgd.train(config("inline", 1), rows, rows, module=net(1))
