"""Rows of several labels, each 0 or 1: trained, checked, evaluated, saved and loaded."""

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
from sparksgd.errors import BadRows, ConfigError, DataError, ModelError
from sparksgd.models.losses import num_classes
from sparksgd.models.metrics import add_sums, metric_sums, metric_values, weight_of_hits
from sparksgd.runs import manifest
from sparksgd.training.state import Training

STEPS, ROWS, LABELS = 3, 90, 4


def table() -> pa.Table:
    source = np.random.default_rng(8)
    x = source.normal(size=(ROWS, 3)).astype(np.float32)
    y = (x @ source.normal(size=(3, LABELS)) + source.normal(size=(ROWS, LABELS)) > 0.5).astype(np.int64)
    w = source.integers(1, 4, ROWS)
    return pa.table({"x": x.tolist(), "y": y.tolist(), "w": w, "one": y[:, :1].tolist(), "number": y[:, 0]})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("labels") / "rows.parquet"
    pq.write_table(table(), file)
    return str(file)


def net(outputs: int = LABELS) -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(3, outputs)


SEVERAL = {"name": "binary_cross_entropy", "kind": "several labels"}


def trained(rows: str, loss: dict[str, Any] = SEVERAL, label: str = "y", **more: Any) -> Training:
    config = {
        "data": {"features": ["x"], "label": label, **more.pop("data", {})},
        "loss": loss,
        "optimizer": {"lr": 0.3},
        "train": {"rows_per_step": 1000, "num_shards": 2, "epochs": STEPS, **more.pop("train", {})},
        "engine": {"name": more.pop("engine", "inline")},
    }
    module, given = more.pop("module", None) or net(), more.pop("given", None)
    return sparksgd.train(config, rows, rows, module=module, loss=given, **more)


def labels_and_logits(training: Training, name: str = "y") -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = training.module(torch.tensor(table()["x"].to_pylist()))
    return torch.tensor(table()[name].to_pylist()).float(), logits


def own(output: torch.Tensor, label: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(output, label, reduction="none").sum(1) ** power


OWN = {"name": "test_several_labels:own", "kind": "several labels", "power": 2.0}
WEIGHTS = [1.0, 2.0, 0.5, 3.0]


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (SEVERAL, nn.BCEWithLogitsLoss()),
        ({**SEVERAL, "pos_weight": WEIGHTS}, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHTS))),
        (OWN, lambda output, label: own(output, label, 2.0).mean()),
    ],
)
def test_it_trains_as_in_plain_torch_and_is_saved(rows: str, tmp_path: Path, loss: Any, plain: Any) -> None:
    training = trained(rows, loss, out=tmp_path)
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    y, _ = labels_and_logits(training)
    for _ in range(STEPS):
        optimizer.zero_grad()
        plain(module(torch.tensor(table()["x"].to_pylist())), y).backward()
        optimizer.step()
    expected = nn.utils.parameters_to_vector(module.parameters()).detach()
    assert (training.flat.parameters - expected).abs().max() < 1e-6
    saved = sparksgd.load_model(tmp_path / "model", trust=["test_several_labels"])
    assert (saved.kind, saved.schema.num_labels, saved.schema.classes) == ("several labels", LABELS, None)
    assert saved.loss is not None
    _, logits = labels_and_logits(training)
    assert float(saved.loss(logits, y).mean()) == pytest.approx(float(plain(logits, y)), rel=1e-6)


def test_a_given_instance_of_torch_s_is_of_several_labels_where_the_kind_says_so(rows: str) -> None:
    given = trained(rows, {"kind": "several labels"}, given=nn.BCEWithLogitsLoss(reduction="none"))
    assert torch.equal(given.flat.parameters, trained(rows).flat.parameters)


METRICS = ["f1_macro", "f1_weighted", "precision_macro", "recall_macro"]


