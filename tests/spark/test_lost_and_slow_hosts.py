"""Ordinary stages on a standalone cluster of four hosts: some are killed, and never replaced; one is slow."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import servers  # tests/hosts
from spark_helpers import AtStep, configured, undisturbed
from stragglers import SLOW_HOST, SlowHost  # tests/modules

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import NotEnoughSlots
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.model import load_model
from sparksgd.runs.replay import read_replay
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline
from sparksgd.training.state import Probe

ONE_BACKUP = (
    "engine.num_workers=4",
    "train.num_shards=4",
    "solver.backup_workers=1",
    "train.rows_per_step=8",
)


@pytest.fixture
def standalone(tmp_path, session_for):
    """Start a master and four hosts of one slot, the last one slow; yield its address, and their servers."""
    environment = os.environ | {"SPARK_LOCAL_DIRS": str(tmp_path / "local")}
    hosts = [f"127.0.0.{number}" for number in range(1, 5)]
    slow = {hosts[-1]: {SLOW_HOST: "1"}}
    with servers.standalone(
        tmp_path / "cluster", environment=environment, hosts=hosts, memory="1g", of_host=slow
    ) as cluster:
        try:
            yield cluster.address, cluster.workers
        finally:
            session_for("local[2]")


@pytest.mark.soak
def test_one_lost_host_is_made_up_for_and_two_end_the_run_in_words(
    session_for, standalone, small, tmp_path, caplog
):
    address, hosts = standalone
    spark = session_for(address, spark__executor__memory="512m")
    kills = [
        AtStep(step, lambda _, host=host: os.killpg(host.pid, signal.SIGKILL))
        for step, host in ((20, hosts[0]), (160, hosts[1]))
    ]
    out = tmp_path / "run"
    config = configured(*ONE_BACKUP, "train.epochs=40", "engine.slots_timeout_s=5")
    with caplog.at_level(logging.WARNING, "sparksgd"), pytest.raises(NotEnoughSlots) as ended:
        train(spark, config, spark.read.parquet(small), observers=[*kills, RunFolder(out)])
    assert "1 of 4 slots are lost, and training goes on with 3" in caplog.text
    assert "2 of 4 workers are lost, but solver.backup_workers is 1" in str(ended.value)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "NotEnoughSlots"
    assert summary["steps"] >= 160
    load_model(Path(out / "model"), kills[0].training.module)
    replay = read_replay(out, trust=["users_modules"])
    assert {len(shards) for shards in replay.took_part} <= {3, 4}
    again = train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine, replay=replay)
    assert again.flat.parameters_sha256() == summary["parameters_sha256"]


@pytest.mark.soak
def test_copies_that_spark_runs_beside_a_slow_host_count_once(session_for, standalone, small):
    address, _ = standalone
    speculation = {
        "spark__speculation": "true",
        "spark__speculation__interval": "50ms",
        "spark__speculation__quantile": "0.5",
        "spark__speculation__minTaskRuntime": "50ms",
    }
    spark = session_for(address, spark__executor__memory="512m", **speculation)
    config = configured("engine.num_workers=4", "engine.barrier=false", "train.epochs=3")
    rows = spark.read.parquet(small)
    training = train(spark, config, rows, probe=Probe(before_gradients=SlowHost(delay_s=3.0)))
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.step_times.medians_s()["total"] < 3.0  # the copies were first
