"""The front door on Spark: rows of a DataFrame, in its session, and of a path, in the one that is active."""

from __future__ import annotations

import pytest

import sparksgd

pytestmark = pytest.mark.session("local[2]")

CONFIG = {
    "model": {"name": "users_modules:DropoutNet"},
    "optimizer": {"lr": 0.1, "momentum": 0.9},
    "engine": {"num_workers": 2},
    "train": {"rows_per_step": 64, "num_shards": 4, "steps": 4},
}
INLINE = CONFIG | {"engine": {"name": "inline"}}


def test_a_frame_is_trained_on_in_its_session_and_evaluated_on_a_path(spark, small):
    training = sparksgd.train(CONFIG, spark.read.parquet(small), small)
    inline = sparksgd.train(INLINE, small, small)
    assert (training.engine, inline.engine) == ("tree", "inline")
    assert training.flat.parameters_sha256() == inline.flat.parameters_sha256()
    assert [e.loss for e in training.evaluations] == [e.loss for e in inline.evaluations]
    assert (training.config.data.train, training.config.data.test) == (None, small)
    with pytest.raises(
        sparksgd.errors.ConfigError, match=r"computes without Spark, but the rows are a session's"
    ):
        sparksgd.train(INLINE, spark.read.parquet(small))
    with pytest.raises(
        sparksgd.errors.ConfigError, match=r"computes without Spark, but the rows are a session's"
    ):
        sparksgd.train(INLINE, small, spark.read.parquet(small))


def test_a_path_is_trained_on_in_the_active_session_which_goes_on(spark, small, tmp_path):
    training = sparksgd.train(CONFIG, small, spark.read.parquet(small), out=tmp_path / "run")
    inline = sparksgd.train(INLINE, small)
    assert inline.flat.parameters_sha256() == training.flat.parameters_sha256()
    model = sparksgd.load_model(tmp_path / "run" / "model", trust=["users_modules"])
    scores = [sparksgd.evaluate(rows, model) for rows in (small, spark.read.parquet(small))]
    assert [s.accuracy for s in scores] == [training.evaluations[-1].accuracy] * 2
    assert spark.range(3).count() == 3