@pytest.mark.parametrize("weight", [None, "w"])
@pytest.mark.parametrize("shards", [1, 3])
def test_evaluations_tell_the_accuracy_over_labels_and_means_of_them(
    rows: str, weight: str | None, shards: int
) -> None:
    keys = {"num_shards": shards, "metrics": METRICS}
    training = trained(rows, train=keys, data={} if weight is None else {"weight": weight})
    y, logits = labels_and_logits(training)
    of_rows = np.ones(ROWS) if weight is None else table()["w"].to_numpy()
    label, predicted = y.numpy() == 1, logits.numpy() > 0
    each = of_rows[:, None] / of_rows.sum()
    expected: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
    for number in range(LABELS):
        is_one, said = label[:, number], predicted[:, number]
        hits, ones, told = (of_rows[which].sum() for which in (is_one & said, is_one, said))
        expected["precision"].append(hits / told if told else 0)
        expected["recall"].append(hits / ones)
        expected["f1"].append(2 * hits / (ones + told))
    support = (of_rows[:, None] * label).sum(0)
    last = training.evaluations[-1]
    assert last.accuracy == pytest.approx(((label == predicted) * each).sum() / LABELS, rel=1e-12)
    assert last.metrics == pytest.approx({
        "f1_macro": np.mean(expected["f1"]), "f1_weighted": np.average(expected["f1"], weights=support),
        "precision_macro": np.mean(expected["precision"]), "recall_macro": np.mean(expected["recall"]),
    }, rel=1e-12)  # fmt: skip


def test_sums_over_labels_are_counted_by_hand() -> None:
    label = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    output = torch.tensor([[2.0, -1, -1], [-1, 3, -1], [1, 1, -1], [float("nan"), -1, -2]])
    predicted = (output > 0).long()
    # hits 1, labels 2, predicted 2; then 2, 2, 2; then 0, 0, 0, which counts as 0 and is not left out
    total = metric_sums(METRICS, output[:1], label[:1], predicted[:1], None, None)
    add_sums(total, metric_sums(METRICS, output[1:], label[1:], predicted[1:], None, None))
    third = 1 / 3
    assert metric_values(METRICS, total, 4) == pytest.approx(
        {"f1_macro": (0.5 + 1) * third, "f1_weighted": 0.75, "precision_macro": 0.5, "recall_macro": 0.5}
    )
    assert weight_of_hits(predicted, label, None) == pytest.approx(10 / 3)
    assert weight_of_hits(predicted, label, np.array([1.0, 3, 1, 1])) == pytest.approx((3 + 6 + 2 + 3) / 3)
    nothing = metric_sums(METRICS, output[3:], label[3:], predicted[3:], None, None)
    assert metric_values(METRICS, nothing, 1) == dict.fromkeys(METRICS, 0.0)


def test_virtual_workers_have_the_bits_of_this_process(rows: str) -> None:
    one, other = (trained(rows, engine=engine) for engine in ("inline", "simulated"))
    assert one.flat.parameters_sha256() == other.flat.parameters_sha256()
    assert one.evaluations[-1].accuracy == other.evaluations[-1].accuracy


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.bool_()), pa.list_(pa.float64()), pa.large_list(pa.int8()), pa.list_(pa.int64(), 4)]
)
def test_lists_of_any_numbers_are_labels(rows: str, tmp_path: Path, kind: pa.DataType) -> None:
    values = table()["y"].to_pylist()
    as_kind = pa.array(
        [[bool(v) for v in row] if kind.value_type == pa.bool_() else row for row in values], kind
    )
    pq.write_table(table().set_column(1, "y", as_kind), tmp_path / "rows.parquet")
    other = trained(str(tmp_path / "rows.parquet"))
    assert other.flat.parameters_sha256() == trained(rows).flat.parameters_sha256()


def test_one_label_is_several_too(rows: str) -> None:
    one = trained(rows, label="one", module=net(1))
    binary = trained(rows, {"name": "binary_cross_entropy"}, label="number", module=net(1))
    assert one.plan.schema.num_labels == 1
    assert torch.allclose(one.flat.parameters, binary.flat.parameters, atol=1e-6)
    assert one.evaluations[-1].accuracy == binary.evaluations[-1].accuracy


