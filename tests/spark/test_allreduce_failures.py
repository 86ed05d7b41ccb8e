"""What fails in the all-reduce engine is made again to the same bits, or ends the run at good weights."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from spark_helpers import (
    ALLREDUCE,
    LOCAL_CLUSTER,
    OVERLAPPING,
    AtStep,
    configured,
    digests,
    executor_pids,
    python_workers,
    striking,
    undisturbed,
)
from users_modules import ENDLESS_S  # tests/modules

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import Cancelled, ClusterError, NotFinite, UpdateNotFinite, UserCodeError
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

pytestmark = pytest.mark.session("local[2]")

FLAG_NET = "model.name=users_modules:FlagNet"

HANGS = ("engine.peer_timeout_s=4", "engine.max_attempts=50")
"""Another worker, in a hung one's place, must import torch, for which a slow machine may take attempts."""

WAITS_FOR_NOBODY = (f"engine.peer_timeout_s={ENDLESS_S}",)
"""What passes with that has not waited for who is gone."""


# A worker that is killed, hangs or fails in half of its gradient


@pytest.mark.parametrize(
    "flag",
    ["raise", *(pytest.param(flag, marks=pytest.mark.soak) for flag in ("kill-worker", "nan", "sleep"))],
)
@pytest.mark.soak
def test_a_worker_that_fails_when_half_of_its_gradient_has_gone(spark, small, flags, flag):
    config = configured(
        *ALLREDUCE, *OVERLAPPING, "model.name=users_modules:BackwardFlagNet", f"model.folder={flags}",
        "train.num_shards=2", "train.steps=8", *(HANGS if flag == "sleep" else WAITS_FOR_NOBODY),
    )  # fmt: skip
    watch = AtStep(4, lambda _: (flags / flag).touch())
    if flag == "nan":
        with pytest.raises(NotFinite, match=r"the gradient of turn 5 is NaN or infinite in shard \d"):
            train(spark, config, spark.read.parquet(small), observers=[watch])
        assert (watch.training.version, watch.training.recovery.retries) == (3, 0)
    elif flag == "raise":
        with pytest.raises(UserCodeError, match=r"the user's own mistake(?s:.*)in turn 5, on worker \d"):
            train(spark, config, spark.read.parquet(small), observers=[watch])
        assert (watch.training.version, watch.training.recovery.retries) == (4, 0)
    else:
        training = train(spark, config, spark.read.parquet(small), observers=[watch])
        assert training.flat.parameters_sha256() == undisturbed(small, config)
        assert training.recovery.retries >= 1
    assert_nothing_is_left(flags)


def test_a_python_worker_killed_in_a_segment_costs_that_segment_alone(spark, small, flags):
    config = configured(*ALLREDUCE, "train.steps=12", FLAG_NET, f"model.folder={flags}", *WAITS_FOR_NOBODY)
    kill = AtStep(5, lambda _: (flags / "kill-worker").touch())
    training = train(spark, config, spark.read.parquet(small), observers=[kill])
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries == 1
    assert_nothing_is_left(flags)


@pytest.mark.soak
@pytest.mark.parametrize("flag", ["sleep", "stop"])
def test_a_worker_that_hangs_ends_in_bounded_time(spark, small, flags, flag):
    config = configured(*ALLREDUCE, "train.steps=12", FLAG_NET, f"model.folder={flags}", *HANGS)
    hang = AtStep(5, lambda _: (flags / flag).touch())
    training = train(spark, config, spark.read.parquet(small), observers=[hang])
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries >= 1
    assert_nothing_is_left(flags)


@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.soak
def test_executors_killed_between_segments_and_in_one_change_no_bit(spark, small, flags):
    config = configured(*ALLREDUCE, "train.steps=20", FLAG_NET, f"model.folder={flags}")
    killers = [
        AtStep(4, lambda _: os.kill(executor_pids()[0], signal.SIGKILL)),
        AtStep(8, lambda _: (flags / "kill-worker").touch()),
        AtStep(12, lambda _: (flags / "kill-executor").touch()),
    ]
    training = train(spark, config, spark.read.parquet(small), observers=killers)
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert not any(flags.iterdir())  # both killed somebody in mid-segment
    assert training.recovery.retries >= 3  # Spark removes their files later, maybe after the run
    assert len(training.step_times) == 20


