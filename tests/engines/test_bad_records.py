"""A record that is not what was written costs a request, and no bit."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from engine_makers import Inline
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ShardMissing
from sparksgd.training.loop import train
from sparksgd.training.state import Training

LINE = 3 * 4 + 4 + 4  # bytes of features, label and checksum


@pytest.fixture
def rows(tmp_path: Path) -> ParquetRows:
    x = np.random.default_rng(2).standard_normal((96, 3))
    labels = (x @ [1.0, -2.0, 0.5]).tolist()
    pq.write_table(
        pa.table({"x": pa.array(x.tolist(), pa.list_(pa.float32())), "y": labels}), tmp_path / "rows.parquet"
    )
    return ParquetRows(str(tmp_path / "rows.parquet"))


def net() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def trained(rows: ParquetRows, make: Any, **solver: Any) -> Training:
    config = Config.from_dict(
        {
            "data": {"features": "x", "label": "y"},
            "loss": {"name": "squared_error"},
            "optimizer": {"name": "SGD", "lr": 0.03, "momentum": 0.5},
            "solver": solver,
            "train": {"rows_per_step": 16, "num_shards": 3, "epochs": 2, "eval_every": 2, "threads": 1},
        }
    )
    return train(config, rows=rows, test=rows, make_engine=Inline(make), module=net())


def flip(path: str, row: int, bit: int = 70) -> None:
    """Flip a bit of a record; a second time, flip it back."""
    content = bytearray(Path(path).read_bytes())
    content[row * LINE + bit // 8] ^= 1 << bit % 8
    Path(path).write_bytes(content)


class Flipping(InlineEngine):
    """Has a bit flipped while some steps or an evaluation begin; then flips it back, and asks again."""

    failures: list[str]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.failures = []

    def _struck(self, shards: Any, ask: Any) -> Any:
        shard = shards.table[1]
        row = 5 * (len(self.failures) + 1) % shard.rows
        flip(shard.path, row)
        try:
            found = ask()
        except ShardMissing as error:
            self.failures.append(str(error))
            flip(shard.path, row)
            return ask()
        flip(shard.path, row)
        return found

    def advance(self, *given: Any) -> Any:
        return self._struck(self._shards, lambda: InlineEngine.advance(self, *given))

    def evaluate(self, *given: Any) -> Any:
        before = len(self.failures)
        found = self._struck(self._test, lambda: InlineEngine.evaluate(self, *given))
        assert len(self.failures) == before + 1  # an evaluation reads every row
        return found


@pytest.mark.parametrize(
    "solver",
    [{}, {"name": "local_sgd", "turns_per_round": 3, "inner_state": "average"}],
    ids=["sum", "rounds"],
)
def test_a_request_that_met_a_bad_record_is_made_again_with_the_same_bits(
    rows: ParquetRows, solver: dict[str, Any]
) -> None:
    engines: list[Flipping] = []

    def make(*given: Any) -> Flipping:
        engines.append(Flipping(*given))
        return engines[0]

    struck, calm = trained(rows, make, **solver), trained(rows, InlineEngine, **solver)
    assert struck.flat.parameters_sha256() == calm.flat.parameters_sha256()
    assert struck.flat.buffers_sha256() == calm.flat.buffers_sha256()
    assert [one.loss for one in struck.evaluations] == [one.loss for one in calm.evaluations]
    assert len(engines[0].failures) > len(struck.evaluations)  # some were of steps
    assert all(failure.startswith("shard 1: ") for failure in engines[0].failures)


def test_the_inline_engine_names_record_file_and_host_and_what_to_do(rows: ParquetRows) -> None:
    paths: list[str] = []

    def make(plan: Any, shards: Any, test: Any) -> InlineEngine:
        paths.append(shards.table[1].path)
        flip(paths[0], row=8)
        return InlineEngine(plan, shards, test)

    with pytest.raises(ShardMissing) as refused:
        trained(rows, make)
    assert str(refused.value) == (
        f"shard 1: {paths[0]} on {socket.gethostname()}: record 8 is not what was written there. The inline "
        f"engine writes no shard again: run again, and test this disk if it happens again"
    )
