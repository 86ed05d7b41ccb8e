"""The session's settings, as far as they decide whether a run is possible, or how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyspark.sql import SparkSession

from sparksgd.config import Config
from sparksgd.errors import SparkSGDError
from sparksgd.spark.cluster.slots import Slots
from sparksgd.spark.doctor.findings import Finding, broken, good, poor, unseen
from sparksgd.spark.session import UNIX_SOCKETS, check_session, refuse_plain_shards, wanted_settings

__all__ = ["judge_session", "judge_settings", "judge_slots"]

Get = Callable[[str, str], str | None]

_SCALING = "spark.databricks.clusterUsageTags.clusterScalingType"
_SOCKETS = "Unix sockets"
_NO_BARRIER = "--conf spark.dynamicAllocation.enabled=false, or --set engine.barrier=false"


def judge_slots(slots: Slots, elastic: bool, threads: int) -> Iterator[Finding]:
    """Yield whether barrier-mode jobs can run, and workers have their cores.

    Args:
        slots: for the workers of the run.
        elastic: whether executors come and go.
        threads: of a worker.
    """
    name = "dynamic allocation"
    try:
        slots.check_barrier()
    except SparkSGDError as error:
        yield broken(name, error, _NO_BARRIER)
    else:
        yield good(name, "on; engine.barrier is false, so it does no harm" if elastic else "off")
    name = "threads"
    try:
        slots.check_threads()
    except SparkSGDError as error:
        yield broken(name, error, f"--conf spark.task.cpus={threads}")
    else:
        yield good(name, f"train.threads is {threads}, within spark.task.cpus")


def judge_settings(get: Get) -> Iterator[Finding]:
    """Yield what is to be said of settings that a run does not change.

    Args:
        get: returns the value of one of Spark's settings, or a default.
    """

    def is_on(key: str, default: str = "false") -> bool:
        return str(get(key, default)).lower() == "true"

    scaling = str(get(_SCALING, "")).lower()
    if scaling == "autoscaling":
        yield poor(
            "autoscaling",
            f"{_SCALING} is autoscaling: nodes come and go, and barrier mode needs a fixed number",
            "give the cluster a fixed number of workers",
        )
    elif scaling:
        yield good("autoscaling", f"{_SCALING} is {scaling}")
    else:
        yield unseen("autoscaling", "only Databricks tells a session whether nodes come and go")
    if is_on("spark.speculation"):
        yield poor(
            "speculation",
            "spark.speculation is true: in ordinary stages a slow task runs twice, and takes a slot",
            "--conf spark.speculation=false",
        )
    else:
        yield good("speculation", "off")
    if not is_on("spark.python.worker.reuse", "true"):
        yield poor(
            "worker reuse",
            "spark.python.worker.reuse is false: every task of every step imports torch anew",
            "--conf spark.python.worker.reuse=true",
        )
    else:
        yield good("worker reuse", "on")
    try:
        refuse_plain_shards(get)
    except SparkSGDError as error:
        yield broken("encryption", error, "--conf spark.io.encryption.enabled=false")
    else:
        yield good("encryption", "off, as shard files need it: they are never encrypted")


def judge_session(session: SparkSession, config: Config) -> Iterator[Finding]:
    """Yield what a run would warn of in this session, and how its Python workers are reached."""
    conf = session.sparkContext.getConf()
    wanted, lacking = wanted_settings(config.train), check_session(session, config.train)
    for setting in lacking:
        now = conf.get(setting.key, None) or "not set"
        yield poor(
            _SOCKETS if setting.key == UNIX_SOCKETS else "settings",
            f"{setting.key} is {now}: it costs {setting.cost}",
            f"--conf {setting.key}={setting.value}",
        )
    if not any(setting.key == UNIX_SOCKETS for setting in wanted):
        yield unseen(_SOCKETS, f"Spark {session.version} has none to its Python workers; 4.1 and later have")
    elif not any(setting.key == UNIX_SOCKETS for setting in lacking):
        yield good(_SOCKETS, "on, between the JVM and its Python workers")
    if all(setting.key == UNIX_SOCKETS for setting in lacking):
        yield good("settings", f"all {len(wanted)} that a run wants are set")
