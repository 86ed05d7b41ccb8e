"""One run for each folder: who may take its lease when, and what a run that lost it can still do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from virtual_leases import Time, files, lease, on_this_machine, said, taken

from sparksgd.errors import ClusterError, ConfigError
from sparksgd.runs.holder import Holder
from sparksgd.storage import LocalLocation

# Who may take it


def test_the_first_comer_takes_it_and_its_file_says_who_it_is(tmp_path: Path) -> None:
    one = taken(tmp_path / "new", "one")
    assert files(tmp_path / "new") == [".lease-000001.json"]
    about = said(tmp_path / "new", 1)
    assert (about["holder"]["run_id"], about["holder"]["host"], about["holder"]["pid"]) == (
        "one", "one-host", 17,
    )  # fmt: skip
    assert (about["renewals"], about["released"]) == (0, False)
    one.renew()
    assert said(tmp_path / "new", 1) == about | {"renewals": 1}
    one.check()


def test_a_released_one_is_taken_at_once_also_by_who_released_it_and_numbers_grow(
    tmp_path: Path, time: Time
) -> None:
    one = taken(tmp_path, "one")
    one.release()
    assert said(tmp_path, 1)["released"]
    two = taken(tmp_path, "two", time)
    two.release()
    assert files(tmp_path) == [".lease-000002.json"]
    one.take()
    one.check()
    assert files(tmp_path) == [".lease-000003.json"]
    assert said(tmp_path, 3)["holder"]["run_id"] == "one"


def test_one_that_is_not_renewed_is_taken_after_30_s_with_a_warning(
    tmp_path: Path, time: Time, log: pytest.LogCaptureFixture
) -> None:
    taken(tmp_path, "one")
    lease(tmp_path, "two", time).take()
    assert 30 <= time.now_s < 32
    assert [(r.levelname, r.message) for r in log.records] == [
        (
            "INFO",
            f"{tmp_path} is held by run one (process 17 on one-host): waiting up to 30 s for a sign of life",
        ),
        (
            "WARNING",
            f"{tmp_path} was held by run one (process 17 on one-host), which did not renew its lease for "
            f"30 s: it is taken for dead, and its folder is taken over",
        ),
    ]


@pytest.mark.parametrize(
    ("called", "moves"),
    [
        ("out", "wait for its end, or name another folder"),
        ("--out", "wait for its end, name another folder, or pass --if-running wait"),
    ],
)
def test_one_that_is_renewed_is_refused(tmp_path: Path, time: Time, called: str, moves: str) -> None:
    one = taken(tmp_path, "one")
    time.at(4.9, do=one.renew)
    with pytest.raises(ConfigError) as refused:
        lease(tmp_path, "two", time, called).take()
    assert str(refused.value) == (
        f"{called} is {tmp_path}, but run one (process 17 on one-host) writes to it, and renewed its lease "
        f"just now: {moves}"
    )
    assert time.now_s < 6
    one.check()


def test_who_waits_takes_it_when_it_is_released_and_says_once_a_minute_for_whom_it_waits(
    tmp_path: Path, time: Time, log: pytest.LogCaptureFixture
) -> None:
    one = taken(tmp_path, "one")
    time.at(*range(5, 150, 5), do=one.renew)
    time.at(150, do=one.release)
    lease(tmp_path, "two", time).take("wait")
    assert 150 <= time.now_s <= 152
    assert [record.message for record in log.records] == 3 * [
        f"waiting for the end of run one (process 17 on one-host), which holds {tmp_path}"
    ]


def test_who_waits_takes_it_30_s_after_its_last_sign_of_life(tmp_path: Path, time: Time) -> None:
    one = taken(tmp_path, "one")
    time.at(*range(5, 105, 5), do=one.renew)
    lease(tmp_path, "two", time).take("wait")
    assert 130 <= time.now_s <= 133


def test_one_that_ends_before_it_is_renewed_once_is_waited_for_not_refused(
    tmp_path: Path, time: Time
) -> None:
    one = taken(tmp_path, "one")
    time.at(0.5, do=one.release)
    next_one = lease(tmp_path, "next")
    time.at(0.5, do=next_one.take)
    time.at(2.0, do=next_one.release)
    lease(tmp_path, "two", time).take()
    assert time.now_s < 4


def test_who_was_stopped_while_it_watched_has_seen_nothing_meanwhile(tmp_path: Path, time: Time) -> None:
    one = taken(tmp_path, "one")
    time.at(1.0, do=lambda: time.sleep(100.0))  # both of them stood still: a laptop that slept
    time.at(103.0, do=one.renew)
    with pytest.raises(ConfigError, match="run one"):
        lease(tmp_path, "two", time).take()


# Holders that have certainly ended


@pytest.fixture
def ended() -> int:
    """Return the number of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(
    tmp_path: Path, ended: int, log: pytest.LogCaptureFixture
) -> None:
    taken(tmp_path, "one", **on_this_machine(ended))
    taken(tmp_path, "two", **on_this_machine(os.getpid()))
    assert [(record.levelname, record.message) for record in log.records] == [
        (
            "INFO",
            f"{tmp_path} was held by run one (process {ended} on {Holder.here('one').host}), but its process "
            f"is gone: its folder is taken over",
        )
    ]


