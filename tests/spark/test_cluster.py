"""What Spark says of a failure, and what a person is told of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from spark_helpers import configured, striking
from users_modules import ENDLESS_S  # tests/modules

from sparksgd.config import EngineConfig
from sparksgd.errors import Cancelled, ClusterError, ModelError, UserCodeError
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.failures import final_error, gist
from sparksgd.spark.cluster.lost_executors import memory_advice
from sparksgd.spark.cluster.slots import asked_slots
from sparksgd.spark.engines.allreduce import encrypts
from sparksgd.spark.train import demand_of

pytestmark = pytest.mark.session("local[5]")

SESSION = SimpleNamespace(applicationId="app-1", _jsc=object(), master="yarn")

ABORTED = (
    "An error occurred while calling z:org.apache.spark.api.python.PythonRDD.collectAndServe.\n"
    ": org.apache.spark.SparkException: Job aborted due to stage failure: {}\n"
    "\tat org.apache.spark.scheduler.DAGScheduler.failJobAndIndependentStages(DAGScheduler.scala:2857)\n"
    "\tat org.apache.spark.util.SparkErrorUtils.tryWithSafeFinally(SparkErrorUtils.scala:86)"
)
BARRIER = "Could not recover from a failed barrier ResultStage. Most recent failure reason: Stage failed\n{}"


BLOCK = "[CHECKPOINT_RDD_BLOCK_ID_NOT_FOUND] Checkpoint block rdd_29_1 not found!"
CRASH = "org.apache.spark.SparkException: Python worker exited unexpectedly (crashed)"
RESULTS = "Total size of serialized results is bigger than spark.driver.maxResultSize"


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (BARRIER.format(BLOCK), "an executor was lost"),
        ("Task 0 failed 1 times: ExecutorLostFailure (executor 1 exited)", "an executor was lost"),
        (BARRIER.format(CRASH), CRASH),
        (RESULTS, f"org.apache.spark.SparkException: Job aborted due to stage failure: {RESULTS}"),
    ],
)
def test_the_gist_of_a_stack_trace_is_its_cause(reason, told):
    assert gist(ABORTED.format(reason)) == told


def test_the_gist_of_a_failed_step_is_its_cause_too():
    wrapped = (
        "An error occurred while calling o1.get.\n"
        ": java.util.concurrent.ExecutionException: Exception thrown by job\n"
        "\tat org.apache.spark.JavaFutureActionWrapper.getImpl(FutureAction.scala:315)\n"
        "Caused by: " + ABORTED.format(BARRIER.format(CRASH)).split("\n: ")[1]
    )
    assert gist(wrapped) == CRASH
    reason = "org.apache.spark.SparkException: Job aborted due to stage failure: too many"
    assert gist(wrapped.split("Caused by")[0] + "Caused by: " + reason) == reason


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("[SPARK_JOB_CANCELLED] Job 12 cancelled part of cancelled job group", Cancelled),
        ("Job 12 cancelled because SparkContext was shut down", ClusterError),
        ("IllegalStateException: Cannot call methods on a stopped SparkContext.", ClusterError),
        ("ModuleNotFoundError: No module named 'theirs'", ModelError),
        (RESULTS, ClusterError),
        ("sparksgd.errors.UserCodeError: it raised\nTraceback\n  in step 5\n", UserCodeError),
        ("Task 0 failed 1 times: ExecutorLostFailure (executor 1 exited)", type(None)),
    ],
)
def test_what_no_second_attempt_can_mend_is_told_apart(reason, kind):
    assert type(final_error(RuntimeError(ABORTED.format(reason)), SESSION)) is kind


def test_the_users_error_is_read_back_from_sparks_text():
    text = ABORTED.format(
        "x.PythonException: Traceback\nsparksgd.errors.UserCodeError: it raised\n  in step 5\n"
    )
    error = final_error(RuntimeError(text), SESSION)
    assert (type(error), str(error)) == (UserCodeError, "it raised\n  in step 5")


@pytest.mark.parametrize(
    ("workers", "shards", "placement", "says"),
    [
        (3, 4, "hashed", "3 workers are no faster than 2: of 4 shards the busiest owns 2 either way; without "
                         "waste are 1, 2, 4 workers"),
        (3, 8, "hashed", "3 workers send 5 partial sums a step instead of 3"),
        (2, 4, "hashed", None),
        (3, 4, "in_place", None),
    ],
)  # fmt: skip
def test_workers_that_waste_are_named(spark, caplog, workers, shards, placement, says):
    settings = (f"engine.num_workers={workers}", f"train.num_shards={shards}", f"data.placement={placement}")
    with caplog.at_level(logging.WARNING, "sparksgd"):
        Cluster(spark, demand_of(configured(*settings))).settle()
    assert says in caplog.text if says else not caplog.records


def test_workers_are_as_many_as_are_of_use(spark):
    cluster = Cluster(spark, demand_of(configured("engine.num_workers=none", "train.num_shards=8")))
    cluster.settle()
    assert cluster.num_workers == 4  # five would be no faster


def test_nothing_waits_for_a_place_while_runs_go_on_and_the_sessions_settings_come_back(spark, caplog):
    conf = spark.sparkContext._jsc.sc().conf()
    one, other = (Cluster(spark, demand_of(configured("engine.num_workers=1"))) for _ in range(2))
    keys = [f"spark.locality.wait.{level}" for level in ("process", "node", "rack")]
    conf.set(keys[1], "7s")
    try:
        with caplog.at_level(logging.WARNING, "sparksgd"), one.job_group():
            with other.job_group():
                assert [conf.get(key, None) for key in keys] == ["0s"] * 3
            assert [conf.get(key, None) for key in keys] == ["0s"] * 3
        assert [conf.get(key, None) for key in keys] == [None, "7s", None]
        assert caplog.text.count("spark.locality.wait.node is 7s, but 0s until this run ends") == 1
    finally:
        conf.remove(keys[1])


@pytest.mark.parametrize(
    ("settings", "asked", "wanted"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"spark.network.crypto.enabled": "true"}, False, True),
        ({"spark.ssl.enabled": "TRUE"}, False, True),
        ({"spark.ssl.rpc.enabled": "true"}, False, True),
        ({"spark.authenticate.enableSaslEncryption": "true"}, False, True),
        ({"spark.network.crypto.enabled": "false"}, False, False),
    ],
)
def test_the_wire_is_encrypted_where_sparks_own_traffic_is(settings, asked, wanted):
    cluster = SimpleNamespace(context=SimpleNamespace(getConf=lambda: settings))
    assert encrypts(cluster, EngineConfig(encrypt=asked)) is wanted


class Conf(dict):
    """Settings, as Spark gives them."""

    def getAll(self):  # noqa: N802  # Spark's name
        return list(self.items())


@pytest.mark.parametrize(
    ("master", "settings", "slots"),
    [
        ("yarn", {"spark.executor.instances": "8"}, 8),
        ("yarn", {}, 2),
        ("yarn", {"spark.executor.instances": "3", "spark.executor.cores": "5", "spark.task.cpus": "2"}, 6),
        ("spark://host:7077", {"spark.cores.max": "6"}, 6),
        ("spark://host:7077", {"spark.cores.max": "7", "spark.executor.cores": "3"}, 6),
        ("spark://host:7077", {}, None),  # all that there are
        ("spark://host:7077", {"spark.cores.max": "6", "spark.task.cpus": "2"}, None),
        ("yarn", {"spark.executor.cores": "4", "spark.task.resource.gpu.amount": "1"}, None),
        ("local[2]", {}, None),
        ("local-cluster[4,1,1024]", {}, None),
    ],
)
def test_the_slots_that_were_asked_for(master, settings, slots):
    asked = asked_slots(Conf(settings), master)
    assert (None if asked is None else asked[0]) == slots


@pytest.mark.usefixtures("spark")
def test_a_container_killed_for_its_memory_is_told_with_the_setting():
    killed = (
        "Container killed by YARN for exceeding physical memory limits. 1.6 GB of 1.5 GB physical memory "
        "used. Consider boosting spark.executor.memoryOverhead."
    )
    conf = Conf({"spark.executor.memory": "1g", "spark.executor.memoryOverhead": "700m"})
    advice = memory_advice(conf, killed)
    assert "used 1.6 GB of the 1.5 GB that it may: 1024m of spark.executor.memory and 700m" in advice
    assert advice.endswith("Set spark.executor.memoryOverhead=1400m")
    assert memory_advice(Conf(), killed).endswith("Set spark.executor.memoryOverhead=1024m")
    assert memory_advice(conf, "Command exited with code 137") is None


@pytest.mark.soak  # a session of its own
def test_a_session_that_ends_while_its_slots_are_waited_for_ends_the_wait(session_for, caplog):
    spark = session_for("local-cluster[1,1,1024]")
    long = ("engine.num_workers=2", f"engine.slots_timeout_s={ENDLESS_S}")
    cluster = Cluster(spark, demand_of(configured(*long)))
    with (
        caplog.at_level(logging.INFO, "sparksgd"),
        striking(lambda: "waiting for slots" in caplog.text, spark.stop),
        pytest.raises(ClusterError, match="session was stopped during the run, in waiting for slots"),
    ):
        cluster.settle()
