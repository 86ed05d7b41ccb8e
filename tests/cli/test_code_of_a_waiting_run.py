"""A run whose code is changed while it waits for its folder is refused: older code was imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_in_process import run_job

from sparksgd.runs.folder import RunFolder

CODE = "from torch import nn\n\ndef net():\n    return nn.Linear(2, 2)\n"


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        (CODE, 0, ""),
        (CODE + "\n#", 2, "the code of model.name was changed while this run waited: start it again"),
        (None, 2, "the code of model.name was changed while this run waited"),
    ],
)
def test_code_is_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None, status: int, says: str
) -> None:
    file, held = tmp_path / "waiting_code.py", RunFolder.held

    @contextmanager
    def waited(folder: RunFolder, *args: Any) -> Iterator[None]:
        file.unlink()
        if code is not None:
            file.write_text(code)
        with held(folder, *args):
            yield

    monkeypatch.setattr(RunFolder, "held", waited)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "waiting_code", raising=False)
    file.write_text(CODE)
    pq.write_table(pa.table({"x": [[0.0, 1.0]] * 8, "y": [0, 1] * 4}), tmp_path / "rows.parquet")
    settings = [
        f"data.train={tmp_path / 'rows.parquet'}", 'data.features=["x"]', "data.label=y",
        "engine.name=inline", "model.name=waiting_code:net", "train.epochs=1", "train.num_shards=1",
        "train.rows_per_step=8",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    done = run_job("train.py", *words, "--out", str(tmp_path / "run"), "--if-running", "wait")
    assert (done.returncode, says in done.stdout) == (status, True), done.stdout
    assert (tmp_path / "run" / "run.json").exists() is (status == 0)
