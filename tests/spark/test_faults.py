"""What goes wrong on a cluster: lost executors, lost files, changed rows, cancelled jobs, user errors."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from pyspark.sql import functions as F
from spark_helpers import (
    LOCAL_CLUSTER,
    AtStep,
    configured,
    executor_pids,
    flip_bit,
    read_files_apart,
    striking,
    undisturbed,
    write_rows,
)

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.trial.trial import Found
from sparksgd.errors import Cancelled, ClusterError, NotFinite, OutOfMemory, ShardChanged, UserCodeError
from sparksgd.runs.folder import RunFolder
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

pytestmark = pytest.mark.session("local[2]")


@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.soak
def test_executors_killed_between_steps_and_in_a_step_change_no_bit_and_leave_no_file(
    spark, small, flags, local_dir
):
    config = configured("train.steps=20", "model.name=users_modules:FlagNet", f"model.folder={flags}")
    seen = []

    def kill_between(training):
        os.kill(executor_pids()[0], signal.SIGKILL)

    def kill_in_the_next(training):
        seen.append(training.recovery.retries)
        (flags / "kill-executor").touch()

    def kill_a_python_worker(_):
        (flags / "kill-worker").touch()

    killers = [AtStep(5, kill_between), AtStep(9, kill_a_python_worker), AtStep(12, kill_in_the_next)]
    training = train(spark, config, spark.read.parquet(small), observers=killers)
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    (retries,) = seen
    assert retries >= 2  # files of a killed executor may outlast it, so shards need not be rebuilt
    assert not any(flags.iterdir())
    assert training.recovery.retries > retries
    assert len(training.step_times) == 20
    assert not list(local_dir.rglob("sparksgd-*"))


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_a_step_in_which_every_worker_hangs_is_tried_again_in_bounded_time(spark, small, flags, engine):
    config = configured(
        "train.steps=12", "model.name=users_modules:FlagNet", f"model.folder={flags}", "engine.num_workers=1",
        "engine.step_timeout_s=6", f"engine.name={engine}", "engine.segment_steps=4",
        "engine.max_attempts=50",  # a slow machine may take some to import torch again
    )  # fmt: skip
    hang = AtStep(4, lambda _: (flags / "sleep").touch())
    training = train(spark, config, spark.read.parquet(small), observers=[hang])
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries >= 1


@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.soak
@pytest.mark.parametrize(
    ("renamed", "says"),
    [
        (False, r"shard \d was lost and written again, but now holds other rows"),
        (True, r"shard 0, 1, 2, 3 was lost, and cannot be written again: files of the input are gone"),
    ],
)
def test_rows_that_change_under_the_run_are_an_error_that_names_the_shard(spark, tmp_path, renamed, says):
    path = write_rows(tmp_path / "rows", 600)

    def rewrite_and_kill(_):
        shutil.rmtree(path)
        write_rows(Path(path), 600, seed=0, repeated=300)
        if renamed:  # as Spark does it
            Path(path, "part-000.parquet").rename(Path(path, "part-001.parquet"))
        for pid in executor_pids():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ShardChanged, match=says):
        train(
            spark,
            configured("train.steps=20"),
            spark.read.parquet(path),
            observers=[AtStep(5, rewrite_and_kill)],
        )


def test_a_python_worker_killed_in_a_step_costs_that_step_alone(spark, small, flags):
    config = configured("train.steps=12", "model.name=users_modules:FlagNet", f"model.folder={flags}")
    kill = AtStep(5, lambda _: (flags / "kill-worker").touch())
    training = train(spark, config, spark.read.parquet(small), observers=[kill])
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries == 1


@pytest.mark.parametrize("placement", ["hashed", pytest.param("in_place", marks=pytest.mark.soak)])
def test_deleted_shard_files_are_written_again(spark, local_dir, tmp_path, placement):
    path = write_rows(tmp_path / "rows", 600, files=4)
    config = configured("train.steps=12", f"data.placement={placement}")

    def delete(_):
        for run in local_dir.rglob("sparksgd-*"):
            shutil.rmtree(run)

    calm = train(spark, config, read_files_apart(spark, path))
    training = train(spark, config, read_files_apart(spark, path), observers=[AtStep(5, delete)])
    assert training.flat.parameters_sha256() == calm.flat.parameters_sha256()
    assert (training.recovery.retries, training.recovery.rebuilt_shards) == (1, 4)


def test_only_the_worker_whose_file_is_gone_writes_its_shards_again(spark, local_dir, small):
    config = configured("train.steps=12")

    def files() -> set[Path]:
        return set(local_dir.rglob("sparksgd-*/shard-00000-*"))

    before = []

    def delete(_):
        before.extend(files())
        before[0].unlink()

    def count(training):
        assert not files() & set(before)
        assert len(files()) == 1  # those of shard 1, the worker's other one, are superseded, and gone
        assert len(list(before[0].parent.glob("shard-00001-*"))) == 1

    calm = train(spark, config, spark.read.parquet(small))
    training = train(
        spark, config, spark.read.parquet(small), observers=[AtStep(5, delete), AtStep(8, count)]
    )
    assert training.flat.parameters_sha256() == calm.flat.parameters_sha256()
    assert (training.recovery.retries, training.recovery.rebuilt_shards) == (1, 2)  # of four shards


@pytest.mark.parametrize(
    ("engine", "which"),
    [
        (("engine.name=tree",), "training"),
        pytest.param(("engine.name=tree", "engine.barrier=false"), "training", marks=pytest.mark.soak),
        (("engine.name=allreduce", "engine.segment_steps=4"), "training"),
        pytest.param(("engine.name=allreduce", "engine.segment_steps=4"), "test", marks=pytest.mark.soak),
    ],
    ids=["tree", "stages", "allreduce", "allreduce, test rows"],
)
def test_a_flipped_bit_in_a_shard_file_is_noticed_and_the_shard_written_again(
    spark, local_dir, small, tmp_path, caplog, engine, which
):
    test_rows = write_rows(tmp_path / "test", 100, seed=1)
    config = configured("train.num_shards=2", "train.eval_every=8", *engine)
    struck = []

    def flip(_):
        files = sorted(local_dir.rglob("sparksgd-*/shard-*"), key=lambda file: file.stat().st_size)
        assert len(files) == 4  # two of few test rows, and two of many training rows
        struck.append(files[0 if which == "test" else 3])
        flip_bit(struck[0])

    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(
            spark, config, spark.read.parquet(small), spark.read.parquet(test_rows),
            observers=[AtStep(4, flip), RunFolder(tmp_path / "run")],
        )  # fmt: skip
    calm = train_inline(
        config, rows=ParquetRows(small), test=ParquetRows(test_rows), make_engine=InlineEngine
    )
    assert training.flat.parameters_sha256() == calm.flat.parameters_sha256()
    assert [one.loss for one in training.evaluations] == [one.loss for one in calm.evaluations]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rebuilt_shards"], training.recovery.retries) == (1, 1)
    found = re.search(r"shard (\d): (\S+) on (\S+): record \d+ is not what was written there", caplog.text)
    assert found.groups() == (str(int(struck[0].name[6:11])), str(struck[0]), socket.gethostname())
    assert not struck[0].exists()


def test_a_column_that_is_random_on_every_reading_is_refused(spark, small):
    noise = F.udf(lambda: os.urandom(16), "binary").asNondeterministic()
    frame = spark.read.parquet(small).withColumn("features", noise())
    with pytest.raises(ShardChanged, match=r"changed while it was read.*; shards 0, 1, 2, 3 hold other"):
        train(spark, configured(), frame)


def test_a_user_error_ends_the_run_with_the_remote_traceback_worker_and_step(spark, small, flags):
    config = configured("model.name=users_modules:FlagNet", f"model.folder={flags}")
    watch = AtStep(3, lambda _: (flags / "raise").touch())
    with pytest.raises(UserCodeError) as caught:
        train(spark, config, spark.read.parquet(small), observers=[watch])
    text = str(caught.value)
    assert "ValueError: the user's own mistake" in text
    assert 'users_modules.py", line' in text
    assert "in turn 4, on worker" in text
    assert watch.training.version == 3
    assert watch.training.recovery.retries == 0


@pytest.mark.session("local[5]")
@pytest.mark.parametrize("workers", [2, 5])
def test_a_user_error_is_raised_once_whatever_the_number_of_partitions(spark, small, flags, workers):
    config = configured(
        "model.name=users_modules:FlagNet",
        f"model.folder={flags}",
        f"engine.num_workers={workers}",
        "train.num_shards=8",
    )
    watch = AtStep(1, lambda _: (flags / "raise").touch())
    with pytest.raises(UserCodeError, match="in turn 2, on worker"):
        train(spark, config, spark.read.parquet(small), observers=[watch])


def test_a_cancelled_job_ends_the_run_and_is_not_tried_again(spark, small, flags):
    config = configured("model.name=users_modules:FlagNet", f"model.folder={flags}")
    watch = AtStep(3, lambda _: (flags / "sleep").touch())
    in_the_step = flags.with_name("asleep").exists
    with (
        striking(in_the_step, spark.sparkContext.cancelAllJobs),
        pytest.raises(Cancelled, match="cancelled"),
    ):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (3, 0)


@pytest.mark.soak
def test_a_failure_that_repeats_ends_the_run_with_sparks_own_words(spark, small, flags):
    config = configured("model.name=users_modules:FlagNet", f"model.folder={flags}", "engine.max_attempts=2")
    watch = AtStep(2, lambda _: (flags / "kill-always").touch())
    with pytest.raises(ClusterError, match=r"step 3 .*: failed 2 times, .*(?s:.*)Python worker"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert watch.training.version == 2


@pytest.mark.soak
def test_a_loss_that_becomes_nan_stops_the_run_and_leaves_the_last_good_weights(spark, small):
    config = configured("loss.name=users_modules:nan_after", "train.epochs=10")
    watch = AtStep(0, lambda _: None)
    with pytest.raises(NotFinite, match=r"the loss of turn \d+ is nan in shard \d, rows \d") as caught:
        train(spark, config, spark.read.parquet(small), observers=[watch])
    failed_step = int(str(caught.value).split("turn ")[1].split()[0])
    assert watch.training.version == failed_step - 2
    good = configured("train.epochs=10", f"train.steps={failed_step - 2}")
    assert watch.training.flat.parameters_sha256() == undisturbed(small, good)


@pytest.mark.parametrize(
    "settings",
    [["engine.name=tree"], ["engine.name=tree", "engine.barrier=false"], ["engine.name=allreduce"]],
    ids=["tree", "stages", "allreduce"],
)
def test_a_worker_that_finds_no_memory_ends_the_run_at_the_first_attempt(
    spark, small, flags, caplog, settings
):
    config = configured("model.name=users_modules:FlagNet", f"model.folder={flags}", *settings)
    exhaust = AtStep(4, lambda _: (flags / "exhaust").touch())
    with pytest.raises(
        OutOfMemory, match=r"the module or its loss found no memory.*\n  in turn .* on worker"
    ):
        train(spark, config, spark.read.parquet(small), observers=[exhaust])
    assert exhaust.training.recovery.retries == 0
    assert "tried again" not in caplog.text


@pytest.mark.soak  # a session of its own, and 25 million parameters
def test_a_heap_that_is_really_too_small_ends_the_run_at_the_first_attempt(
    session_for, small, monkeypatch, caplog
):
    monkeypatch.setattr("sparksgd.spark.cluster.memory.refuse_too_little", lambda *_: None)
    monkeypatch.setattr("sparksgd.training.preflight.try_out", lambda *_: Found(shapes={"": (64, 4)}))
    spark = session_for("local-cluster[1,1,512]", **{"spark.executor.memory": "480m"})
    config = configured(
        "model.name=wide_nets:wide", "model.parameters=25000000", "engine.num_workers=1", "train.steps=3"
    )
    with pytest.raises(OutOfMemory, match=r"heap of .*executor.* is too small.*--executor-memory"):
        train(spark, config, spark.read.parquet(small))
    assert "tried again" not in caplog.text
