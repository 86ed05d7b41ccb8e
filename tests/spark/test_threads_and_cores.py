"""More threads than an executor has cores are refused before there is a session, with both numbers."""

from __future__ import annotations

import os

import pytest

from sparksgd.errors import ConfigError
from sparksgd.spark.session import refuse_threads

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("master", "executor_cores", "cores"),
    [
        ("local", "", 1),
        ("local[2]", "", 2),
        ("local[3,4]", "8", 3),
        ("local[*]", "", HERE),
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
    told = f"train.threads is {cores + 1}, but an executor has {cores} cores ({master})"
    assert str(refused.value).startswith(told)
    assert f"set train.threads={cores} or less" in str(refused.value)


def test_executors_that_take_all_cores_of_their_machine_are_not_known() -> None:
    refuse_threads({"spark.master": "spark://host:7077"}.get, 64)
