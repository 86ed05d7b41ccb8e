"""A training that a person can count, and what writes down all that a training tells its observers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.protocol import StepReport
from sparksgd.training.state import EvaluationReport, Observer, Training


def slope() -> nn.Module:
    """y = w x, from w = 0."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


def parquet(folder: Path, rows: list[tuple[list[float], float]], files: int = 1) -> ParquetRows:
    """Write rows of (x, y) to so many files, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        part = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        table = pa.table(
            {"x": pa.array([x for x, _ in part], pa.list_(pa.float64())), "y": [y for _, y in part]}
        )
        pq.write_table(table, folder / f"part-{number:02}.parquet", row_group_size=29)
    return ParquetRows(str(folder))


def config_of(**sections: dict[str, Any]) -> Config:
    return Config.from_dict({"data": {"features": "x", "label": "y"}, **sections})


class Diary(Observer):
    """An observer that writes down everything that it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[StepReport] = []
        self.parameters: list[list[float]] = []
        self.training: Training | None = None

    def started(self, training: Training) -> None:
        self.training = training
        self.lines.append("started")

    def stepped(self, training: Training, report: StepReport) -> None:
        self.steps.append(report)
        self.parameters.append(training.flat.parameters.tolist())
        self.lines.append(f"step {report.step}")

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        self.lines.append(f"evaluation {report.step}")

    def ended(self, training: Training) -> None:
        self.lines.append(f"ended {type(training.error).__name__}")


# The job that a person can count
#
#   rows (x, y): (1, 3), (1, 6), (2, 0);  all in each step;  lr 1/8;  from w = 0
#   mean loss      ((w - 3)^2 + (w - 6)^2 + (2w)^2) / 3 = (6 w^2 - 18 w + 45) / 3
#   mean gradient  (12 w - 18) / 3 = 4 w - 6,  so w becomes w - (4 w - 6) / 8 = w / 2 + 3 / 4

COUNTED_ROWS = [([1.0], 3.0), ([1.0], 6.0), ([2.0], 0.0)]
COUNTED_WEIGHTS = [0.75, 1.125, 1.3125, 1.40625]
COUNTED_LOSSES = [15.0, 11.625, 10.78125, 10.5703125]


def counted(**train_keys: Any) -> Config:
    return config_of(
        model={"name": f"{__name__}:slope"},
        loss={"name": "squared_error"},
        optimizer={"lr": 0.125},
        train={"rows_per_step": 3, "num_shards": 1, "epochs": 4} | train_keys,
    )
