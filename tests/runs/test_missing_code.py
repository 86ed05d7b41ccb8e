"""A model whose code is missing says so: its files are whole."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

import sparksgd
from sparksgd.errors import DataError

CODE = """
from torch import nn
from torch.nn.functional import cross_entropy

def net():
    return nn.Linear(2, 2)

def loss(output, label):
    return cross_entropy(output, label, reduction="none")
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the model of a run whose code is lent_code.py."""
    (tmp_path / "lent_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    pq.write_table(pa.table({"x": [[0.0, 1.0]] * 8, "y": [0, 1] * 4}), tmp_path / "rows.parquet")
    config = {
        "data": {"features": "x", "label": "y"},
        "model": {"name": "lent_code:net"},
        "loss": {"name": "lent_code:loss", "kind": "classes"},
        "engine": {"name": "inline"},
        "train": {"num_shards": 1, "rows_per_step": 8, "epochs": 1},
    }
    sparksgd.train(config, str(tmp_path / "rows.parquet"), out=tmp_path / "run")
    yield tmp_path / "run" / "model"
    sys.modules.pop("lent_code", None)


def changed(model: Path, code: str | None) -> None:
    file = model.parents[1] / "lent_code.py"
    file.unlink()
    if code is not None:
        file.write_text(code)
    sys.modules.pop("lent_code", None)
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "model.name is 'lent_code:net', but Python finds no module 'lent_code': put its folder on"),
        ("import nowhere_to_be_found", "but Python finds no module 'nowhere_to_be_found'"),
        ("1 / 0", "but importing lent_code raised ZeroDivisionError"),
        ("nets = 3", "but lent_code has no 'net' (did you mean nets?)"),
        (
            CODE.replace("def loss", "def losses"),
            "loss.name is 'lent_code:loss', but lent_code has no 'loss'",
        ),
    ],
)
def test_it_says_which_code_is_missing(model: Path, code: str | None, says: str) -> None:
    changed(model, code)
    with pytest.raises(DataError) as refused:
        sparksgd.load_model(model, trust=["lent_code"])
    told, of_loss = str(refused.value), says.startswith("loss")
    assert told.startswith(f"{model} needs code that is missing here, or cannot be imported: ")
    assert says in told
    assert told.endswith(f"Or pass what it makes as {'loss' if of_loss else 'module'}=")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda weights: weights.unlink(), "cannot be read: No such file"),
        (lambda weights: weights.write_bytes(weights.read_bytes()[:-1]), "it is cut off, or of another run"),
        (lambda weights: weights.write_bytes(bytes(len(weights.read_bytes()))), "its SHA-256 is"),
    ],
)
def test_code_is_not_run_for_files_that_are_damaged(
    model: Path, damage: Callable[[Path], object], says: str
) -> None:
    changed(model, "raise AssertionError('it was run')")
    damage(model / "weights.pt")
    with pytest.raises(DataError, match=f"{re.escape(str(model))} holds no complete model: .*{says}"):
        sparksgd.load_model(model, trust=["lent_code"])
    assert "lent_code" not in sys.modules


def test_what_is_given_is_not_missed(model: Path) -> None:
    changed(model, None)
    loaded = sparksgd.load_model(model, nn.Linear(2, 2), loss=nn.CrossEntropyLoss(reduction="none"))
    assert loaded.module.weight.shape == (2, 2)
