"""Metrics of one's own: the mean of a function's values over the rows, on any number of shards."""

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
from sparksgd.errors import ConfigError, DataError, ModelError, UserCodeError
from sparksgd.ml import TorchClassifier
from sparksgd.runs.replay import read_replay

MINE = "own_metrics_of_users"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a table of rows with weights."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(90, 2)).astype(np.float32)
    table = {"x": x.tolist(), "y": (x[:, 0] > 0).astype(int), "n": x[:, 1] * 3, "w": rng.uniform(0.5, 2, 90)}
    path = tmp_path_factory.mktemp("own") / "rows.parquet"
    pq.write_table(pa.table(table), path)
    return str(path)


def trained(rows: str, *, shards: int = 2, label: str = "y", weight: str | None = None, **tables: Any) -> Any:
    torch.manual_seed(0)
    data = {"features": "x", "label": label} | ({} if weight is None else {"weight": weight})
    train = {"steps": 4, "epochs": 9, "rows_per_step": 30, "num_shards": shards} | tables.pop("train", {})
    config = {"data": data, "train": train, "engine": {"name": "inline"}, "optimizer": {"lr": 0.1}} | tables
    module = nn.Linear(2, 1 if label == "n" else 2)
    out = tables.pop("out", None)
    return sparksgd.train({k: v for k, v in config.items() if k != "out"}, rows, rows, module=module, out=out)


def outputs(training: Any, rows: str) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    table = pq.read_table(rows).to_pydict()
    module = training.flat.module.eval()
    with torch.no_grad():
        return module(torch.tensor(table["x"])), {name: np.array(values) for name, values in table.items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_evaluations_tell_the_mean_over_the_rows(rows: str, shards: int) -> None:
    names = [f"{MINE}:first_logit", f"{MINE}:right", "f1"]
    training = trained(rows, shards=shards, train={"metrics": names})
    output, _ = outputs(training, rows)
    last = training.evaluations[-1]
    assert list(last.metrics) == names
    assert last.metrics[names[0]] == pytest.approx(float(output[:, 0].double().mean()), rel=1e-6)
    assert last.metrics[names[1]] == last.accuracy
    assert 0 < last.metrics["f1"] <= 1


def test_a_row_counts_by_its_weight(rows: str) -> None:
    training = trained(rows, weight="w", train={"metrics": [f"{MINE}:first_logit"]})
    output, table = outputs(training, rows)
    expected = np.average(output[:, 0].numpy(), weights=table["w"])
    assert training.evaluations[-1].metrics[f"{MINE}:first_logit"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [{"name": "squared_error"}, {"name": f"{MINE}:distance"}])
def test_numbers_and_losses_of_no_kind_have_them_too(rows: str, loss: dict[str, str]) -> None:
    name = f"{MINE}:within_one"
    others = ["rmse"] if loss["name"] == "squared_error" else []
    training = trained(rows, label="n", loss=loss, train={"metrics": [name, *others]})
    output, table = outputs(training, rows)
    assert list(training.evaluations[-1].metrics) == [name, *others]
    expected = np.mean(np.abs(output[:, 0].numpy() - table["n"]) <= 1)
    assert training.evaluations[-1].metrics[name] == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["first_logit", "right"])
def test_evaluations_are_judged_by_it(rows: str, tmp_path: Path, metric: str) -> None:
    stopping = {"metric": f"{MINE}:{metric}", "patience": 2}
    run = {"steps": 40, "eval_every": 1}
    training = trained(rows, early_stopping=stopping, train=run, out=str(tmp_path / "run"))
    values = [one.metrics[f"{MINE}:{metric}"] for one in training.evaluations]
    best = min(values) if metric == "first_logit" else max(values)
    assert training.restored is not None
    assert training.restored.metrics[f"{MINE}:{metric}"] == best
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line[f"test_{MINE}:{metric}"] for line in lines if "test_loss" in line] == values
    with pytest.raises(DataError, match=r"own_metrics_of_users.*not trusted"):
        read_replay(tmp_path / "run").check_code()
    read_replay(tmp_path / "run", trust=[MINE]).check_code()


@pytest.mark.parametrize(
    ("tables", "kind", "words"),
    [
        (
            {"train": {"metrics": ["nowhere:f"]}},
            ConfigError,
            "train.metrics is 'nowhere:f', but Python",
        ),
        ({"train": {"metrics": [f"{MINE}:rigth"]}}, ConfigError, r"did you mean right"),
        (
            {"train": {"metrics": [f"{MINE}:of_one"]}},
            ConfigError,
            "must be a function of the module's output",
        ),
        (
            {"train": {"metrics": [f"{MINE}:mean"]}},
            ModelError,
            r"gave \(\) for \d+ rows, but must give one",
        ),
        (
            {"train": {"metrics": [f"{MINE}:raises"]}},
            UserCodeError,
            r"the metric .*:raises raised ValueError:",
        ),
        (
            {"early_stopping": {"metric": f"{MINE}:without_direction", "patience": 1}},
            ConfigError,
            "nothing says which of its values is the best: set without_direction.higher_is_better",
        ),
    ],
)
def test_what_is_no_metric_is_refused_before_the_first_step(
    rows: str, tables: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        trained(rows, **tables)


def test_estimators_take_functions_by_their_names() -> None:
    from own_metrics_of_users import right

    classifier = TorchClassifier(module=nn.Linear(2, 2), metrics=[right, "f1"])
    assert classifier.getOrDefault("metrics") == [f"{MINE}:right", "f1"]
    with pytest.raises(TypeError, match="cannot be imported by executors"):
        TorchClassifier(module=nn.Linear(2, 2), metrics=[lambda output, label: label])
