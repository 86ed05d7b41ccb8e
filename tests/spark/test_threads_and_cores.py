"""More threads than an executor has cores are refused before there is a session, with both numbers."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytest
from pyspark import SparkContext

from sparksgd.errors import ConfigError
from sparksgd.spark.session import refuse_threads


@pytest.mark.parametrize(
    ("master", "executor_cores", "cores"),
    [
        ("local", "", 1),
        ("local[2]", "", 2),
        ("local[3,4]", "8", 3),
        ("local-cluster[2, 4, 1024]", "", 4),
        ("yarn", "5", 5),
        ("yarn", "", 1),
        ("k8s://https://host:443", "", 1),
        ("spark://host:7077", "6", 6),
    ],
)
def test_cores_of_an_executor(master: str, executor_cores: str, cores: int) -> None:
    settings = {"spark.master": master, "spark.executor.cores": executor_cores}
    refuse_threads(settings.get, cores)
    with pytest.raises(ConfigError) as refused:
        refuse_threads(settings.get, cores + 1)
    have, most = ("1 core", "1,") if cores == 1 else (f"{cores} cores", f"{cores} or less,")
    told = f"train.threads is {cores + 1}, but an executor has {have} ({master})"
    assert str(refused.value).startswith(told)
    assert f"set train.threads={most} or give" in str(refused.value)


def test_all_cores_are_those_of_the_jvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)  # OMP_PROC_BIND=true
    jvm = Mock()
    jvm.java.lang.Runtime.getRuntime().availableProcessors.return_value = 6
    monkeypatch.setattr(SparkContext, "_jvm", jvm)
    refuse_threads({"spark.master": "local[*]"}.get, 6)
    with pytest.raises(ConfigError, match="an executor has 6 cores"):
        refuse_threads({}.get, 7)
    monkeypatch.setattr(SparkContext, "_jvm", None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    refuse_threads({}.get, 4)
    with pytest.raises(ConfigError, match="an executor has 4 cores"):
        refuse_threads({}.get, 5)


@pytest.mark.parametrize("master", ["local[0]", "local-cluster[2, 0, 1024]"])
def test_no_cores_at_all_are_left_to_spark(master: str) -> None:
    refuse_threads({"spark.master": master}.get, 1)


def test_executors_that_take_all_cores_of_their_machine_are_not_known() -> None:
    refuse_threads({"spark.master": "spark://host:7077"}.get, 64)
