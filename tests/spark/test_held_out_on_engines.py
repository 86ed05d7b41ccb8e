"""Held-out rows, early stopping and observers that end a run: the same on every engine."""

from __future__ import annotations

import pytest
from spark_helpers import configured, digests, read_files_apart, write_rows

import sparksgd
from sparksgd.training.state import Observer

pytestmark = pytest.mark.session("local[2]")

EARLY = (
    "optimizer.lr=0.5",
    "train.epochs=40",
    "data.validation_fraction=0.2",
    "early_stopping.patience=2",
)
PLACES = {
    "tree, 1 worker": ("engine.num_workers=1",),
    "tree, 2 workers": ("engine.num_workers=2",),
    "stages, 2 workers": ("engine.num_workers=2", "engine.barrier=false"),
    "allreduce, 2 workers": ("engine.name=allreduce", "engine.num_workers=2"),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Return the same rows as 1 file, and as 13 files in another order."""
    folder = tmp_path_factory.mktemp("held-out")
    return [write_rows(folder / "one", 503), write_rows(folder / "thirteen", 503, files=13, seed=5)]


@pytest.fixture(scope="module")
def reference(layouts):
    return sparksgd.train(configured(*EARLY, "engine.name=inline"), layouts[0])


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=() if place == "allreduce, 2 workers" else pytest.mark.soak)
        for place in PLACES
    ],
)
def test_a_run_ends_early_at_the_same_step_and_bits_on_every_engine(spark, layouts, reference, place):
    rows = read_files_apart(spark, layouts[1])
    training = sparksgd.train(configured(*EARLY, *PLACES[place]), rows)
    assert reference.stopped_by == "early_stopping"
    assert (training.stopped_by, training.version) == (reference.stopped_by, reference.version)
    assert training.restored.step == reference.restored.step < training.version
    assert [report.loss for report in training.evaluations] == [r.loss for r in reference.evaluations]
    assert training.rows.digest == reference.rows.digest
    assert training.test_rows.digest == reference.test_rows.digest
    assert digests(training) == digests(reference)


PLATEAU = (
    "train.epochs=12",
    "optimizer.lr=0.5",
    "data.validation_fraction=0.2",
    "schedule.name=ReduceLROnPlateau",
    "schedule.patience=0",
    "schedule.threshold=0.3",
    "schedule.factor=0.5",
)


@pytest.fixture(scope="module")
def lowered(layouts):
    return sparksgd.train(configured(*PLATEAU, "engine.name=inline"), layouts[0])


@pytest.mark.parametrize(
    "place", [pytest.param("tree, 2 workers", marks=pytest.mark.soak), "allreduce, 2 workers"]
)
@pytest.mark.soak
def test_a_plateau_reaches_the_optimisers_of_all_workers(spark, layouts, lowered, place):
    rates = []

    class Rates(Observer):
        def stepped(self, training, report):
            rates.append(report.lr)

    config = configured(*PLATEAU, *PLACES[place])
    training = sparksgd.train(config, spark.read.parquet(layouts[0]), observers=[Rates()])
    assert digests(training) == digests(lowered)
    assert len(set(rates)) > 2


@pytest.mark.soak
def test_a_column_holds_rows_out_as_two_frames_do(spark, layouts):
    rows = spark.read.parquet(layouts[0]).selectExpr("*", "label = 3 as `is held.out`")
    settings = ("train.epochs=2", "loss.name=cross_entropy")
    apart = sparksgd.train(configured(*settings), rows.where("label <> 3"), rows.where("label = 3"))
    by_column = configured(*settings, "data.validation_column='is held.out'")
    together = sparksgd.train(by_column, rows)
    assert digests(together) == digests(apart)
    assert together.evaluations[-1].loss == apart.evaluations[-1].loss
    assert together.test_rows.digest == apart.test_rows.digest


@pytest.mark.soak
def test_rows_in_place_are_held_out_too(spark, layouts):
    rows = read_files_apart(spark, layouts[1])
    brief = ("data.validation_fraction=0.3", "train.steps=2", "train.num_shards=4")
    training = sparksgd.train(configured("data.placement=in_place", *brief), rows)
    hashed = sparksgd.train(configured(*brief), rows)
    assert training.rows.digest == hashed.rows.digest
    assert training.evaluations[-1].rows == hashed.evaluations[-1].rows == training.test_rows.rows


class EndsAt(Observer):
    def evaluated(self, training, report):
        if report.epoch == 2:
            training.stop("enough")


@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_an_observer_ends_a_run_at_an_evaluation(spark, layouts, engine):
    config = configured("train.epochs=9", "data.validation_fraction=0.3", f"engine.name={engine}")
    training = sparksgd.train(config, spark.read.parquet(layouts[0]), observers=[EndsAt()])
    two = sparksgd.train(
        configured("train.epochs=2", "data.validation_fraction=0.3", "engine.name=inline"), layouts[0]
    )
    assert training.is_finished
    assert digests(training) == digests(two)
