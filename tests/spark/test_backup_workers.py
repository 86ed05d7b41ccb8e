"""Backup workers: steps that end without the last ones, what is recorded of them, and its replay."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import time
from dataclasses import replace

import pytest
from spark_helpers import (
    LOCAL_CLUSTER,
    AtStep,
    StepsMade,
    configured,
    digests,
    memory_bytes,
    undisturbed,
    with_descendants,
)
from stragglers import HeldBack, Straggler  # tests/modules
from users_modules import ENDLESS_S  # tests/modules

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ConfigError, DataError, NotEnoughSlots, ReplayDiffers
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.names import METRICS
from sparksgd.runs.replay import read_replay
from sparksgd.solvers.rules import completed
from sparksgd.spark.train import demand_of, train
from sparksgd.training.loop import train as train_inline
from sparksgd.training.state import Probe

FOUR = ("engine.num_workers=4", "train.num_shards=4")
ONE_BACKUP = (*FOUR, "solver.backup_workers=1")


pytestmark = pytest.mark.session("local[5]")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("train.num_shards=4",), marks=pytest.mark.soak),
        ("train.num_shards=7",),
        pytest.param(("model.name=users_modules:NormNet",), marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_ordinary_stages_reach_the_digest_of_the_reference(spark, small, settings):
    config = configured("engine.barrier=false", "engine.num_workers=3", "train.steps=12", *settings)
    frame = spark.read.parquet(small)
    training = train(spark, config, frame, frame)
    inline = train_inline(config, rows=ParquetRows(small), test=ParquetRows(small), make_engine=InlineEngine)
    assert digests(training) == digests(inline)
    assert [e.loss for e in training.evaluations] == [e.loss for e in inline.evaluations]
    assert training.mode == "an ordinary stage for each step"


@pytest.mark.soak
def test_a_worker_that_is_always_late_holds_up_nothing_and_is_named(spark, small, caplog, tmp_path):
    reports = StepsMade(tmp_path / "made")  # worker 2 is held back until each step is made without it
    config = configured(*ONE_BACKUP, "train.epochs=2")
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(
            spark, config, spark.read.parquet(small), observers=[reports, RunFolder(tmp_path)],
            probe=Probe(before_gradients=HeldBack(worker=2, made=str(reports.file))),
        )  # fmt: skip
    assert {report.took_part for report in reports.seen} == {(0, 1, 3)}
    assert all(report.late == (2,) for report in reports.seen)
    late = [
        (arrival.version, report.version) for report in reports.seen for arrival in report.arrivals
        if arrival.worker == 2
    ]  # fmt: skip
    assert all(asked < came for asked, came in late)
    assert len(re.findall(r"starved: shard 2 took part in 0% of steps", caplog.text)) == 2  # in either epoch
    assert training.plan.deal == 1  # of two epochs, the second with other shards
    assert training.participation.by_worker()[2]["late_share"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["took_part"] for line in lines] == [list(report.took_part) for report in reports.seen]
    assert {line["deal"] for line in lines} == {0, 1}


def test_a_late_gradient_is_recorded_and_never_used(spark, small, tmp_path):
    """The inline engine, which has no late gradients at all, reaches the same bits by a replay."""
    reports = StepsMade(tmp_path / "made")
    config = configured(*ONE_BACKUP, "train.rows_per_step=8", "train.steps=40")
    training = train(
        spark, config, spark.read.parquet(small), observers=[reports, RunFolder(tmp_path)],
        probe=Probe(before_gradients=HeldBack(worker=1, made=str(reports.file), steps=20)),
    )  # fmt: skip
    late = [
        arrival for report in reports.seen for arrival in report.arrivals
        if arrival.worker == 1 and arrival.version < report.version
    ]  # fmt: skip
    assert late
    for arrival in late:
        asked = reports.seen[arrival.version]
        assert 1 in asked.late
        assert 1 not in asked.took_part
    replay = read_replay(tmp_path, trust=["users_modules"])
    config = replace(config, engine=replace(config.engine, name="inline"))
    inline = train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine, replay=replay)
    assert digests(inline) == digests(training)


@pytest.mark.soak
def test_a_run_with_backups_is_replayed_bit_for_bit(spark, small, tmp_path):
    config, made = configured(*ONE_BACKUP, "train.epochs=2"), StepsMade(tmp_path / "made")
    rows = spark.read.parquet(small)
    training = train(
        spark, config, rows, observers=[made, RunFolder(tmp_path)],
        probe=Probe(before_gradients=HeldBack(worker=3, made=str(made.file), steps=20)),
    )  # fmt: skip
    assert training.plan.deal > 0  # dealt anew, and so is the replay
    replay = read_replay(tmp_path, trust=["users_modules"])
    again = train(spark, config, rows, replay=replay)
    assert digests(again) == digests(training)
    assert again.plan.deal == training.plan.deal
    with pytest.raises(ConfigError, match=r"train\.seed is 5, but was 0 in the run to be replayed"):
        train(spark, configured(*ONE_BACKUP, "train.epochs=2", "train.seed=5"), rows, replay=replay)
    with pytest.raises(DataError, match="the rows are not those of the run to be replayed"):
        train(spark, config, rows.limit(900), replay=replay)
    other = replace(replay, took_part=[frozenset({0, 1}), *replay.took_part[1:]])
    with pytest.raises(ReplayDiffers, match="the replay ended at parameters"):
        train(spark, config, rows, replay=other, observers=[RunFolder(tmp_path / "again")])
    status = json.loads((tmp_path / "again" / "summary.json").read_text())["status"]
    assert status == "ReplayDiffers"  # a second try may not find it finished


def test_a_killed_run_is_replayed_as_far_as_it_goes(spark, small, tmp_path):
    config = configured(*ONE_BACKUP, "train.epochs=1")
    train(spark, config, spark.read.parquet(small), observers=[RunFolder(tmp_path)])
    lines = (tmp_path / METRICS).read_text().splitlines(keepends=True)
    (tmp_path / METRICS).write_text("".join(lines[:5]) + lines[5][:40])
    (tmp_path / "summary.json").unlink()
    replay = read_replay(tmp_path, trust=["users_modules"])
    assert len(replay.took_part) == 5
    assert train(spark, config, spark.read.parquet(small), replay=replay).version == 5


@pytest.mark.soak
def test_b_0_waits_for_stragglers_and_has_the_bits_of_plain_synchronous_sgd(spark, small):
    config = configured(*FOUR, "engine.barrier=false")
    training = train(
        spark, config, spark.read.parquet(small), probe=Probe(before_gradients=Straggler(1, 0.05, 0.3))
    )
    assert training.flat.parameters_sha256() == undisturbed(small, config)


@pytest.mark.soak
def test_lost_files_cost_nothing_but_their_backup_until_they_are_there_again(spark, small, caplog, local_dir):
    config = configured(*ONE_BACKUP, "train.rows_per_step=8")
    removed = AtStep(4, lambda _: sorted(local_dir.rglob("sparksgd-*/shard-00002-*"))[0].unlink())
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small), observers=[removed])
    assert "is lost, and training goes on without it" in caplog.text
    assert training.recovery.retries == 0
    assert training.recovery.rebuilt_shards == 1
    assert training.version == training.total_turns


@pytest.mark.soak
def test_a_worker_that_hangs_for_ever_is_done_without(spark, small, tmp_path):
    rows, config = spark.read.parquet(small), configured(*ONE_BACKUP, "train.rows_per_step=8")
    hanging = Straggler(worker=1, delay_s=ENDLESS_S)
    training = train(
        spark, config, rows, rows, observers=[RunFolder(tmp_path)], probe=Probe(before_gradients=hanging)
    )
    assert training.version == training.total_turns
    assert training.last_evaluation.rows == 1003
    found = json.loads((tmp_path / "summary.json").read_text())["arrivals"]["1"]
    assert found == {"answers": 0, "late_share": 1.0} | {
        f"arrival_{p}_s": None for p in ("p50", "p90", "p99")
    }
    all_slots = spark.sparkContext.parallelize(range(5), 5).barrier().mapPartitions(list)
    assert all_slots.collect() == list(range(5))  # its slot is free


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("engine.name=allreduce",),
            "solver.backup_workers = 1 needs steps that end when the first shards have arrived, which "
            'engine.name = "allreduce" does not carry: use engine.name = "tree" (in ordinary stages)',
        ),
        (("solver.backup_workers=4",), "solver.backup_workers is 4, but train.num_shards is 4"),
        (("engine.num_workers=2",), "takes one shard per worker, but engine.num_workers is 2"),
        (("data.placement=in_place",), "starved rows could not be dealt anew"),
        (
            ("engine.barrier=false", "engine.name=allreduce", "solver.backup_workers=0"),
            "engine.barrier is false",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(settings, words):
    with pytest.raises(ConfigError) as refused:
        demand_of(completed(configured(*ONE_BACKUP, *settings)))
    assert words in str(refused.value)


def test_inline_has_nobody_who_is_late(small):
    config = configured(*ONE_BACKUP, "engine.name=inline")
    with pytest.raises(ConfigError, match="does not carry: use engine"):
        train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine)


@pytest.mark.session("local[2]")
def test_as_many_slots_as_shards_are_needed_at_the_start(spark, small):
    config = configured("engine.num_workers=none", "solver.backup_workers=1")
    with pytest.raises(NotEnoughSlots, match=r"train.num_shards is 4, but the cluster has 2 slots"):
        train(spark, config, spark.read.parquet(small))


@pytest.mark.soak
def test_dynamic_allocation_trains_in_ordinary_stages(session_for, small):
    dynamic = {
        "spark__dynamicAllocation__enabled": "true",
        "spark__dynamicAllocation__shuffleTracking__enabled": "true",
        "spark__dynamicAllocation__minExecutors": "1",
        "spark__dynamicAllocation__maxExecutors": "2",
        "spark__dynamicAllocation__executorIdleTimeout": "2s",
        "spark__dynamicAllocation__cachedExecutorIdleTimeout": "2s",
    }
    spark = session_for(LOCAL_CLUSTER, **dynamic)
    config = configured("engine.barrier=false", "engine.num_workers=none", "train.epochs=3")
    training = train(
        spark, config, spark.read.parquet(small), probe=Probe(before_gradients=Straggler(0, 0.1))
    )
    assert training.flat.parameters_sha256() == undisturbed(small, config)


@pytest.mark.soak
def test_two_thousand_steps_with_late_answers_hold_no_more_than_the_first_five_hundred(spark, small):
    runtime = spark.sparkContext._jvm.java.lang.Runtime.getRuntime()
    held: list[dict[str, int]] = []

    def look(_) -> None:
        gc.collect()
        for _ in range(3):
            spark.sparkContext._jvm.System.gc()
            time.sleep(0.5)
        pids = with_descendants([os.getpid()])
        held.append(
            {
                "driver's bytes": memory_bytes(os.getpid(), "VmRSS"),
                "heap": int(runtime.totalMemory() - runtime.freeMemory()),
                "processes": len(pids),
            }
        )

    config = configured(*ONE_BACKUP, "train.steps=2000", "train.epochs=140")
    training = train(
        spark, config, spark.read.parquet(small), observers=[AtStep(500, look), AtStep(2000, look)],
        probe=Probe(before_gradients=Straggler(worker=1, delay_s=0.2, share=0.5)),
    )  # fmt: skip
    early, late = held
    for what, count in late.items():
        assert count <= 1.05 * early[what] + (1 if what == "processes" else 0), (what, early, late)
    assert training.version == 2000


@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.soak
def test_spark_tries_a_killed_task_again_by_itself(spark, small, flags):
    net = ("model.name=users_modules:FlagNet", f"model.folder={flags}")
    config = configured("engine.barrier=false", "train.steps=12", *net)
    kill = AtStep(5, lambda _: (flags / "kill-worker").touch())
    training = train(spark, config, spark.read.parquet(small), observers=[kill])
    assert not any(flags.iterdir())
    assert training.recovery.retries == 0
    assert training.flat.parameters_sha256() == undisturbed(small, config)
