"""A training in a session that lives on: what it says, what it holds, what it leaves."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from pyspark import SparkContext
from servers import wait_for  # tests/hosts
from spark_helpers import (
    LOCAL_CLUSTER,
    AtStep,
    configured,
    executor_pids,
    memory_bytes,
    striking,
    undisturbed,
    with_descendants,
)
from users_modules import (
    BIG_ROW_BYTES,  # tests/modules
    ENDLESS_S,
    big_rows,  # tests/modules
    keyed_in_small_batches,  # tests/modules
)

from sparksgd.config import TrainConfig
from sparksgd.errors import Cancelled, ClusterError, NotEnoughSlots
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.jobs import RunTasks
from sparksgd.spark.session import SETTINGS, Setting, _settings_of_session, check_session, job_session
from sparksgd.spark.tasks import row_tasks
from sparksgd.spark.train import demand_of, train
from sparksgd.training.state import Observer

pytestmark = pytest.mark.session("local[2]")


def files_below(folder: Path) -> tuple[int, int]:
    """Return how many files there are, and their bytes."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # Spark's cleaner took it meanwhile
    return len(sizes), sum(sizes)


@pytest.mark.soak
def test_twenty_trainings_leave_the_disk_as_it_was(session_for, small, tmp_path):
    spark = session_for("local[2]", spark__local__dir=str(tmp_path))
    frame, config = spark.read.parquet(small), configured("train.steps=2")
    before = files_below(tmp_path)
    seen: list[Path] = []

    class Files(Observer):
        def evaluated(self, training, report):
            seen.extend(tmp_path.rglob("sparksgd-*"))

    for _ in range(20):
        train(spark, config, frame, frame, observers=[Files()])
    assert len(seen) >= 2 * 20  # of training rows and of test rows: there was something to remove
    assert files_below(tmp_path) == before
    assert not list(tmp_path.rglob("sparksgd-*"))
    assert not spark.sparkContext._jsc.getPersistentRDDs()


def test_every_job_has_a_readable_description_and_the_users_own_comes_back(spark, small):
    context = spark.sparkContext
    context.setJobGroup("mine", "my own job")
    train(spark, configured("train.steps=2"), spark.read.parquet(small), spark.read.parquet(small))
    assert context.getLocalProperty("spark.jobGroup.id") == "mine"
    assert context.getLocalProperty("spark.job.description") == "my own job"
    store = context._jsc.sc().statusStore()
    jobs = store.jobsList(None)
    descriptions = [jobs.apply(index).description() for index in range(jobs.size())]
    said = [description.get() for description in descriptions if description.isDefined()]
    for wanted in (
        "sparksgd: checking rows",
        "sparksgd: dealing rows into shards",
        "sparksgd: first contact",
        "sparksgd: step 2 (epoch 1): gradients of 63 rows on 2 workers",
        "sparksgd: evaluation of version 2",
        "sparksgd: removing shards",
    ):
        assert wanted in said


@contextmanager
def neighbour(spark, caplog, folder: Path, slots: int) -> Iterator[str]:
    """Let another job hold slots until somebody says aloud that they are held; give the words."""
    words = f"{{}} free (2 in all, other jobs hold {slots})".format(2 - slots)
    folder.mkdir()

    def hold(numbers):
        for number in numbers:
            (folder / f"holds-{number}").touch()
            while not (folder / "said").exists():
                time.sleep(0.05)  # the driver leaves a file; nobody tells of that
        return iter(())

    job = spark.sparkContext.parallelize(range(slots), slots).mapPartitions(hold)
    thread = threading.Thread(target=job.count)
    thread.start()
    wait_for(lambda: len(list(folder.glob("holds-*"))) == slots, "the other job's tasks", timeout_s=250)
    with striking(lambda: words in caplog.text, (folder / "said").touch):
        yield words
    thread.join()


@pytest.mark.soak
def test_slots_that_other_jobs_hold_are_counted_aloud(spark, small, caplog, tmp_path):
    class Neighbour(Observer):
        def started(self, training):
            self.holding = neighbour(spark, caplog, tmp_path / "one", slots=1)
            self.words = self.holding.__enter__()

        def ended(self, training):
            self.holding.__exit__(None, None, None)

    frame, one = spark.read.parquet(small), Neighbour()
    with caplog.at_level(logging.WARNING, "sparksgd"):
        train(spark, configured("train.steps=2"), frame, observers=[one])
        assert f"waiting for slots: 2 needed, {one.words}" in caplog.text
        with neighbour(spark, caplog, tmp_path / "two", slots=2) as words:
            train(spark, configured("train.steps=2"), frame)
    assert f"waiting for slots: 1 needed, {words}" in caplog.text


