"""What is wrong of a job's names is told before Spark starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_in_process import run_job

HELD_OUT = "data.validation_fraction=0.5"


class Own:
    """A loss with an argument."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def __call__(self, output: Any, label: Any) -> Any:
        return output[:, 0] * self.gamma


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def started(*args: object, **more: object) -> None:
        raise AssertionError("Spark was started")

    monkeypatch.setattr("sparksgd.spark.session.job_session", started)
    monkeypatch.setattr("sparksgd.spark.session.submitted_at_s", lambda: 0.0)
    monkeypatch.setattr("sparksgd.spark.session.brings_files", lambda: False)
    pq.write_table(pa.table({"x": [[0.0, 1.0]] * 8, "y": [0, 1] * 4}), tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model.name=nowhere:Net"], "model.name is 'nowhere:Net', but Python finds no module 'nowhere'"),
        (["model.name=torch.nn:Linaer"], "torch.nn has no 'Linaer' (did you mean Linear?)"),
        (["model.name=lennet"], "model.name is 'lennet', which is not one of ours (did you mean lenet?)"),
        (["model.feature=3"], "does not take {'feature': 3, 'in_features': 2, 'out_features': 2}: TypeError"),
        (["loss.name=cross_entrpy"], "loss.name is 'cross_entrpy', which is not one of ours (did you mean"),
        (["loss.smoothing=0.1"], "loss.smoothing is no argument of cross_entropy"),
        (['loss.weight="heavy"'], "which does not take {'weight': 'heavy'}: "),
        ([f"loss.name={__name__}:Own"], "Own', which does not take {}: TypeError: missing a required"),
        (["optimizer.name=SGDD"], "optimizer.name is 'SGDD'"),
        (["optimizer.momentm=0.9"], "optimizer.momentm is no argument of SGD (did you mean momentum?)"),
        (['train.metrics=["f2"]', HELD_OUT], "train.metrics names 'f2', which is no metric"),
        (['train.metrics=["f1"]'], "train.metrics is set, but there are no rows to evaluate on"),
        (
            ["early_stopping.metric=rmse", "early_stopping.patience=2", HELD_OUT],
            "early_stopping.metric names 'rmse', but the loss is one whose kind is 'classes'",
        ),
    ],
)  # fmt: skip
def test_a_wrong_name_is_told_before_a_session_is_started(
    rows: str, tmp_path: Path, settings: list[str], says: str
) -> None:
    base = [
        f"data.train={rows}", 'data.features=["x"]', "data.label=y", "engine.name=tree",
        "model.name=torch.nn:Linear", "model.in_features=2", "model.out_features=2",
    ]  # fmt: skip
    words = [word for setting in (*base, *settings) for word in ("--set", setting)]
    done = run_job("train.py", *words, "--out", str(tmp_path / "run"))
    assert (done.returncode, says in done.stdout) == (2, True), done.stdout
    assert not (tmp_path / "run").exists()
