"""Backup workers: steps that end without the last ones, what is recorded of them, and its replay."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import time
from dataclasses import replace
from statistics import median

import pytest
from conftest import (  # tests/spark/conftest.py
    LOCAL_CLUSTER,
    AtStep,
    configured,
    digests,
    memory_bytes,
    undisturbed,
    with_descendants,
)
from stragglers import Straggler  # tests/modules

from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ConfigError, DataError, NotEnoughSlots, ReplayDiffers
from sparksgd.local_rows import ParquetRows
from sparksgd.output import RunFolder
from sparksgd.participation import METRICS, Record
from sparksgd.spark.training import train
from sparksgd.training import train as train_inline

FOUR = ("engine.num_workers=4", "train.num_shards=4")
ONE_BACKUP = (*FOUR, "solver.backup_workers=1")


class StepReports:
    """Observes every step's report."""

    def __init__(self):
        self.seen = []

    def started(self, training): ...
    def evaluated(self, training, report): ...
    def ended(self, training): ...
    def stepped(self, training, report):
        self.seen.append(report)


@pytest.mark.parametrize(
    "settings",
    [("train.num_shards=4",), ("train.num_shards=7",), ("model.name=users_modules:NormNet",)],
    ids=str,
)
def test_ordinary_stages_reach_the_digest_of_the_reference(session_for, small, settings):
    config = configured("engine.barrier=false", "engine.num_workers=3", "train.steps=12", *settings)
    spark = session_for("local[4]")
    frame = spark.read.parquet(small)
    training = train(spark, config, frame, frame)
    inline = train_inline(config, rows=ParquetRows(small), test=ParquetRows(small), make_engine=InlineEngine)
    assert digests(training) == digests(inline)
    assert [e.loss for e in training.evaluations] == [e.loss for e in inline.evaluations]
    assert training.mode == "an ordinary stage for each step"


def test_a_worker_that_is_always_late_holds_up_nothing_and_is_named(session_for, small, caplog, tmp_path):
    spark, reports = session_for("local[4]"), StepReports()
    config = configured(*ONE_BACKUP, "train.epochs=2")
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(
            spark, config, spark.read.parquet(small), observers=[reports, RunFolder(tmp_path)],
            before_gradients=Straggler(worker=2, delay_s=1.0),
        )  # fmt: skip
    totals = [report.timing.total for report in reports.seen[2:]]
    assert median(totals) < 0.5  # a second with b = 0
    assert sum(report.took_part == (0, 1, 3) for report in reports.seen) > len(reports.seen) / 2
    assert all(len(report.took_part) >= 3 for report in reports.seen)
    late = [arrival for report in reports.seen for arrival in report.arrivals if arrival.worker == 2]
    assert all(arrival.arrived_s >= 1.0 for arrival in late)
    assert (
        len(re.findall(r"starved: shard 2 took part in \d+% of steps", caplog.text)) == 2
    )  # in either epoch
    assert training.plan.deal == 1  # of two epochs, the second with other shards
    of_worker = training.participation.by_worker()[2]
    assert of_worker["arrival_p50_s"] >= 1.0
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["took_part"] for line in lines] == [list(report.took_part) for report in reports.seen]
    assert {line["deal"] for line in lines} == {0, 1}


def test_a_late_gradient_is_recorded_and_never_used(session_for, small, tmp_path):
    """The inline engine, which has no late gradients at all, reaches the same bits from the record."""
    spark, reports = session_for("local[4]"), StepReports()
    config = configured(*ONE_BACKUP, "train.rows_per_step=8")
    training = train(
        spark, config, spark.read.parquet(small), observers=[reports, RunFolder(tmp_path)],
        before_gradients=Straggler(worker=1, delay_s=0.3, share=0.1),
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
    record = Record.read(tmp_path)
    config = replace(config, engine=replace(config.engine, name="inline"))
    inline = train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine, record=record)
    assert digests(inline) == digests(training)


def test_a_run_with_backups_is_replayed_bit_for_bit(session_for, small, tmp_path):
    spark = session_for("local[4]")
    config = configured(*ONE_BACKUP, "train.epochs=3")
    rows = spark.read.parquet(small)
    training = train(
        spark, config, rows, observers=[RunFolder(tmp_path)],
        before_gradients=Straggler(worker=3, delay_s=0.3, share=0.8),
    )  # fmt: skip
    assert training.plan.deal > 0  # dealt anew, and so is the replay
    record = Record.read(tmp_path)
    again = train(spark, config, rows, record=record)
    assert digests(again) == digests(training)
    assert again.plan.deal == training.plan.deal
    with pytest.raises(ConfigError, match=r"train\.seed is 5, but was 0 in the run to be replayed"):
        train(spark, configured(*ONE_BACKUP, "train.epochs=3", "train.seed=5"), rows, record=record)
    with pytest.raises(DataError, match="the rows are not those of the run to be replayed"):
        train(spark, config, rows.limit(900), record=record)
    other = replace(record, took_part=[frozenset({0, 1}), *record.took_part[1:]])
    with pytest.raises(ReplayDiffers, match="the replay ended at parameters"):
        train(spark, config, rows, record=other, observers=[RunFolder(tmp_path / "again")])
    status = json.loads((tmp_path / "again" / "summary.json").read_text())["status"]
    assert status == "ReplayDiffers"  # a second try may not find it finished