def test_a_training_in_a_users_session_says_what_it_lacks(spark, small, caplog, monkeypatch):
    wish = Setting(key="spark.sparksgd.wish", value="1", cost="nothing")
    monkeypatch.setattr("sparksgd.spark.session.SETTINGS", (*SETTINGS, wish))
    with caplog.at_level(logging.WARNING, "sparksgd"):
        train(spark, configured("train.steps=1"), spark.read.parquet(small))
    assert caplog.messages == ["spark.sparksgd.wish is not set; set it to 1. It costs nothing"]


def test_a_setting_of_the_contrary_is_named_with_its_value(spark, setting, caplog):
    setting("spark.broadcast.compress", "true")
    setting("spark.task.maxDirectResultSize", "200m")
    assert [lacking.key for lacking in check_session(spark, TrainConfig())] == ["spark.broadcast.compress"]
    assert "spark.broadcast.compress is true; set it to false. It costs" in caplog.text


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_ctrl_c_in_a_users_session_ends_our_job_and_frees_its_slots(spark, small, flags, engine):
    config = configured(
        "model.name=users_modules:FlagNet", f"model.folder={flags}", "train.steps=50",
        f"engine.name={engine}", "engine.segment_steps=2",
    )  # fmt: skip
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a notebook's kernel sets it

    ctrl_c = AtStep(2, lambda _: (flags / "sleep").touch())
    in_a_step = flags.with_name("asleep").exists
    try:
        with (
            striking(in_a_step, lambda: os.kill(os.getpid(), signal.SIGINT)),
            pytest.raises((KeyboardInterrupt, Cancelled)),
        ):
            train(spark, config, spark.read.parquet(small), observers=[ctrl_c])
        assert ctrl_c.training.version == 2
        both = spark.sparkContext.parallelize(range(2), 2).barrier().mapPartitions(list)
        assert both.collect() == [0, 1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_session_of_the_users_is_told_which_settings_it_lacks_and_what_that_costs(spark, caplog):
    assert check_session(spark, TrainConfig()) == []
    lacking = check_session(spark, TrainConfig(instruction_set="avx2"))
    assert [s.key for s in lacking if "ATEN" in s.key] == ["spark.executorEnv.ATEN_CPU_CAPABILITY"]
    assert "It costs other bits: executors are not held to avx2" in caplog.text
    assert all(setting.cost for setting in SETTINGS)


BIG_ROWS = 21_900


class PeakMemory(Observer):
    """Observes the peak resident memory of the executors' Python workers."""

    peak_bytes = 0

    def stepped(self, training, report):
        executors = executor_pids()
        for pid in with_descendants(executors) - set(executors):
            with suppress(OSError):  # it ended meanwhile
                self.peak_bytes = max(self.peak_bytes, memory_bytes(pid, "VmHWM"))


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_rows_of_three_times_the_executors_memory_train_in_bounded_memory(session_for):
    memory_mib = 456  # Spark starts no executor of less than 450
    assert 3 * memory_mib << 20 <= BIG_ROW_BYTES * BIG_ROWS
    spark = session_for(f"local-cluster[1,1,{memory_mib}]", spark__executor__memory=f"{memory_mib}m")
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "64")
    rows = spark.range(BIG_ROWS, numPartitions=48).mapInArrow(big_rows, "features binary, label int")
    config = configured(
        "model.name=users_modules:WideNet",
        f"train.rows_per_step={BIG_ROWS // 20}",
        "train.epochs=1",
        "train.rows_per_backward=64",
        "engine.num_workers=1",
        "optimizer.lr=0.001",
    )
    memory = PeakMemory()
    training = train(spark, config, rows, observers=[memory])
    assert training.rows.rows == BIG_ROWS
    assert len(training.step_times) == 20
    assert 300 << 20 < memory.peak_bytes < 700 << 20  # torch alone takes some 400 MiB; the rows are 1500


@pytest.mark.soak
def test_wide_rows_reach_python_in_small_batches_before_the_shuffle_too(spark, monkeypatch):
    monkeypatch.setattr(row_tasks, "keyed", keyed_in_small_batches)
    wide = f"cast(rpad(cast(id as string), {BIG_ROW_BYTES}, 'x') as binary) as features"
    rows = spark.range(200, numPartitions=1).selectExpr(wide, "cast(id % 2 as int) as label")
    settings = (
        "model.name=users_modules:WideNet",
        "train.rows_per_step=200",
        "train.steps=1",
    )
    assert train(spark, configured(*settings), rows).rows.rows == 200