BAD: dict[str, Any] = {
    "neither": [0, 1, 2, 0], "nan": [0, float("nan"), 1, 0], "short": [0, 1], "empty": [], "null": None,
    "null inside": [0, None, 1, 0],
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_labels_are_refused_by_name_or_left_out(rows: str, tmp_path: Path, bad: str) -> None:
    values = table()["y"].to_pylist()
    values[70] = values[0] = BAD[bad]  # the first row decides nothing
    file = tmp_path / "rows.parquet"
    pq.write_table(table().set_column(1, "y", pa.array(values, pa.list_(pa.float64()))), file)
    says = {
        "neither": r"a label that is neither 0 nor 1 in 'y'.*2\.0", "nan": "a label that is neither 0 nor 1",
        "null": "null in 'y'", "null inside": "null inside the list in 'y'",
    }.get(bad, r"a number of values other than 4 \(most rows'\) in 'y'")  # fmt: skip
    with pytest.raises(BadRows, match=says):
        trained(str(file))
    left = trained(str(file), data={"on_bad_row": "skip"})
    pq.write_table(table().take([row for row in range(ROWS) if row not in (0, 70)]), file)
    assert left.flat.parameters_sha256() == trained(str(file)).flat.parameters_sha256()


@pytest.mark.parametrize(
    ("loss", "label", "outputs", "error", "says"),
    [
        (SEVERAL, "number", 4, DataError, "'number' is int64, but must be a list of 0 and 1 per row, as"),
        ({"name": "binary_cross_entropy"}, "y", 4, DataError,
         "'y' is list<.*>, but must be a number per row: for a list of 0 and 1 set loss.kind = "),
        (SEVERAL, "y", 3, ModelError,
         r"gives \(4, 3\) for 4 rows of 4 labels each, but a loss of several labels .*, \(4, 4\): let"),
        ({"name": "squared_error", "kind": "several labels"}, "y", 4, ConfigError, 'whose kind is "numbers"'),
    ],
)  # fmt: skip
def test_what_is_of_no_several_labels_is_refused(
    rows: str, loss: dict[str, Any], label: str, outputs: int, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        trained(rows, loss, label, module=net(outputs))


def test_an_own_loss_of_other_widths_is_refused_too() -> None:
    with pytest.raises(ModelError, match=r"gives \(8, 3\) for 8 rows of 4 labels each"):
        num_classes("several labels", {"": (8, 3)}, 4)
    with pytest.raises(ModelError, match=r"gives \(8, 4, 1\) for 8 rows of 4 labels each"):
        num_classes("several labels", {"": (8, 4, 1)}, 4)


def test_empty_lists_are_no_labels(tmp_path: Path) -> None:
    empty = pa.array([[]] * ROWS, pa.list_(pa.float64()))
    pq.write_table(table().set_column(1, "y", empty), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="label column 'y' has empty lists, but must have a 0 or 1 for each"):
        trained(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["top_2", "log_loss", "f1", "rmse"])
def test_metrics_of_other_kinds_are_refused(rows: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf'{name}.*"several labels"|{name}.*\'several labels\''):
        trained(rows, train={"metrics": [name]})


def test_a_plateau_and_early_stopping_may_go_by_the_accuracy(rows: str) -> None:
    config = {
        "data": {"features": ["x"], "label": "y"},
        "loss": SEVERAL,
        "schedule": {"name": "ReduceLROnPlateau", "mode": "max"},
        "early_stopping": {"patience": 1, "metric": "f1_macro"},
        "optimizer": {"lr": 0.3},
        "train": {"rows_per_step": 1000, "num_shards": 2, "epochs": 40},
        "engine": {"name": "inline"},
    }
    training = sparksgd.train(config, rows, rows, module=net())
    told = [report.metrics["f1_macro"] for report in training.evaluations]
    assert (training.stopped_by, int(np.argmax(told))) == ("early_stopping", len(told) - 2)


def test_the_format_before_had_one_label(rows: str, tmp_path: Path) -> None:
    trained(rows, {"name": "squared_error"}, label="number", module=net(1), out=tmp_path)
    folder = tmp_path / "model"
    about = json.loads((folder / "model.json").read_text())
    assert about["label"] == {"name": "number", "dtype": "int64", "classes": None, "num_labels": None}
    del about["sha256"], about["outputs"], about["label"]["num_labels"]
    manifest.write_manifest(sparksgd.storage.location(folder), about | {"format": 7})
    assert sparksgd.load_model(folder).schema.num_labels is None
