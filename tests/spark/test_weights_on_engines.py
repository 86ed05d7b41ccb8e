"""Weights of rows, and metrics: the same bits on every engine, and for any layout of the files."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from spark_helpers import configured, digests, write_rows

import sparksgd
from sparksgd.errors import BadRows

pytestmark = pytest.mark.session("local[2]")

WEIGHTED = (
    *("data.weight=w.1", "train.epochs=3", "data.validation_fraction=0.2"),
    'train.metrics=["f1_macro", "top_2", "log_loss"]',
)
LOCAL_SGD = ("solver.name=local_sgd", "solver.turns_per_round=3", "solver.outer_momentum=0.5")
PLACES = {
    "tree": ("engine.num_workers=1",),
    "stages": ("engine.num_workers=2", "engine.barrier=false"),
    "allreduce": ("engine.name=allreduce", "engine.num_workers=2", "engine.segment_steps=5"),
    "encrypted": ("engine.name=allreduce", "engine.num_workers=2", "engine.encrypt=true"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return 503 rows with weights, as one file."""
    file = tmp_path_factory.mktemp("weights") / "rows.parquet"
    table = pq.read_table(write_rows(file.parent / "bare", 503))
    weights = np.random.default_rng(3).gamma(0.5, 2.0, 503) + 0.01
    pq.write_table(table.append_column("w.1", [weights.tolist()]), file)
    return str(file)


QUICK = (("tree", ()), ("allreduce", LOCAL_SGD))


@pytest.mark.parametrize(
    ("place", "solver"),
    [
        pytest.param(
            place,
            solver,
            id=f"{place}-{'local SGD' if solver else 'synchronous'}",
            marks=() if (place, solver) in QUICK else pytest.mark.soak,
        )
        for place in PLACES
        for solver in ((), LOCAL_SGD)
    ],
)
def test_every_engine_ends_at_the_bits_of_the_reference(spark, rows, place, solver):
    inline = sparksgd.train(configured(*WEIGHTED, *solver, "engine.name=inline"), rows)
    shuffled = spark.read.parquet(rows).repartition(3, "features")
    training = sparksgd.train(configured(*WEIGHTED, *solver, *PLACES[place]), shuffled)
    assert digests(training) == digests(inline)
    assert [report.loss for report in training.evaluations] == [r.loss for r in inline.evaluations]
    assert [report.accuracy for report in training.evaluations] == [r.accuracy for r in inline.evaluations]
    assert [report.metrics for report in training.evaluations] == [r.metrics for r in inline.evaluations]
    assert list(inline.evaluations[-1].metrics) == ["f1_macro", "top_2", "log_loss"]
    bare = sparksgd.train(configured(*WEIGHTED[1:], *solver, "engine.name=inline"), rows)
    assert digests(bare) != digests(inline)


def test_a_weight_of_0_is_refused_with_its_value(spark, rows):
    frame = spark.read.parquet(rows).selectExpr("features", "label", "IF(label = 3, 0.0, `w.1`) AS `w.1`")
    with pytest.raises(BadRows, match=r"a weight that is not from 1e-12 to .* in 'w.1'.*0\.0"):
        sparksgd.train(configured(*WEIGHTED), frame)
    config = configured(*WEIGHTED, "data.on_bad_row=skip", "data.max_bad_rows=300")
    skipped = sparksgd.train(config, frame)
    assert skipped.rows.bad.total() + skipped.rows.rows + skipped.test_rows.rows == 503
