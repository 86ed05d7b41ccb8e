"""Rows are dealt into shards: what is odd about the shards is named, and other rows are an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_makers import Inline

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.protocol import SegmentReport
from sparksgd.errors import ShardChanged
from sparksgd.solvers.protocol import RoundSolver
from sparksgd.training.loop import train
from sparksgd.training.replay import Replay

ROWS = [([1.0], 3.0), ([2.0], 3.0), ([3.0], 6.0)]

SCHEMA = RowSchema(
    features=(Feature(name="x", dtype="float32", length=1),), label="y", label_dtype="float32", id="id"
)

CONFIG = Config.from_dict(
    {
        "data": {"features": "x", "label": "y"},
        "model": {"name": "torch.nn:Linear", "in_features": 1, "out_features": 1},
        "loss": {"name": "squared_error"},
        "optimizer": {"lr": 0.001},
        "train": {"rows_per_step": 2, "num_shards": 2, "epochs": 1},
    }
)


def with_shards(count: int) -> Config:
    return replace(CONFIG, train=replace(CONFIG.train, num_shards=count))


def parquet(folder: Path, rows: list[tuple[list[float], float]]) -> ParquetRows:
    folder.mkdir(parents=True, exist_ok=True)
    table = {"x": pa.array([x for x, _ in rows], pa.list_(pa.float64())), "y": [y for _, y in rows]}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return ParquetRows(str(folder))


class Rewritten(ParquetRows):
    """Rows that somebody rewrites between the check and the deal."""

    def __init__(self, before: ParquetRows, after: ParquetRows) -> None:
        self.first_rows, self.inspect, self.deal = before.first_rows, before.inspect, after.deal


def test_rows_that_change_under_the_run_are_an_error_that_names_their_shards(tmp_path: Path) -> None:
    before = parquet(tmp_path / "before", ROWS)
    for name, after in {"other": [*ROWS[:2], ([2.0], 1.0)], "fewer": ROWS[:2]}.items():
        changed = r"the training data changed while it was read: 3 rows .*; shards \d(, \d)* hold other rows"
        with pytest.raises(ShardChanged, match=changed):
            train(
                CONFIG,
                rows=Rewritten(before, parquet(tmp_path / name, after)),
                test=None,
                make_engine=InlineEngine,
            )


def test_of_rows_that_change_those_shards_are_named_that_hold_them(tmp_path: Path) -> None:
    rows = [([float(x)], 0.0) for x in range(40)]
    before = parquet(tmp_path / "before", rows)
    content = blake2b(np.float32(7).tobytes(), digest_size=16).digest()
    holder = int.from_bytes(content[:8], "little") % 5
    after = parquet(tmp_path / "after", [row if row[0] != [7.0] else ([7.0], 1.0) for row in rows])
    with pytest.raises(ShardChanged, match=f"; shards {holder} hold other rows"):
        train(with_shards(5), rows=Rewritten(before, after), test=None, make_engine=InlineEngine)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("deal", [0, 1])
def test_ids_that_differ_at_every_reading_are_an_error_at_every_deal(
    tmp_path: Path, num_shards: int, deal: int
) -> None:
    readings = [with_ids(tmp_path / str(seed), seed) for seed in (0, 1)]
    deals: list[int] = []

    class Random(ParquetRows):
        """Rows whose ids change between two readings: the check and a deal, or two deals."""

        def __init__(self) -> None:
            self.first_rows, self.inspect = readings[0].first_rows, readings[0].inspect

        def deal(self, *given: Any) -> Any:
            deals.append(len(deals))
            return readings[len(deals) > deal].deal(*given)

    config = replace(with_shards(num_shards), data=replace(CONFIG.data, id="id"))
    config = replace(config, train=replace(config.train, rows_per_step=20, epochs=3))
    replay = Replay(
        config=config.to_dict(), data_digest=readings[0].inspect(SCHEMA, 1).content_digest,
        model_name=config.model.name, parameters_sha256=None,
        took_part=[frozenset(range(num_shards))] * 6, deals=[0, 0, 1, 1, 2, 2],
    )  # fmt: skip
    with pytest.raises(ShardChanged, match=r"changed while it was read: 40 rows .* \(maybe data\.id, 'id'\)"):
        train(config, rows=Random(), test=None, make_engine=InlineEngine, replay=replay)
    assert len(deals) == deal + 1


def with_ids(folder: Path, seed: int) -> ParquetRows:
    folder.mkdir()
    ids = np.random.default_rng(seed).integers(0, 1 << 60, 40)
    table = {"x": pa.array([[float(x)] for x in range(40)]), "y": [0.0] * 40, "id": ids}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return ParquetRows(str(folder))


def test_a_heavy_shard_and_an_empty_one_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sparksgd"):
        train(
            with_shards(4),
            rows=parquet(tmp_path, [([1.0], 3.0)] * 40),
            test=None,
            make_engine=InlineEngine,
        )
    said = caplog.text
    assert "holds 40 rows, 4.0 times its share, because 39 of them repeat the features of another" in said
    assert "are empty: they take part in no step" in said


# Deals after the first, at the ends of epochs


class Watched(InlineEngine):
    """Notes what it is given, and whose files were there when its next steps began."""

    def __init__(self, given: list[tuple[Sampling, Shards]], plan: Plan, shards: Shards, test: None) -> None:
        super().__init__(plan, shards, test)
        self.given = given
        self.given.append((plan.sampling, shards))

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        super().deal_anew(deal)
        self.given.append((self._plan.sampling, self._shards))

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        assert are_there(self.given) == [False] * (len(self.given) - 1) + [True]
        return super().advance(solver, steps)


def are_there(given: list[tuple[Sampling, Shards]]) -> list[bool]:
    """Return of each deal whether its files are there."""
    return [Path(shards.table[0].path).exists() for _, shards in given]


def test_a_replay_deals_anew_where_the_run_did_and_keeps_the_files_of_the_last_deal(tmp_path: Path) -> None:
    rows = parquet(tmp_path, [([float(x)], 0.0) for x in range(40)])
    config = replace(CONFIG, train=replace(CONFIG.train, rows_per_step=10, epochs=4))
    digest = train(config, rows=rows, test=None, make_engine=InlineEngine).rows.data_digest
    replay = Replay(
        config=config.to_dict(), data_digest=digest, model_name=config.model.name, parameters_sha256=None,
        took_part=[frozenset({0, 1})] * 16, deals=[0] * 4 + [1] * 8 + [2] * 4,
    )  # fmt: skip
    given: list[tuple[Sampling, Shards]] = []
    training = train(config, rows=rows, test=None, make_engine=Inline(partial(Watched, given)), replay=replay)
    assert training.plan.deal == 2
    assert are_there(given) == [False] * 3
    assert [sum(sampling.shard_rows) for sampling, _ in given] == [40] * 3
    assert len({shards.table[0].row_digest for _, shards in given}) == 3  # each time other rows


def test_shards_that_starve_are_named_and_all_rows_dealt_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class OnlyTheFirst(Watched):
        """Reports that shard 1 took part in no step, as if its worker were always late."""

        def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
            segment = super().advance(solver, steps)
            segment.steps = [replace(step, took_part=(0,)) for step in segment.steps]
            return segment

    given: list[tuple[Sampling, Shards]] = []
    config = replace(CONFIG, train=replace(CONFIG.train, rows_per_step=10, epochs=2))
    rows = parquet(tmp_path, [([float(x)], 0.0) for x in range(40)])
    with caplog.at_level(logging.WARNING, "sparksgd"):
        train(config, rows=rows, test=None, make_engine=Inline(partial(OnlyTheFirst, given)))
    assert caplog.messages == [
        "starved: shard 1 took part in 0% of steps; their rows were hardly used, and all rows are dealt anew "
        "for the next epoch",
        "starved: shard 1 took part in 0% of steps; their rows were hardly used",
    ]
    assert len(given) == 2