@pytest.mark.soak  # test_faults.py has it of the tree engine, by the same code
def test_a_failure_that_repeats_ends_the_run(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}", "engine.max_attempts=2")
    watch = AtStep(4, lambda _: (flags / "kill-always").touch())
    with pytest.raises(ClusterError, match=r"steps 5 to 8.*: failed 2 times"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert watch.training.version == 4


def assert_nothing_is_left(flags: Path) -> None:
    """Require that no Python worker listens for others, that the one which hung is gone, and our threads."""
    asleep = flags.with_name("asleep")
    hung = int(asleep.read_text()) if asleep.exists() else None
    deadline = time.monotonic() + 120
    while True:
        listen = [pid for pid in python_workers() if listens(pid)]
        threads = [one.name for one in threading.enumerate() if one.name.startswith("sparksgd-l")]
        if not listen and not threads and (hung is None or not Path(f"/proc/{hung}").exists()):
            return
        assert time.monotonic() < deadline, (listen, threads, hung)
        time.sleep(0.1)


def listens(pid: int) -> bool:
    """Return whether a Python worker, not the daemon that forked it, listens on a port."""
    try:
        parent = re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]
        if b"pyspark.worker" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return False
        inodes = {str(file.readlink())[8:-1] for file in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return False  # it ended
    lines = [Path("/proc/net", table).read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    sockets = [line.split() for of_table in lines for line in of_table]
    return any(words[3] == "0A" and words[9] in inodes for words in sockets)  # LISTEN


# The user's own mistakes, and a cancelled job


def test_a_user_error_ends_the_run_with_the_remote_traceback_worker_and_step(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}")
    watch = AtStep(4, lambda _: (flags / "raise").touch())
    with pytest.raises(UserCodeError, match=r"the user's own mistake(?s:.*)in turn 5, on worker \d"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)


@pytest.mark.soak
def test_a_user_error_beside_a_worker_that_hangs_is_still_the_users(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}", "engine.peer_timeout_s=2")

    def raise_on_one_and_hang_on_the_other(_):
        (flags / "sleep").touch()
        (flags / "raise").touch()

    watch = AtStep(4, raise_on_one_and_hang_on_the_other)
    with pytest.raises(UserCodeError, match=r"the user's own mistake(?s:.*)in turn 5, on worker \d"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)


@pytest.mark.soak
def test_an_optimiser_of_the_users_that_raises_on_a_worker_ends_the_run(spark, small):
    watch = AtStep(0, lambda _: None)
    config = configured(*ALLREDUCE, "optimizer.name=users_modules:TiredSGD")
    with pytest.raises(UserCodeError, match="the optimiser raised ValueError: the optimiser's own mistake"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)


def test_a_cancelled_job_ends_the_run_and_frees_the_slots(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}")
    watch = AtStep(4, lambda _: (flags / "sleep").touch())
    in_the_segment = flags.with_name("asleep").exists
    with (
        striking(in_the_segment, spark.sparkContext.cancelAllJobs),
        pytest.raises(Cancelled, match="cancelled"),
    ):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)
    both = spark.sparkContext.parallelize(range(2), 2).barrier().mapPartitions(list)
    assert both.collect() == [0, 1]
    assert_nothing_is_left(flags)


# What is not finite


def test_a_loss_that_becomes_nan_stops_the_run_at_the_last_good_weights(spark, small):
    lengths = [50, 1]
    for segment_steps in lengths:
        nan = ("loss.name=users_modules:nan_after", "train.epochs=10")
        config = configured(*ALLREDUCE, *nan, f"engine.segment_steps={segment_steps}")
        watch = AtStep(0, lambda _: None)
        with pytest.raises(NotFinite, match=r"the loss of turn \d+ is nan in shard \d, rows \d") as caught:
            train(spark, config, spark.read.parquet(small), observers=[watch])
        failed_step = int(str(caught.value).split("turn ")[1].split()[0])
        assert watch.training.version == failed_step - 2, segment_steps
        assert len(watch.training.step_times) == failed_step - 1
        good = configured("train.epochs=10", f"train.steps={failed_step - 2}")
        assert watch.training.flat.parameters_sha256() == undisturbed(small, good)
        if len(lengths) == 2:
            lengths.append(failed_step - 1)  # the loss is NaN in a segment's first step
    assert lengths[2] > 1


@pytest.mark.soak
def test_an_update_that_is_infinite_is_taken_back_on_every_engine(spark, small):
    ends = []
    for segment_steps in (1, 3, 50):
        config = configured(
            *ALLREDUCE,
            "loss.name=users_modules:steep",
            "optimizer.lr=1e-5",
            *("schedule.name=StepLR", "schedule.step_size=5", "schedule.gamma=1e42"),
            f"engine.segment_steps={segment_steps}",
        )
        watch = AtStep(0, lambda _: None)
        with pytest.raises(UpdateNotFinite, match="made a parameter infinite or NaN"):
            train(spark, config, spark.read.parquet(small), observers=[watch])
        ends.append((watch.training.version, digests(watch.training)))
    watch = AtStep(0, lambda _: None)
    with pytest.raises(UpdateNotFinite):
        train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine, observers=[watch])
    assert watch.training.version == 5
    assert {(watch.training.version, digests(watch.training))} == set(ends)
