"""The Spark settings that an iterative trainer needs: set in our own sessions, checked in others."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pyspark import SparkConf, SparkContext
from pyspark import __version__ as spark_version
from pyspark.sql import SparkSession

from sparksgd.arithmetic import instruction_set
from sparksgd.config import TrainConfig
from sparksgd.errors import ClusterError, ConfigError, NotEnoughSlots, SparkSGDError
from sparksgd.spark.cluster.cluster import refuse_connect
from sparksgd.spark.cluster.failures import gist
from sparksgd.spark.cluster.jobs import cleanup
from sparksgd.spark.cluster.slots import is_elastic
from sparksgd.spark.hadoop_files import hadoop_configuration
from sparksgd.spark.signals import end_quietly
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.storage import has_scheme, location

__all__ = [
    "SETTINGS",
    "UNIX_SOCKETS",
    "Setting",
    "brings_files",
    "check_session",
    "job_session",
    "refuse_lost_output",
    "refuse_plain_shards",
    "refuse_threads",
    "start_session",
    "submitted_at_s",
    "wanted_settings",
]

log = logging.getLogger("sparksgd")

_UNTAKEN_S = 20.0
_KILLED_S = 5.0
_TAGS = "spark.yarn.tags"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, and the reason for it."""

    key: str
    value: str
    cost: str
    """What it costs if it is not set."""

    since: tuple[int, int] = (3, 5)
    """The first Spark version that has it."""

    exact: bool = False
    """Whether another value is as bad as none."""


UNIX_SOCKETS = "spark.python.unix.domain.socket.enabled"

SETTINGS = (
    Setting(
        key=UNIX_SOCKETS,
        value="true",
        cost="about 40 ms per step: TCP delays between the JVM and its Python workers",
        since=(4, 1),
        exact=True,
    ),
    Setting(
        key="spark.task.maxDirectResultSize",
        value="100m",
        cost="about 10 ms per step: gradients above 1 MiB go through the block manager",
    ),
    Setting(
        key="spark.broadcast.compress",
        value="false",
        cost="some ms per step: weights do not compress",
        exact=True,
    ),
    Setting(
        key="spark.scheduler.barrier.maxConcurrentTasksCheck.interval",
        value="1s",
        cost="15 s of silence when an executor is lost just before a step",
    ),
    Setting(
        key="spark.ui.retainedJobs",
        value="200",
        cost="driver memory that grows with the steps, up to 1000 jobs",
    ),
    Setting(
        key="spark.ui.retainedStages",
        value="200",
        cost="driver memory that grows with the steps, up to 1000 stages",
    ),
    Setting(
        key="spark.ui.retainedTasks",
        value="2000",
        cost="driver memory that grows with the steps, up to 100000 tasks",
    ),
)


def wanted_settings(train: TrainConfig) -> list[Setting]:
    """Return the settings above that this Spark has, and those that hold executors to an instruction set."""
    version = tuple(int(part) for part in spark_version.split(".")[:2])
    pins = instruction_set.variables(train.instruction_set).items()
    return [
        *(setting for setting in SETTINGS if version >= setting.since),
        *(
            Setting(
                key=f"spark.executorEnv.{name}",
                value=value,
                cost=f"other bits: executors are not held to {train.instruction_set}",
                exact=True,
            )
            for name, value in pins
        ),
    ]


def start_session(app_name: str, train: TrainConfig) -> SparkSession:
    """Return the active session unchanged, or a new one with the settings above.

    Settings that the user gave to spark-submit are kept.  From here on URIs lead to Hadoop's file systems.

    Raises:
        ConfigError: a worker would have more threads than an executor has cores.
        ClusterError: the session is Spark Connect.
    """
    lead_to_hadoop()
    refuse_connect(SparkSession.getActiveSession())
    if SparkContext._active_spark_context is not None:
        return SparkSession.builder.getOrCreate()
    return _started(_settings_of_session(app_name, train))


def _settings_of_session(app_name: str, train: TrainConfig) -> SparkConf:
    conf = SparkConf()
    if str(conf.get("spark.app.name", ".py")).endswith(".py"):  # spark-submit's name for a job without a name
        conf.setAppName(app_name)
    for setting in wanted_settings(train):
        conf.setIfMissing(setting.key, setting.value)
    if not conf.contains("spark.task.cpus"):
        refuse_threads(conf.get, train.threads)
    conf.setIfMissing("spark.task.cpus", str(train.threads))
    conf.setIfMissing("spark.ui.showConsoleProgress", "false")
    conf.setIfMissing("spark.log.level", "WARN")
    if _on_yarn(conf):
        # The container's own directory, because the path of its temporary one is too long for a socket.  The
        # driver's working directory is the same.
        conf.setIfMissing("spark.python.unix.domain.socket.dir", "." if os.access(".", os.W_OK) else "/tmp")
        if not conf.contains("spark.scheduler.minRegisteredResourcesRatio") and not is_elastic(conf):
            # We wait for slots ourselves: we log how many have come, and stop at a time limit.
            conf.setIfMissing("spark.scheduler.maxRegisteredResourcesWaitingTime", "3s")
    return conf


