"""Jobs on a few rows that are stopped, and go on."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sparksgd.cli.run import run
from sparksgd.cli.terminal import Terminal
from sparksgd.config import Config
from sparksgd.training.state import Observer, Training

EVERY_STEP = {"checkpoint": {"every_steps": 1, "keep": 1000}}


@dataclass(frozen=True)
class Jobs:
    """Runs jobs on the same rows."""

    folder: Path

    def config(self, *tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
        rows = str(self.folder / "rows.parquet")
        found: dict[str, Any] = {
            "data": {"train": rows, "test": rows},
            "model": {"name": "torch.nn:Linear", "in_features": 4, "out_features": 2},
            "optimizer": {"name": "Adam", "lr": 0.01},
            "engine": {"name": "inline"},
            "train": {"epochs": 2, "rows_per_step": 20, "num_shards": 4, "seed": 5},
        }
        for table in tables:
            for section, keys in table.items():
                same = keys.get("name", None) in (None, found.get(section, {}).get("name"))
                found[section] = (found.get(section, {}) if same else {}) | keys
        return found

    def run(self, out: str, *tables: dict[str, dict[str, Any]], **how: Any) -> dict[str, Any]:
        terminal = Terminal(Console(file=io.StringIO()), tables=False)
        run(
            Config.from_dict(self.config(*tables)),
            str(self.folder / out),
            run_id=out,
            terminal=terminal,
            **how,
        )
        found: dict[str, Any] = json.loads((self.folder / out / "summary.json").read_text())
        return found

    def stopped_at(self, out: str, step: int, *tables: dict[str, dict[str, Any]]) -> None:
        """Run a job that is interrupted while it tells of the step after this one."""

        def stepped(_: Observer, training: Training, report: Any) -> None:
            if report.step == step + 1:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Terminal, "stepped", stepped)
            with pytest.raises(KeyboardInterrupt):
                self.run(out, *tables)


def made_jobs(folder: Path) -> Jobs:
    """Return jobs on 100 rows, which are written to the folder."""
    source = np.random.default_rng(3)
    x = source.normal(size=(100, 4)).astype("f4")
    label = (x[:, 0] + x[:, 1] > 0).astype("i8")
    pq.write_table(pa.table({"features": x.tolist(), "label": label}), folder / "rows.parquet")
    return Jobs(folder)
