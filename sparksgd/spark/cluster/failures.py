"""What a failure of Spark means: whether a retry can help, and what the user is told."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from pyspark import SparkContext

from sparksgd import errors
from sparksgd.errors import Cancelled, ClusterError, DataError, OutOfMemory, SparkSGDError
from sparksgd.spark.cluster.environments import cannot_start, missing_module
from sparksgd.spark.cluster.lost_executors import advice_of, memory_advice
from sparksgd.spark.cluster.memory_failures import out_of_memory
from sparksgd.spark.cluster.placement import is_local

__all__ = ["advice_of_disk", "final_error", "gist", "is_stopped", "session_stopped"]

_CANCELLED = re.compile(r"SPARK_JOB_CANCELLED|(Job|Stage) \d+ (was )?cancelled")
_LOST = re.compile(r"CHECKPOINT_RDD_BLOCK_ID_NOT_FOUND|Checkpoint block rdd_\d+_\d+ not found|ExecutorLost")
_WRAPPED = re.compile(r"Job aborted|Exception thrown by job")
_RAISED = re.compile(r"(Exception|Error): ")
_TOO_LARGE = "bigger than spark.driver.maxResultSize"
_RAISED_BY_US = re.compile(
    r"sparksgd\.errors\.(BadRows|ModelError|UserCodeError): (.+?)\s*"
    r"(?:\n\s*at org\.apache\.|SQLSTATE: \w+|\Z)",
    re.DOTALL,
)
_OTHER_TYPES = re.compile(r"PARQUET_COLUMN_DATA_TYPE_MISMATCH|SchemaColumnConvertNotSupportedException")
_CONDITION = re.compile(r"\[([A-Z][A-Z_.]+)\] [^\n]*?(?=\.?( SQLSTATE: (\w{5})|\n|$))")
"""Spark's name of an error, and what it says; Spark 4 says its SQLSTATE, too, Spark 3.5 only knows it."""
_OF_THE_DATA = re.compile(r"22|39|P0001")
"""Class 22 is a value that an expression cannot take, 39 a function that failed, P0001 an assertion."""

_STATUS_MS = 2000
_MOST_TASKS = 10_000
_MOST_LETTERS = 300
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def is_stopped(context: SparkContext) -> bool:
    """Return whether a session has ended, or its JVM is ending after Ctrl-C."""
    try:
        return bool(context._jsc.sc().isStopped())
    except Exception:
        return True


def session_stopped(context: SparkContext, doing: str = "") -> ClusterError:
    """Return the error of a run whose session ended during the run."""
    advice = advice_of(context)
    return ClusterError(
        f"the Spark session was stopped during the run{f', in {doing}' if doing else ''}: "
        + (advice or "somebody killed the application, or ended the session, or its cluster is gone")
    )


def final_error(error: Exception, context: SparkContext) -> SparkSGDError | None:
    """Return the error of a failed job that no retry can help; None if a retry can."""
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, KeyboardInterrupt):  # py4j's clean-up may fail, and hide the first error
            return Cancelled("interrupted")
        before = before.__context__
    text = str(error)
    if "SparkContext was shut down" in text or "stopped SparkContext" in text:
        return session_stopped(context)
    if (exhausted := out_of_memory(text, is_local=is_local(context))) is not None:
        with suppress(Exception):  # the JVM may have ended by it
            exhausted = memory_advice(context.getConf(), text) or exhausted
        return OutOfMemory(exhausted)
    if _CANCELLED.search(text):
        return Cancelled("the Spark job was cancelled, and the run ends with it")
    if _TOO_LARGE in text:
        return ClusterError(
            f"results of a job are {_TOO_LARGE}: raise it (--conf spark.driver.maxResultSize=4g)"
        )
    if raised := _RAISED_BY_US.search(text):
        kind: type[SparkSGDError] = getattr(errors, raised[1])
        return kind(raised[2])
    if _OTHER_TYPES.search(text):
        return DataError(
            f"the Parquet files have columns of other types than the first of them: {gist(text)}. Write them "
            f"anew, with one type for each column"
        )
    for condition in _CONDITION.finditer(text):
        if _OF_THE_DATA.match(condition[3] or _sqlstate(condition[1], context)):
            return DataError(
                f"a column of the DataFrame cannot be computed: {condition[0]}. Mend it, or its input"
            )
    missing = _NO_MODULE.search(text)
    if missing:
        return missing_module(missing[1])
    if cannot_start(text) is None:
        return None
    return cannot_start(text, _failed_hosts(context))


def _sqlstate(condition: str, context: SparkContext) -> str:
    """Return what Spark knows a named error as; an empty text if it does not know it."""
    with suppress(Exception):  # the JVM may have ended by the error
        spark: Any = context._jvm
        return spark.org.apache.spark.SparkThrowableHelper.getSqlState(condition) or ""
    return ""


def _failed_hosts(context: SparkContext) -> list[str]:
    """Return where tasks of the group's last job failed; the exceptions of Spark 4.1 do not say it."""
    with suppress(Exception):
        spark, tracker = context._jsc.sc(), context.statusTracker()
        spark.listenerBus().waitUntilEmpty(_STATUS_MS)
        job = tracker.getJobInfo(
            max(tracker.getJobIdsForGroup(context.getLocalProperty("spark.jobGroup.id")))
        )
        found = [
            spark.statusStore().taskList(stage, 0, _MOST_TASKS) for stage in (job.stageIds if job else ())
        ]
        tasks = [tasks.apply(index) for tasks in found for index in range(tasks.size())]
        return sorted({str(task.host()) for task in tasks if task.errorMessage().isDefined()})
    return []


def gist(text: str) -> str:
    """Return the line of a Java stack trace that says what happened; of any other text, its first line."""
    if _LOST.search(text):
        return "an executor was lost"
    lines = [line.strip().removeprefix("Caused by: ").removeprefix(": ") for line in text.splitlines()]
    raised = [line for line in lines if _RAISED.search(line) and not line.startswith("at ")]
    if not raised:
        return lines[0][:_MOST_LETTERS]
    causes = [line for line in raised if not _WRAPPED.search(line)]
    said = (causes or raised[-1:])[0]
    condition = _CONDITION.search(said)
    return said[-_MOST_LETTERS:] if condition is None else said[condition.start() :][:_MOST_LETTERS]


def advice_of_disk(text: str) -> str:
    """Return what helps where a disk is full, to follow the gist; nothing if none is."""
    if "No space left on device" not in text:
        return ""
    return (
        ". A disk is full. If it is one of Spark's local directories: free some space there, name others "
        "(spark.local.dir; on YARN yarn.nodemanager.local-dirs), or use more hosts"
    )
