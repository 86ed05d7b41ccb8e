"""Real processes that race for a folder, are stopped, or are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from leases import DRIVER, race, start  # tests/hosts
from servers import wait_for
from virtual_leases import files, on_this_machine, taken

from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.storage import LocalLocation, remove_parts


def test_two_processes_that_race_for_a_folder_200_times_never_hold_it_both(tmp_path: Path) -> None:
    race(tmp_path / "run", tmp_path / "diary", times=100)
    assert files(tmp_path / "run") == [".lease-000200.json", "run.json"]


def test_a_process_that_was_stopped_for_too_long_writes_nothing_any_more(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with start(DRIVER, out, "driver") as driver:
        try:
            wait_for(lambda: (out / "model.json").exists(), "its first step", process=driver)
            driver.send_signal(signal.SIGSTOP)
            wait_for(lambda: stopped(driver.pid), "its stop")
            other = Lease(LocalLocation(out), Holder.here("other"), renew_s=0.02, wait_s=0.1)
            other.take()
            lines = (LocalLocation(out).guarded(other.check) / "metrics.jsonl").lines()
            lines.write("of other\n")
            remove_parts(LocalLocation(out))
            before = content(out)
            driver.send_signal(signal.SIGCONT)
            told, _ = driver.communicate(timeout=60)
        except BaseException:
            driver.kill()
            raise
    assert driver.returncode == 0, told
    assert f"run other (process {os.getpid()} on " in told
    assert "holds it now. This run, driver, was stopped" in told
    assert content(out) == before
    assert before["metrics.jsonl"] == b"of other\n"
    assert log.records[-1].levelname == "WARNING"
    assert f"run driver (process {driver.pid} on " in log.records[-1].message


def content(out: Path) -> dict[str, bytes]:
    """Return the files of a folder, but for a lease that means nothing any more."""
    found = [file for file in out.iterdir() if not file.match("*.part") and file.name != ".lease-000001.json"]
    return {file.name: file.read_bytes() for file in found}


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_process_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    with start(DRIVER, tmp_path / "run", "driver") as driver:
        wait_for(lambda: (tmp_path / "run" / "model.json").exists(), "its first step", process=driver)
        driver.kill()
    taken(tmp_path / "run", "next", **on_this_machine(os.getpid()))