def refuse_threads(get: Callable[[str, str], str | None], threads: int) -> None:
    """Refuse more threads than an executor has cores: Spark would start no task, or no session.

    Args:
        get: returns a setting of Spark, or the value that is given where it is not set.
        threads: `train.threads`.

    Raises:
        ConfigError: with both numbers.
    """
    master = str(get("spark.master", "local[*]"))
    cores = _cores_of_executor(master, str(get("spark.executor.cores", "")))
    if cores and threads > cores:
        have = "1 core" if cores == 1 else f"{cores} cores"
        most = "train.threads=1" if cores == 1 else f"train.threads={cores} or less"
        raise ConfigError(
            f"train.threads is {threads}, but an executor has {have} ({master}), and the threads of a "
            f"worker share one executor: set {most}, or give executors more cores"
        )


def _cores_of_executor(master: str, executor_cores: str) -> int | None:
    """Return how many cores an executor has; None: that is not known before it starts."""
    is_local = re.fullmatch(r"local(?:\[\s*(\*|\d+)\s*(?:,.*)?\])?", master)
    if is_local:
        return _cores_here() if is_local[1] == "*" else int(is_local[1] or 1)
    in_cluster = re.fullmatch(r"local-cluster\[.*,\s*(\d+)\s*,.*\]", master)
    if in_cluster:
        return int(in_cluster[1])
    if executor_cores.isdecimal():
        return int(executor_cores)
    return 1 if master.startswith(("yarn", "k8s:")) else None


def _cores_here() -> int | None:
    """Return how many cores local[*] takes, or at least not fewer.

    What is asked is the JVM: OpenMP may have pinned this thread to one core (OMP_PROC_BIND).
    """
    jvm: Any = SparkContext._jvm
    return os.cpu_count() if jvm is None else int(jvm.java.lang.Runtime.getRuntime().availableProcessors())


def _on_yarn(conf: SparkConf) -> bool:
    return str(conf.get("spark.master", "")).startswith("yarn")


def _started(conf: SparkConf) -> SparkSession:
    session = SparkSession.builder.config(conf=conf).getOrCreate()
    refuse_connect(session)
    return session


@contextmanager
def job_session(app_name: str, train: TrainConfig, timeout_s: float = math.inf) -> Iterator[SparkSession]:
    """Yield the session of a job's process, and stop it after the block; a Ctrl-C ends the block.

    If a session is active already, somebody else owns it: it is used as it is, and not stopped.

    Args:
        app_name: the name that the cluster shows.
        train: has the settings that executors must be started with.
        timeout_s: how long to wait for the cluster to take the application.

    Raises:
        ConfigError: a worker would have more threads than an executor has cores.
        NotEnoughSlots: it did not take it in that time.
        ClusterError: the session cannot start.
    """
    lead_to_hadoop()
    if SparkContext._active_spark_context is not None:
        yield start_session(app_name, train)
        return
    conf = _settings_of_session(app_name, train)
    with _patience(conf, timeout_s):
        session = _started(conf)
    context = session.sparkContext
    end_quietly(context)
    shown = f", shown at {context.uiWebUrl}" if context.uiWebUrl else ""
    log.info("application %s on %s%s", context.applicationId, context.master, shown)
    try:
        yield session
    finally:
        with cleanup():
            session.stop()