def test_a_later_attempt_of_the_same_application_does_not_wait(tmp_path: Path, time: Time) -> None:
    taken(tmp_path, "one", application="application_1_0001", attempt=1)
    two = taken(tmp_path, "two", time, application="application_1_0001", attempt=2)
    for other in ({"attempt": 1}, {"attempt": 2}, {"attempt": 3, "application": "application_1_0002"}):
        time.at(time.now_s + 1, do=two.renew)
        with pytest.raises(ConfigError, match="run two"):
            lease(tmp_path, "three", time, **({"application": "application_1_0001"} | other)).take()


# Who was taken for dead


def test_who_comes_back_is_told_who_holds_the_folder_and_changes_nothing_any_more(
    tmp_path: Path, time: Time
) -> None:
    one = taken(tmp_path, "one")
    two = lease(tmp_path, "two", time)
    two.take()
    place = LocalLocation(tmp_path).guarded(one.check)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for deed in (
        one.renew,
        one.check,
        lambda: (place / "run.json").write_bytes(b""),
        lambda: (place / "model" / "model.json").write_bytes(b""),
        lambda: (place / "run.json").put(Path(__file__)),
        lambda: (place / "run.json").create(b""),
        lambda: (place / "metrics.jsonl").lines(),
        lambda: (place / ".lease-000002.json").remove(),
    ):
        with pytest.raises(ClusterError) as lost:
            deed()
        assert str(lost.value) == (
            f"out is {tmp_path}, but run two (process 17 on two-host) holds it now. This run, one, was "
            f"stopped or cut off for so long that it was taken for dead, and writes nothing more there: let "
            f"the other one end, or start this one again with another folder"
        )
    one.release()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    two.check()
    two.release()
    with pytest.raises(ClusterError, match="run two"):  # it has written since
        one.check()


def test_lines_are_checked_one_by_one(tmp_path: Path, time: Time) -> None:
    one = taken(tmp_path, "one")
    lines = (LocalLocation(tmp_path).guarded(one.check) / "metrics.jsonl").lines()
    lines.write("first\n")
    lease(tmp_path, "two", time).take()
    with pytest.raises(ClusterError):
        lines.write("second\n")
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "first\n"


def test_who_was_stopped_between_a_check_and_its_change_finds_nothing_to_change(
    tmp_path: Path, time: Time
) -> None:
    stopped, one, place = False, taken(tmp_path, "one"), LocalLocation(tmp_path)

    def check() -> None:
        one.check()
        if stopped:
            lease(place, "two", time).take()
            for part in tmp_path.glob(".*.part"):
                part.unlink()
            (place / "metrics.jsonl").lines().write("of two\n")

    lines = (place.guarded(check) / "metrics.jsonl").lines()
    lines.write("of one\n")
    stopped = True
    lines.write("of one\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "of two\n"
