"""The trajectory belongs to the experiment: one digest over engines, workers, masters and file layouts.

What the promise depends on: the same torch build, instruction set and number of threads (each worker
reports them; a mix is named).
"""

from __future__ import annotations

import logging
import os
from functools import cache

import pytest
from spark_helpers import (
    LOCAL_CLUSTER,
    Reports,
    configured,
    digests,
    read_files_apart,
    write_rows,
)

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ConfigError
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

FIFTY = ("model.name=users_modules:NormNet", "train.steps=50", "train.epochs=9", "train.rows_per_step=96")

pytestmark = pytest.mark.session("local[2]")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> list[str]:
    """Return the same 1,003 rows as 1 file, and as 13 files in another order."""
    folder = tmp_path_factory.mktemp("layouts")
    return [write_rows(folder / "one", 1003), write_rows(folder / "thirteen", 1003, files=13, seed=5)]


PLACES = [
    ("local[5]", 1, 4),
    ("local[5]", 3, 4),
    ("local[5]", 4, 4),
    ("local[5]", 5, 8),
    ("local[2]", 2, 4),
]
QUICK = {1}


@pytest.mark.parametrize(
    ("workers", "shards", "layout"),
    [
        pytest.param(
            workers,
            shards,
            number // 2 % 2,
            marks=[pytest.mark.session(master), *(() if number in QUICK else [pytest.mark.soak])],
        )
        for number, (master, workers, shards) in enumerate(PLACES)
    ],
)
def test_fifty_steps_end_at_one_digest_wherever_they_run(spark, layouts, workers, shards, layout):
    config = configured(*FIFTY, f"train.num_shards={shards}", f"engine.num_workers={workers}")
    training = train(spark, config, spark.read.parquet(layouts[layout]))
    assert len(training.step_times) == 50
    assert digests(training) == of_the_inline_engine(layouts[1 - layout], shards)


def test_the_inline_engine_reads_files_in_any_order_and_shards_shape_the_digest(layouts):
    four = {of_the_inline_engine(layout, 4) for layout in layouts}
    eight = {of_the_inline_engine(layout, 8) for layout in layouts}
    assert (len(four), len(eight)) == (1, 1)
    assert four != eight


@cache
def of_the_inline_engine(layout: str, shards: int) -> tuple[str, str]:
    config = configured(*FIFTY, f"train.num_shards={shards}")
    return digests(train_inline(config, rows=ParquetRows(layout), test=None, make_engine=InlineEngine))


@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.soak
@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_executors_of_their_own_reach_the_same_digest(spark, layouts, engine):
    config = configured(*FIFTY, f"engine.name={engine}")
    inline = train_inline(config, rows=ParquetRows(layouts[1]), test=None, make_engine=InlineEngine)
    assert digests(train(spark, config, spark.read.parquet(layouts[0]))) == digests(inline)


def test_exact_fields_of_every_step_are_equal_on_every_engine(spark, small):
    config = configured("train.steps=8")
    tree, inline = Reports(), Reports()
    train(spark, config, spark.read.parquet(small), observers=[tree])
    train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine, observers=[inline])
    assert tree.seen == inline.seen
    assert [step[0] for step in tree.seen] == list(range(1, 9))


def test_evaluation_is_equal_on_every_engine(spark, small):
    config = configured("train.steps=8")
    frame = spark.read.parquet(small)
    tree = train(spark, config, frame, frame)
    inline = train_inline(config, rows=ParquetRows(small), test=ParquetRows(small), make_engine=InlineEngine)
    assert [(e.step, e.loss, e.accuracy) for e in tree.evaluations] == [
        (e.step, e.loss, e.accuracy) for e in inline.evaluations
    ]


@pytest.mark.soak  # a session of its own
def test_another_instruction_set_is_named_with_both_sides(session_for, small, caplog):
    spark = session_for("local[2]", spark__executorEnv__ATEN_CPU_CAPABILITY="default")
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(spark, configured("train.steps=1"), spark.read.parquet(small))
    driver, *workers = training.numerics
    if driver.instruction_set == "DEFAULT":
        pytest.skip("this CPU has no better instruction set than the default")
    assert [worker.instruction_set for worker in workers] == ["DEFAULT", "DEFAULT"]
    assert f"instruction_set {driver.instruction_set} / DEFAULT" in caplog.text


def test_duplicated_rows_meet_in_one_shard_which_is_named_with_the_reason(spark, tmp_path, caplog):
    path = write_rows(tmp_path / "rows", 600, repeated=400)
    with caplog.at_level(logging.WARNING, "sparksgd"):
        train(spark, configured("train.steps=2"), spark.read.parquet(path))
    assert "times its share, because 399 of them repeat the features of another" in caplog.text


def test_an_id_column_spreads_duplicated_rows(spark, tmp_path, caplog):
    path = write_rows(tmp_path / "rows", 600, repeated=400)
    frame = spark.read.parquet(path).selectExpr("*", "monotonically_increasing_id() AS number")
    with caplog.at_level(logging.WARNING, "sparksgd"):
        train(spark, configured("train.steps=2", "data.id=number"), frame)
    assert "times its share" not in caplog.text


def test_rows_dealt_in_place_are_not_shuffled_and_any_workers_reach_one_digest(spark, tmp_path, caplog):
    path = write_rows(tmp_path / "rows", 600, files=6)
    frame = read_files_apart(spark, path).union(spark.read.parquet(path).where("label > 99"))  # one is empty
    found, before = set(), shuffled_bytes(spark)
    for workers in (1, 2):
        settings = ("train.steps=6", "data.placement=in_place", "train.num_shards=5")
        with caplog.at_level(logging.WARNING, "sparksgd"):
            training = train(spark, configured(*settings, f"engine.num_workers={workers}"), frame)
        assert shuffled_bytes(spark) == before
        assert sum(training.plan.sampling.shard_rows) == 600
        found.add(digests(training))
    assert len(found) == 1
    assert "the trajectory depends on how the files lie" in caplog.text


def shuffled_bytes(spark) -> int:
    """Return what executors wrote to shuffles so far."""
    return spark.sparkContext._jsc.sc().statusStore().executorList(False).apply(0).totalShuffleWrite()


def test_more_shards_than_partitions_in_place_are_refused(spark, tmp_path):
    path = write_rows(tmp_path / "rows", 600, files=3)
    with pytest.raises(ConfigError, match=r"3 partitions for 4 shards: set train.num_shards=3, or"):
        train(spark, configured("data.placement=in_place"), read_files_apart(spark, path))


@pytest.fixture(autouse=True)
def _spark_settings_of_the_shell_do_not_count(monkeypatch):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        if name in os.environ:
            monkeypatch.delenv(name)
