"""Models that were trained and saved, for tests that change their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import sparksgd


def trained(folder: Path, observers: Sequence[sparksgd.Observer] = (), **tables: Any) -> Path:
    """Train a small module of two features, and return the folder of its model."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.linspace(-1, 1, 16).reshape(8, 2)
    pq.write_table(
        pa.table({"x": pa.array(x.tolist(), pa.list_(pa.float32())), "y": x.sum(1)}), folder / "rows.parquet"
    )
    config = {
        "data": {"features": "x", "label": "y"},
        "model": {"name": "scaled:Scaled", "scale": 0.5},
        "loss": {"name": "squared_error"},
        "train": {"rows_per_step": 4, "num_shards": 1, "seed": 7},
        "engine": {"name": "inline"},
    }
    sparksgd.train(config | tables, str(folder / "rows.parquet"), out=folder / "run", observers=observers)
    return folder / "run" / "model"


def lenet(folder: Path) -> Path:
    table = pa.table({"image": pa.array([[0.5] * 16] * 4, pa.list_(pa.float32())), "label": [0, 1, 0, 1]})
    pq.write_table(table, folder / "images.parquet")
    config = {
        "data": {"features": "image"},
        "model": {"maps": [2, 3], "hidden": 4, "classes": 2, "side": 4},
        "train": {"num_shards": 1},
        "engine": {"name": "inline"},
    }
    sparksgd.train(config, str(folder / "images.parquet"), out=folder / "run")
    return folder / "run" / "model"
