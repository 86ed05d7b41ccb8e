"""Who drives a run, and when it is certain that nobody drives it any more."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from servers import wait_for  # tests/hosts

from sparksgd.runs.holder import Holder

LATER = "this is a later attempt of application_1_0001"


@pytest.fixture
def ended() -> int:
    """Return the number of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def holder(pid: int, **other: Any) -> Holder:
    """Return a holder of this machine."""
    here = Holder.here("one")
    values = {"host": here.host, "boot_id": here.boot_id, "pid_namespace": here.pid_namespace}
    return Holder(**(values | {"run_id": "one", "pid": pid, "started": "1"} | other))


def test_it_is_called_by_its_run_its_process_and_its_host() -> None:
    assert str(holder(17, host="h")) == "run one (process 17 on h)"


def test_this_process_is_not_gone_but_one_that_had_its_number_before_is() -> None:
    here = Holder.here("two")
    assert (here.pid, here.end_seen_from(here)) == (os.getpid(), None)
    assert holder(os.getpid(), started="1").end_seen_from(here) == "its process is gone"


@pytest.mark.parametrize(
    ("mine", "other", "end"),
    [
        (("application_1_0001", 1), ("application_1_0001", 2), LATER),
        (("application_1_0001", 9), ("application_1_0001", 10), LATER),
        (("application_1_0001", 2), ("application_1_0001", 2), None),
        (("application_1_0001", 2), ("application_1_0001", 1), None),
        (("application_1_0001", 1), ("application_1_0002", 2), None),
        (("application_1_0001", 1), (None, None), None),
        ((None, None), ("application_1_0001", 2), None),
    ],
)
def test_an_earlier_attempt_of_the_same_application_has_ended(
    mine: tuple[Any, Any], other: tuple[Any, Any], end: str | None
) -> None:
    one = holder(17, host="a", application=mine[0], attempt=mine[1])
    assert one.end_seen_from(holder(17, host="b", application=other[0], attempt=other[1])) == end


def test_a_process_that_has_ended_but_was_not_asked_for_its_status_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        started = stat.read_text().rpartition(")")[2].split()[19]
        one = holder(process.pid, started=started)
        here = Holder.here("two")
        assert one.end_seen_from(here) is None
        process.kill()
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "its end")
        assert one.end_seen_from(here) == "its process is gone"


@pytest.mark.parametrize(
    "other",
    [
        {"host": "elsewhere"},
        {"boot_id": "another machine of the same name"},
        {"pid_namespace": "pid:[another container]"},
    ],
)
def test_a_process_of_another_table_is_not_judged_by_this_one(ended: int, other: dict[str, str]) -> None:
    here = Holder.here("two")
    assert holder(ended).end_seen_from(here) == "its process is gone"
    assert holder(ended, **other).end_seen_from(here) is None


def test_where_there_is_no_proc_a_process_lives_as_long_as_its_number(
    ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparksgd.storage.processes._read", lambda file: None)
    monkeypatch.setattr("sparksgd.storage.processes._link", lambda file: None)
    here = Holder.here("here")
    assert (here.started, here.boot_id, here.pid_namespace) == (None, None, None)
    assert here.end_seen_from(here) is None
    assert holder(ended, started=None).end_seen_from(here) == "its process is gone"


def test_a_process_that_may_not_be_asked_lives(monkeypatch: pytest.MonkeyPatch, ended: int) -> None:
    def kill(*_: int) -> None:
        raise PermissionError(errno.EPERM, "it is another user's")

    monkeypatch.setattr("os.kill", kill)
    assert holder(ended).end_seen_from(Holder.here("two")) is None


@pytest.mark.parametrize(
    ("container", "application", "attempt"),
    [
        ("container_e17_1410901177871_0001_02_000001", "application_1410901177871_0001", 2),
        ("container_1410901177871_12345_01_000001", "application_1410901177871_12345", 1),
        ("", None, None),
        ("a container of docker", None, None),
    ],
)
def test_yarn_s_container_names_application_and_attempt(
    container: str, application: str | None, attempt: int | None
) -> None:
    here = Holder.here("one", {"CONTAINER_ID": container})
    assert (here.application, here.attempt) == (application, attempt)


def test_a_number_that_no_process_can_have_is_gone() -> None:
    assert holder(10**30).end_seen_from(Holder.here("two")) == "its process is gone"