class Held(Observer):
    """Observes what driver and executors hold early and late in a run.

    Args:
        spark: whose run it is.
        folder: the local directories.
        steps: when to look.
    """

    def __init__(self, spark, folder: Path, *steps: int) -> None:
        self.folder, self.steps, self.seen = folder, steps, []
        self._jvm = spark.sparkContext._jvm

    def stepped(self, training, report):
        if report.step in self.steps:
            gc.collect()
            executors = set(executor_pids())
            workers = with_descendants(executors) - executors
            driver = int(self._jvm.java.lang.ProcessHandle.current().pid())
            held = Counter({("its JVM", "heap bytes"): self._heap_bytes()})
            held["local directories", "files"] = files_below(self.folder)[0]
            for who, pids in {
                "driver": [os.getpid()], "its JVM": [driver], "executors": executors, "workers": workers,
            }.items():  # fmt: skip
                for pid in pids:
                    with suppress(OSError):  # it ended meanwhile
                        held += self._of_process(who, pid)
            self.seen.append(held)

    def _of_process(self, who: str, pid: int) -> Counter:
        held = Counter({(who, "processes"): 1})
        held[who, "threads"] = len(list(Path(f"/proc/{pid}/task").iterdir()))
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it was closed meanwhile
                held[who, "sockets" if "socket:" in str(file.readlink()) else "files"] += 1
        if who in ("driver", "workers"):  # a JVM's grows until its heap is as large as it may be
            held[who, "resident bytes"] = memory_bytes(pid, "VmRSS")
        return held

    def _heap_bytes(self) -> int:
        """Return what the driver's heap holds once several collections have found no more to free."""
        runtime = self._jvm.java.lang.Runtime.getRuntime()
        for _ in range(4):
            self._jvm.System.gc()
            time.sleep(0.5)  # Spark's cleaner lets go of what a collection found, in a thread of its own
        return int(runtime.totalMemory() - runtime.freeMemory())


@pytest.mark.soak
def test_five_thousand_steps_of_the_all_reduce_engine_hold_no_more_than_the_first_thousand(
    session_for, small, tmp_path
):
    spark = session_for(LOCAL_CLUSTER, spark__local__dir=str(tmp_path))
    length = ("train.steps=5000", "train.epochs=400", "engine.segment_steps=25")
    config = configured("engine.name=allreduce", *length)
    held = Held(spark, tmp_path, 900, 950, 1000, 4900, 4950, 5000)
    training = train(spark, config, spark.read.parquet(small), observers=[held])
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    for what in set().union(*held.seen):
        counts = [look[what] for look in held.seen]
        most_early, least_late = max(counts[:3]), min(counts[3:])  # some come and go at any moment
        grown = 1.05 * most_early if "bytes" in what[1] else most_early
        if what[0] in ("executors", "its JVM"):  # which connect to each other once they have a reason to
            grown += 8  # in 160 segments
        assert least_late <= grown, (what, counts)
    assert held.seen[0]["workers", "threads"] < 60  # not one for each of 36 segments


@pytest.mark.parametrize(("writable", "folder"), [(True, "."), (False, "/tmp")])
@pytest.mark.usefixtures("spark")
def test_on_yarn_sockets_are_where_driver_and_containers_may_write(monkeypatch, writable, folder):
    monkeypatch.setattr("os.access", lambda *_: writable)
    monkeypatch.setattr("sparksgd.spark.session._on_yarn", lambda _: True)
    conf = _settings_of_session("sparksgd tests", TrainConfig())
    assert conf.get("spark.python.unix.domain.socket.dir") == folder


@pytest.mark.soak
def test_a_job_whose_slots_do_not_come_ends(spark, monkeypatch):
    cluster = Cluster(spark, demand_of(configured("engine.slots_timeout_s=1")))
    cluster.settle()
    monkeypatch.setattr(cluster.job_watch, "_slots", lambda: 0)
    monkeypatch.setattr(RunTasks, "running", lambda tasks: (0, 0))
    starved = pytest.raises(NotEnoughSlots, match=r"1 slots are needed, but for \d s there was none")
    with cluster.job_group(), starved, cluster.job_watch.over(1):
        spark.sparkContext.parallelize([0], 1).foreach(lambda _: time.sleep(ENDLESS_S))


def test_a_session_that_cannot_start_is_an_error_in_a_line(session_for, tmp_path):
    session_for("local[2]").stop()
    events = {"spark.eventLog.enabled": "true", "spark.eventLog.dir": f"file:{tmp_path}/nowhere"}
    system = SparkContext._jvm.System
    for key, value in events.items():
        system.setProperty(key, value)
    try:
        cannot = pytest.raises(ClusterError, match=r"cannot start: java\.io\.FileNotFoundException.*nowhere")
        with cannot, job_session("sparksgd tests", TrainConfig()):
            pass
    finally:
        for key in events:
            system.clearProperty(key)
