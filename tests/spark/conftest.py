"""Rows, flags and settings for tests on Spark; the sessions are in spark_fixtures.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from spark_helpers import write_rows


@pytest.fixture
def setting(spark: SparkSession) -> Iterator[Callable[[str, str], None]]:
    """Return a function that gives the test's session a setting, as if it had been started with it.

    Only for settings that we read, not Spark: starting a session takes seconds.
    """
    conf, before = spark.sparkContext._conf, {}

    def give(key: str, value: str) -> None:
        before[key] = conf.get(key, None)
        conf.set(key, value)

    yield give
    for key, value in before.items():
        if value is None:
            conf._jconf.remove(key)
        else:
            conf.set(key, value)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of 1,003 rows in one Parquet file."""
    return write_rows(tmp_path_factory.mktemp("data") / "small", 1003)


@pytest.fixture
def flags(tmp_path: Path) -> Path:
    """Return the folder of a FlagNet's flags."""
    folder = tmp_path / "flags"
    folder.mkdir()
    return folder
