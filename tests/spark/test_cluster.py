"""What Spark says of a failure, and what a person is told of it."""

from __future__ import annotations

import pytest

from sparksgd.errors import Cancelled, ClusterError, ModelError
from sparksgd.spark.cluster import final_error, gist

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
        ("Task 0 failed 1 times: ExecutorLostFailure (executor 1 exited)", type(None)),
    ],
)
def test_what_no_second_attempt_can_mend_is_told_apart(reason, kind):
    assert type(final_error(RuntimeError(ABORTED.format(reason)))) is kind