@contextmanager
def _patience(conf: SparkConf, timeout_s: float) -> Iterator[None]:
    """Log that the application waits for the cluster, and end the wait; Spark would wait silently for ever.

    Args:
        conf: the application's settings; gets a tag by which YARN can find it.
        timeout_s: how long it may wait.
    """
    taken, given_up_s = threading.Event(), list[float]()
    tag = f"sparksgd-{uuid.uuid4().hex}"
    on_yarn = _on_yarn(conf)
    if on_yarn:
        conf.set(_TAGS, ",".join(filter(None, (conf.get(_TAGS, None), tag))))

    def watch() -> None:
        started_s, next_s = time.monotonic(), min(_UNTAKEN_S, timeout_s)
        while not taken.wait(started_s + next_s - time.monotonic()):
            log.info("waiting for the cluster to take the application (%.0f s)", next_s)
            if on_yarn and next_s >= timeout_s:
                try:
                    if _killed_untaken(tag):
                        given_up_s.append(next_s)
                        return
                except Exception as error:
                    log.warning("cannot ask YARN to end the application: %s", gist(str(error)))
            next_s = min(next_s + _UNTAKEN_S, timeout_s if next_s < timeout_s else math.inf)

    threading.Thread(target=watch, name="sparksgd-patience", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if on_yarn:
            ending = threading.Thread(target=_killed_untaken, args=[tag], daemon=True)
            ending.start()
            ending.join(_KILLED_S)
        raise
    except Exception as error:
        if given_up_s:
            raise NotEnoughSlots(
                f"the cluster did not take the application in {given_up_s[0]:.0f} s: its queue is full, or "
                f"holds no container as large as spark.yarn.am.memory asks for. Name another queue "
                f"(--queue), ask for less, or wait longer "
                f"(engine.slots_timeout_s={2 * max(given_up_s[0], 30):.0f})"
            ) from error
        if isinstance(error, SparkSGDError):
            raise
        raise ClusterError(f"the Spark session cannot start: {gist(str(error) or repr(error))}") from error
    finally:
        taken.set()


def _killed_untaken(tag: str) -> bool:
    """End an application that has no container yet, and with it the wait; return whether that was possible.

    Nothing here may take the lock that is held while a context starts; to make a SparkConf takes it.
    """
    jvm: Any = SparkContext._jvm
    client = jvm.org.apache.hadoop.yarn.client.api.YarnClient.createYarnClient()
    client.init(jvm.org.apache.hadoop.yarn.conf.YarnConfiguration(hadoop_configuration()))
    client.start()
    for report in client.getApplications():
        waits = report.getApplicationTags().contains(tag) and not report.getFinishTime()
        # If it has a container, it may be unpacking its environment there.
        if waits and report.getApplicationResourceUsageReport().getNumUsedContainers() <= 0:
            client.killApplication(report.getApplicationId())
            return True
    return False


def refuse_lost_output(out: str, called: str) -> None:
    """Refuse an output on the disk of a container, which is removed when the driver ends.

    Args:
        out: the folder.
        called: how errors call it.

    Raises:
        ConfigError: it names no file system, in cluster mode.
    """
    SparkContext._ensure_initialized()
    if SparkConf().get("spark.submit.deployMode", "client") == "cluster" and not has_scheme(out):
        raise ConfigError(
            f"{called} is {out}, of the driver's machine; but --deploy-mode is cluster, and the container "
            f"that the driver runs in takes its disk with it: name a place that stays, like "
            f"hdfs:///models/{location(out).name} (or file:/... for a disk that all nodes mount)"
        )


def submitted_at_s() -> float:
    """Return when this run was submitted, or its JVM started, in seconds since the epoch."""
    SparkContext._ensure_initialized()
    jvm: Any = SparkContext._jvm
    started_ms = jvm.java.lang.management.ManagementFactory.getRuntimeMXBean().getStartTime()
    submitted_ms = SparkConf().get("spark.app.submitTime", None) or started_ms
    return min(int(started_ms), int(submitted_ms)) / 1000


_ENVIRONMENT = "environment"
"""Where jobs/README.md has an environment unpacked, which brings no code of the user's."""


def brings_files() -> bool:
    """Return whether a session that is not started yet brings files: code, or what code reads.

    spark-submit itself puts --py-files on the path of the job's Python; without it, the session does.

    Raises:
        PySparkRuntimeError: Java cannot be started.
    """
    if SparkContext._active_spark_context is not None:
        return False
    SparkContext._ensure_initialized()
    conf = SparkConf()
    files, py_files = (
        {PurePosixPath(file.partition("#")[0]).name for file in str(conf.get(key, "")).split(",") if file}
        for key in ("spark.files", "spark.submit.pyFiles")
    )
    archives = {archive.partition("#")[2] for archive in str(conf.get("spark.archives", "")).split(",")}
    if archives - {"", _ENVIRONMENT}:  # each is unpacked to a folder of that name, on the path
        return True
    # Under spark-submit the files are those of --py-files, too.
    return bool(files - py_files if "PYSPARK_GATEWAY_PORT" in os.environ else files | py_files)


def refuse_plain_shards(get: Callable[[str, str], str | None]) -> None:
    """Refuse a session that must keep nothing readable on disks: the files of shards are not encrypted.

    Args:
        get: returns the value of one of Spark's settings, or a default.

    Raises:
        ConfigError: Spark encrypts what it writes to local disks.
    """
    key = "spark.io.encryption.enabled"
    if str(get(key, "false")).lower() == "true":
        raise ConfigError(
            f"{key} is true, so Spark encrypts what it writes to local disks, but the files of shards there "
            f"are not encrypted: let spark.local.dir (on YARN yarn.nodemanager.local-dirs) be on encrypted "
            f"disks, and pass --conf {key}=false for this job"
        )


def check_session(session: SparkSession, train: TrainConfig) -> list[Setting]:
    """Log, and return, the settings that the user's session lacks, and what each costs."""
    conf = session.sparkContext.getConf()
    lacking = []
    for setting in wanted_settings(train):
        value = conf.get(setting.key, None)
        if value is None or (setting.exact and value.lower() != setting.value):
            lacking.append(setting)
            now = "not set" if value is None else value
            log.warning("%s is %s; set it to %s. It costs %s", setting.key, now, setting.value, setting.cost)
    return lacking
