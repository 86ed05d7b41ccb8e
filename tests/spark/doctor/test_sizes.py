"""What the doctor says of memory, and the folders that it needs meanwhile.  Needs no JVM."""

from __future__ import annotations

import tempfile
from typing import cast

import pytest
from pyspark.sql import SparkSession
from rich.filesize import decimal

from sparksgd.config import Config
from sparksgd.engines.kinds import INLINE, TREE
from sparksgd.engines.memory import Places, RunSizes, takes, total
from sparksgd.solvers.rules import completed
from sparksgd.spark.cluster.memory import Limits
from sparksgd.spark.doctor import engines, sizes

GB = 1_000_000_000


@pytest.mark.parametrize("in_driver", [False, True])
def test_the_driver_s_line_has_what_a_run_is_refused_by(in_driver):
    places = Places(
        num_workers=2, workers_per_executor=2, in_driver=in_driver, shards_of_worker=1, sums_of_worker=1,
        sums_of_task=1, sums=2,
    )  # fmt: skip
    needed = takes(TREE, RunSizes(weights=4_000_000), places)
    limits = Limits(
        driver_heap=GB, executor_heap=None, driver=8 * GB, executor=None, worker=None, results=None
    )
    at_driver = total(needed.at_driver(2 if in_driver else 0))
    assert at_driver != total(needed.driver_python)
    line = sizes._listed(needed, limits, places)
    assert f"at the driver, with its heap, {decimal(at_driver)} of 8.0 GB" in line


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return the temporary folder of this process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def owners(folder):
    return list(folder.glob("sparksgd-*/.owner.json"))


def test_later_runs_find_what_a_killed_doctor_leaves(temporary, monkeypatch):
    config = completed(Config.from_dict({}))
    with sizes._made_up(config):
        assert len(owners(temporary)) == 1
    seen = []
    monkeypatch.setattr(engines, "train_in_process", lambda *_, **__: seen.extend(owners(temporary)))
    steps = engines.Steps(
        session=cast(SparkSession, None), config=config, workers=2, run_id="doctor", patience_s=1.0
    )
    steps._trained(INLINE)
    assert len(seen) == 1
    assert list(temporary.iterdir()) == []
