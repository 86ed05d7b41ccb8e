"""Leases on HDFS: what holds on a disk holds there, between processes with Java machines of their own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hadoop import Hadoop
from leases import DRIVER, race, start  # tests/hosts
from servers import wait_for

from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.spark.hadoop_files import HadoopLocation
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.storage import remove_parts

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def _hadoop_is_known(hadoop: Hadoop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in hadoop.environment.items():
        monkeypatch.setenv(name, value)
    lead_to_hadoop()


def test_two_processes_that_race_for_a_folder_never_hold_it_both(hadoop: Hadoop, tmp_path: Path) -> None:
    race(f"{hadoop.default_fs}/race", tmp_path / "diary", times=10)
    names = HadoopLocation(f"{hadoop.default_fs}/race").names()
    assert sorted(names) == [".lease-000020.json", "run.json"]


def test_a_process_that_was_stopped_for_too_long_writes_nothing_any_more(hadoop: Hadoop) -> None:
    out = HadoopLocation(f"{hadoop.default_fs}/run")
    with start(DRIVER, str(out), "driver") as driver:
        try:
            wait_for(lambda: (out / "model.json").exists(), "its first step", process=driver)
            driver.send_signal(signal.SIGSTOP)
            other = Lease(out, Holder.here("other"), wait_s=1.0)
            other.take()
            remove_parts(out)
            before = content(out)
            driver.send_signal(signal.SIGCONT)
            told, _ = driver.communicate(timeout=60)
        except BaseException:
            driver.kill()
            raise
    assert driver.returncode == 0
    assert "run other (process " in told
    assert content(out) == before


def content(out: HadoopLocation) -> dict[str, bytes]:
    """Return the files of a folder, but for a lease that means nothing any more."""
    names = [name for name in out.names() if not name.endswith(".part") and name != ".lease-000001.json"]
    return {name: (out / name).read_bytes() for name in names}
