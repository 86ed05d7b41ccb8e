"""A run goes on from a checkpoint on another engine and other numbers of workers, to the same bits."""

from __future__ import annotations

import shutil

import pytest
from resumed_jobs import Stops
from spark_helpers import configured, digests

import sparksgd
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.runs.checkpoints import manifests
from sparksgd.runs.replay import read_replay
from sparksgd.storage import location
from sparksgd.training.loop import train as train_inline

pytestmark = [pytest.mark.session("local[5]"), pytest.mark.usefixtures("every_checkpoint")]

NORM = ("model.name=users_modules:NormNet", "optimizer.momentum=0.9", "train.epochs=3")
PLACES = {
    "inline": ("engine.name=inline",),
    "tree, 1 worker": ("engine.num_workers=1",),
    "tree, 2 workers": ("engine.num_workers=2",),
    "stages, 3 workers": ("engine.num_workers=3", "engine.barrier=false"),
    "allreduce, 1 worker": ("engine.name=allreduce", "engine.num_workers=1"),
    "allreduce, 2 workers": ("engine.name=allreduce", "engine.num_workers=2"),
    "allreduce, 3 workers": ("engine.name=allreduce", "engine.num_workers=3"),
}


def resumed(spark, small, config, place, folder, origin):
    config = configured(*config, *PLACES[place])
    rows = small if place == "inline" else spark.read.parquet(small)
    return sparksgd.train(config, rows, out=folder, resume_from=origin)


def test_a_run_changes_engine_and_workers_twice(spark, small, tmp_path):
    config = (*NORM, "checkpoint.every_steps=1")
    whole = train_inline(configured(*NORM), rows=ParquetRows(small), test=None, make_engine=InlineEngine)
    first = configured(*config, *PLACES["tree, 2 workers"])
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(first, spark.read.parquet(small), out=tmp_path, observers=[Stops(6)])
    second = configured(*config, *PLACES["allreduce, 3 workers"])
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(
            second, spark.read.parquet(small), out=tmp_path, resume_from=tmp_path, observers=[Stops(13)]
        )
    last = resumed(spark, small, config, "stages, 3 workers", tmp_path, tmp_path)
    assert [each.step for each in last.resumed] == [5, 12]
    assert digests(last) == digests(whole)
    assert read_replay(tmp_path, trust=["users_modules"]).parameters_sha256 == whole.flat.parameters_sha256()


@pytest.mark.soak
@pytest.mark.parametrize("place", PLACES)
def test_a_run_of_three_epochs_goes_on_from_each_of_twenty_checkpoints(spark, small, tmp_path, place):
    config = (*NORM, "train.rows_per_step=100", "checkpoint.every_steps=1", "checkpoint.keep=100")
    whole = sparksgd.train(configured(*config, "engine.name=inline"), small, out=tmp_path / "whole")
    made = manifests(location(tmp_path / "whole" / "checkpoints"))
    chosen = made[:: max(1, len(made) // 20)][:20]
    assert len(chosen) >= min(20, whole.version)
    for start in chosen:
        origin = tmp_path / f"until {start.step}"
        shutil.copytree(tmp_path / "whole", origin)
        for file in (origin / "checkpoints").iterdir():
            if int(file.name.split("-")[1]) > start.step:
                file.unlink()
        again = resumed(spark, small, config, place, tmp_path / f"from {start.step}", origin)
        assert again.resumed[0].step == start.step
        assert digests(again) == digests(whole)


@pytest.mark.soak
def test_with_backup_workers_the_traces_before_and_after_are_one(spark, small, tmp_path):
    config = configured(
        "engine.num_workers=4", "train.num_shards=4", "solver.backup_workers=1", "train.epochs=2",
        "checkpoint.every_steps=1",
    )  # fmt: skip
    rows = spark.read.parquet(small)
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows, out=tmp_path / "run", observers=[Stops(5)])
    again = sparksgd.train(config, rows, out=tmp_path / "run", resume_from=tmp_path / "run")
    assert again.resumed[0].step == 4
    replay = read_replay(tmp_path / "run", trust=["users_modules"])
    assert len(replay.took_part) == again.version
    repeated = sparksgd.train(config, rows, replay=replay)
    assert digests(repeated) == digests(again)
