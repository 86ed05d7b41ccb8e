"""Twenty small nets of different kinds side by side end at the same bits on each engine."""

from __future__ import annotations

from collections.abc import Iterator

import contract_composites
import contract_optimizers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spark_helpers import digests

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

ROWS, FEATURES, PAGE = 90, 24, 20
PLACES = [("tree", True, 1), ("tree", True, 3), ("tree", False, 3), ("allreduce", True, 3)]
"""Engine, whether in barrier mode, workers: ordinary stages are the tree without it."""

ALL_PLACES = [*PLACES, ("tree", False, 1), ("allreduce", True, 1)]

PAGES = range(len(contract_composites.pages(contract_composites.NETS, PAGE)))

pytestmark = [
    pytest.mark.session("local[5]"),
    pytest.mark.filterwarnings("ignore"),  # torch's own words on deprecated and slow layers
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    drawn = np.random.default_rng(4)
    features = drawn.standard_normal((ROWS, FEATURES)).astype(np.float32)
    table = pa.table(
        {
            "features": pa.array(features.tolist(), pa.list_(pa.float32())),
            "label": pa.array(drawn.integers(0, 3, ROWS)),
        }
    )
    path = tmp_path_factory.mktemp("contract") / "rows.parquet"
    pq.write_table(table, path)
    return str(path)


def configured(
    model: dict[str, object], optimizer: dict[str, object], engine: str, barrier: bool, workers: int
) -> Config:
    return Config.from_dict(
        {
            "model": model,
            "loss": {"name": "contract_losses:pulled"},
            "optimizer": optimizer,
            "engine": {"name": engine, "barrier": barrier, "num_workers": workers},
            "train": {"rows_per_step": 36, "num_shards": 4, "steps": 3, "eval_every": 2},
        }
    )


TWENTY = {"name": "contract_composites:twenty"}
ADAMW = {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1}


def different_places(spark, path: str, model: dict, optimizer: dict, places: list) -> Iterator[str]:
    """Yield the places that end at other bits than the inline engine."""
    test = ParquetRows(path)
    config = configured(model, optimizer, "inline", True, 1)
    inline = train_inline(config, rows=ParquetRows(path), test=test, make_engine=InlineEngine)
    frame = spark.read.parquet(path)
    for engine, barrier, workers in places:
        training = train(spark, configured(model, optimizer, engine, barrier, workers), frame, frame)
        if (digests(training), losses(training)) != (digests(inline), losses(inline)):
            yield f"{engine} {'' if barrier else 'in ordinary stages '}with {workers} workers"


def losses(training) -> list[float]:
    return [evaluation.loss for evaluation in training.evaluations]


def test_a_composite_of_twenty_nets_ends_at_the_same_bits_on_each_engine(spark, rows):
    assert [*different_places(spark, rows, TWENTY, ADAMW, PLACES)] == []


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", PAGES)
def test_every_module_ends_at_the_same_bits_on_each_engine(spark, rows, number):
    model = {"name": "contract_composites:page", "number": number, "size": PAGE}
    assert [*different_places(spark, rows, model, ADAMW, ALL_PLACES)] == []


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", contract_optimizers.OPTIMIZERS | contract_optimizers.RANDOM)
def test_every_optimiser_ends_at_the_same_bits_on_each_engine(spark, rows, name):
    optimizer = (contract_optimizers.OPTIMIZERS | contract_optimizers.RANDOM)[name]
    model = {"name": "contract_kinds:Heads"}
    assert [*different_places(spark, rows, model, optimizer, PLACES)] == []
