"""One training by torch's own loop and by the inline engine: the states after each step, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.training.loop import train
from sparksgd.training.state import Observer, Training

Rows = list[tuple[list[float], float]]
State = dict[str, torch.Tensor]

GENERATOR = torch.Generator().manual_seed(5)
NUMBERS: Rows = [
    (x.tolist(), float(y))
    for x, y in zip(
        torch.randn(24, 6, generator=GENERATOR), torch.randn(24, generator=GENERATOR), strict=True
    )
]
WORDS: Rows = [([float(n % 6)], float(n % 3)) for n in range(24)]
IMAGES: Rows = [
    (x.tolist(), float(y))
    for x, y in zip(
        torch.randn(16, 36, generator=GENERATOR), torch.randn(16, generator=GENERATOR), strict=True
    )
]


def squared(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output - label).square()


def plain(
    module: nn.Module,
    rows: Rows,
    steps: int,
    lr: float = 0.1,
    between: Callable[[nn.Module], None] | None = None,
) -> list[State]:
    """Return the state after each step of torch's own loop, where each step has all rows."""
    x, y = torch.tensor([x for x, _ in rows]), torch.tensor([y for _, y in rows])
    optimizer, states = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        (squared(module(x), y).sum() / len(rows)).backward()
        optimizer.step()
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        if between is not None:
            between(module)
    return states


class States(Observer):
    """Keeps the state_dict after each step."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.training: Training | None = None

    def started(self, training: Training) -> None:
        self.training = training

    def stepped(self, training: Training, report: Any) -> None:
        self.states.append({name: tensor.clone() for name, tensor in training.module.state_dict().items()})


def product(
    folder: Path, module: nn.Module, rows: Rows, steps: int, shards: int, lr: float = 0.1, test: bool = False,
    states: States | None = None, **sections: Any,
) -> list[State]:  # fmt: skip
    """Return the state after each step of the inline engine."""
    table = pa.table({"x": pa.array([x for x, _ in rows], pa.list_(pa.float32())), "y": [y for _, y in rows]})
    table = table.append_column("n", pa.array(range(len(rows))))
    pq.write_table(table, folder / "rows.parquet")
    states = states or States()
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y", "id": "n"},
            "loss": {"name": f"{__name__}:squared"},
            "optimizer": {"name": "SGD", "lr": lr},
            **sections,
            "train": {
                "num_shards": shards, "rows_per_step": len(rows), "epochs": steps,
                **sections.get("train", {}),
            },
        }
    )  # fmt: skip
    source = ParquetRows(str(folder))
    train(
        config, rows=source, test=source if test else None, make_engine=InlineEngine, module=module,
        observers=[states],
    )  # fmt: skip
    return states.states


def assert_equal(made: list[State], expected: list[State], **tolerance: float) -> None:
    assert len(made) == len(expected)
    for step, (mine, theirs) in enumerate(zip(made, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(
                mine[name], tensor, msg=lambda said, at=(step, name): f"{at}: {said}",
                **{"rtol": 1e-5, "atol": 1e-6, **tolerance},
            )  # fmt: skip