def test_the_record_of_a_killed_run_is_replayed_as_far_as_it_goes(session_for, small, tmp_path):
    spark = session_for("local[4]")
    config = configured(*ONE_BACKUP, "train.epochs=1")
    train(spark, config, spark.read.parquet(small), observers=[RunFolder(tmp_path)])
    lines = (tmp_path / METRICS).read_text().splitlines(keepends=True)
    (tmp_path / METRICS).write_text("".join(lines[:5]) + lines[5][:40])
    (tmp_path / "summary.json").unlink()
    record = Record.read(tmp_path)
    assert len(record.took_part) == 5
    assert train(spark, config, spark.read.parquet(small), record=record).version == 5


def test_b_0_waits_for_stragglers_and_has_the_bits_of_plain_synchronous_sgd(session_for, small):
    spark = session_for("local[4]")
    config = configured(*FOUR, "engine.barrier=false")
    training = train(spark, config, spark.read.parquet(small), before_gradients=Straggler(1, 0.2, 0.3))
    assert training.flat.parameters_sha256() == undisturbed(small, config)


@pytest.mark.soak
def test_lost_files_cost_nothing_but_their_backup_until_they_are_there_again(
    session_for, small, caplog, local_dir
):
    spark = session_for("local[4]")
    config = configured(*ONE_BACKUP, "train.rows_per_step=8")
    removed = AtStep(4, lambda _: sorted(local_dir.rglob("sparksgd-*/shard-00002-*"))[0].unlink())
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small), observers=[removed])
    assert "is lost, and training goes on without it" in caplog.text
    assert training.recovery.retries == 0
    assert training.recovery.rebuilt_shards == 1
    assert training.version == training.total_steps


@pytest.mark.soak
def test_a_worker_that_hangs_for_ever_is_done_without(session_for, small, tmp_path):
    spark = session_for("local[4]")
    rows, config = spark.read.parquet(small), configured(*ONE_BACKUP, "train.rows_per_step=8")
    hanging = Straggler(worker=1, delay_s=600)
    training = train(spark, config, rows, rows, observers=[RunFolder(tmp_path)], before_gradients=hanging)
    assert training.version == training.total_steps
    assert training.last_evaluation.rows == 1003
    found = json.loads((tmp_path / "summary.json").read_text())["arrivals"]["1"]
    assert found == {"answers": 0, "late_share": 1.0} | {
        f"arrival_{p}_s": None for p in ("p50", "p90", "p99")
    }
    started = time.perf_counter()
    assert train(spark, replace(config, train=replace(config.train, steps=3)), rows).version == 3
    assert time.perf_counter() - started < 60  # the slot is free


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("engine.name=allreduce",), 'engine.name is "allreduce", whose workers sum among themselves'),
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
        configured(*ONE_BACKUP, *settings)
    assert words in str(refused.value)


def test_inline_has_nobody_who_is_late(small):
    config = configured(*ONE_BACKUP, "engine.name=inline")
    with pytest.raises(ConfigError, match="where nobody is late"):
        train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine)


def test_as_many_slots_as_shards_are_needed_at_the_start(session_for, small):
    spark = session_for("local[2]")
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
    training = train(spark, config, spark.read.parquet(small), before_gradients=Straggler(0, 0.1))
    assert training.flat.parameters_sha256() == undisturbed(small, config)


@pytest.mark.soak
def test_two_thousand_steps_with_late_answers_hold_no_more_than_the_first_five_hundred(session_for, small):
    spark = session_for("local[4]")
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
        before_gradients=Straggler(worker=1, delay_s=0.2, share=0.5),
    )  # fmt: skip
    early, late = held
    for what, count in late.items():
        assert count <= 1.05 * early[what] + (1 if what == "processes" else 0), (what, early, late)
    assert training.version == 2000


@pytest.mark.soak
def test_spark_tries_a_killed_task_again_by_itself(session_for, small, flags):
    spark = session_for(LOCAL_CLUSTER)
    net = ("model.name=users_modules:FlagNet", f"model.folder={flags}")
    config = configured("engine.barrier=false", "train.steps=12", *net)
    kill = AtStep(5, lambda _: (flags / "kill-worker").touch())
    training = train(spark, config, spark.read.parquet(small), observers=[kill])
    assert not any(flags.iterdir())
    assert training.recovery.retries == 0
    assert training.flat.parameters_sha256() == undisturbed(small, config)
