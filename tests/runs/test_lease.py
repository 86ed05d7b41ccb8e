"""One run for each folder: who may take its lease when, and what a run that lost it can still do.

Time is virtual, except where real processes race, are stopped or killed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from leases import DRIVER, race, start  # tests/hosts
from servers import wait_for

from sparksgd.errors import ClusterError, ConfigError
from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.storage import LocalLocation, Location, remove_parts


class Time:
    """Seconds that pass only while somebody sleeps; what is due happens meanwhile."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, Callable[[], object]]] = []

    def at(self, *seconds: float, do: Callable[[], object]) -> None:
        self._due += [(second, do) for second in seconds]

    def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s
        now = [(second, do) for second, do in self._due if second <= self.now_s]
        self._due = [(second, do) for second, do in self._due if second > self.now_s]
        for _, do in now:
            do()


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sparksgd")
    return caplog


def holder(name: str, **other: Any) -> Holder:
    """Return the holder of a run on a machine of its own."""
    values = {"host": f"{name}-host", "pid": 17, "started": "1", "boot_id": name, "pid_namespace": "pid:[1]"}
    return Holder(run_id=name, **(values | other))


def lease(
    folder: Path | Location, name: str, time: Time | None = None, called: str = "out", **other: Any
) -> Lease:
    place, time = (LocalLocation(folder) if isinstance(folder, Path) else folder), time or Time()
    return Lease(place, holder(name, **other), called=called, clock=lambda: time.now_s, sleep=time.sleep)


def taken(folder: Path | Location, name: str, time: Time | None = None, **other: Any) -> Lease:
    """Return a lease that was taken at once."""
    time = time or Time()
    begun_s, one = time.now_s, lease(folder, name, time, **other)
    one.take()
    assert time.now_s == begun_s
    return one


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def said(folder: Path, number: int) -> dict[str, Any]:
    return dict(json.loads((folder / f".lease-{number:06d}.json").read_text()))


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


def on_this_machine(pid: int, name: str = "one", **other: Any) -> dict[str, Any]:
    """Return what makes a holder one of this machine."""
    here = Holder.here(name)
    values = {"host": here.host, "boot_id": here.boot_id, "pid_namespace": here.pid_namespace}
    return values | {"pid": pid, "started": "1"} | other


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


# Races and accidents


@pytest.fixture
def before_creating(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Return what lets something happen just before the next file is created."""
    create = LocalLocation.create

    def happens(deed: Callable[[], object]) -> None:
        def late(self: LocalLocation, data: bytes) -> bool:
            monkeypatch.setattr(LocalLocation, "create", create)
            deed()
            return self.create(data)

        monkeypatch.setattr(LocalLocation, "create", late)

    return happens


Before = Callable[[Callable[[], object]], None]


def test_of_two_who_take_it_at_once_one_gets_it(tmp_path: Path, time: Time, before_creating: Before) -> None:
    other = lease(tmp_path, "other")
    before_creating(other.take)
    time.at(5, do=other.renew)
    with pytest.raises(ConfigError, match="run other"):
        lease(tmp_path, "one", time).take()
    other.check()
    assert files(tmp_path) == [".lease-000001.json"]


def test_of_two_who_find_it_abandoned_one_gets_it(
    tmp_path: Path, time: Time, before_creating: Before
) -> None:
    taken(tmp_path, "before")
    other = lease(tmp_path, "other")
    before_creating(other.take)
    time.at(36, do=other.renew)
    with pytest.raises(ConfigError, match="run other"):
        lease(tmp_path, "one", time).take()
    other.check()
    assert files(tmp_path) == [".lease-000002.json"]


def test_who_is_so_slow_that_others_took_it_meanwhile_does_not_get_it(
    tmp_path: Path, time: Time, before_creating: Before
) -> None:
    taken(tmp_path, "before").release()
    last = lease(tmp_path, "last")

    def others() -> None:
        taken(tmp_path, "second").release()
        last.take()
        assert files(tmp_path) == [".lease-000003.json"]  # so number 2 is free

    before_creating(others)
    time.at(5, do=last.renew)
    with pytest.raises(ConfigError, match="run last"):
        lease(tmp_path, "slow", time).take()
    last.check()
    assert files(tmp_path) == [".lease-000003.json"]


def test_who_is_overtaken_while_it_prepares_its_file_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def late(part: Path, file: Path) -> None:
        monkeypatch.setattr("os.link", link)
        taken(tmp_path, "other").release()
        assert files(tmp_path) == [".lease-000001.json"]  # what was prepared is gone
        link(part, file)

    monkeypatch.setattr("os.link", late)
    lease(tmp_path, "one").take()
    assert files(tmp_path) == [".lease-000002.json"]


def test_one_who_dies_before_it_removes_lower_numbers_leaves_no_harm(tmp_path: Path, time: Time) -> None:
    one = taken(tmp_path, "one")
    old = (tmp_path / ".lease-000001.json").read_bytes()
    two = lease(tmp_path, "two", time)
    two.take()
    (tmp_path / ".lease-000001.json").write_bytes(old)
    (tmp_path / "..lease-000001.json.0123abcd.part").touch()
    two.check()
    with pytest.raises(ClusterError):
        one.check()
    two.release()
    taken(tmp_path, "three")
    assert files(tmp_path) == [".lease-000003.json"]


def test_a_renewal_that_comes_late_changes_nothing_for_the_new_holder(
    tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = taken(tmp_path, "one"), lease(tmp_path, "two", time)
    replace = Path.replace

    def late(part: Path, file: Path) -> None:
        monkeypatch.setattr(Path, "replace", replace)
        content = part.read_bytes()
        two.take()  # after the last look at the leases
        part.write_bytes(content)
        replace(part, file)

    monkeypatch.setattr(Path, "replace", late)
    one.renew()
    assert files(tmp_path) == [".lease-000001.json", ".lease-000002.json"]
    two.check()
    with pytest.raises(ClusterError, match="run two"):
        one.check()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"format": 2}', b'{"format": 1}',
        b'{"format": []}', b'{"format": 1, "lease": "x", "holder": {}}',
        b'{"format": 1, "lease": "x", "holder": [], "released": true}',
    ],
    ids=range(12),
)  # fmt: skip
def test_a_file_that_is_no_lease_of_this_version_is_watched_like_one(
    tmp_path: Path, time: Time, log: pytest.LogCaptureFixture, content: bytes
) -> None:
    file = tmp_path / ".lease-000007.json"
    file.write_bytes(content)
    time.at(3, do=lambda: file.write_bytes(content + b" "))
    with pytest.raises(ConfigError, match=r"but somebody \(\.lease-000007\.json\) writes to it"):
        lease(tmp_path, "one", time).take()
    lease(tmp_path, "one", time).take()
    assert 33 <= time.now_s < 37
    assert files(tmp_path) == [".lease-000008.json"]
    assert "was held by somebody (.lease-000007.json), which did not renew" in log.records[-1].message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pid", 0), ("pid", -1), ("pid", "17"), ("pid", True), ("host", None), ("run_id", 7), ("boot_id", 7),
        ("attempt", 1), ("application", "application_1_0001"), ("more", 1),
    ],
)  # fmt: skip
def test_a_lease_with_an_impossible_value_is_none_of_this_version(
    tmp_path: Path, time: Time, key: str, value: Any
) -> None:
    taken(tmp_path, "one", **on_this_machine(os.getpid()))
    about = said(tmp_path, 1)
    about["holder"][key] = value
    (tmp_path / ".lease-000001.json").write_text(json.dumps(about))
    lease(tmp_path, "two", time).take()
    assert time.now_s >= 30


def test_files_that_are_only_named_like_leases_are_left_alone(tmp_path: Path) -> None:
    others = [".lease-7.json", ".lease-0000007.json", ".lease-000007.json.bak", "lease-000007.json"]
    for name in others:
        (tmp_path / name).touch()
    taken(tmp_path, "one")
    assert files(tmp_path) == sorted([*others, ".lease-000001.json"])


def test_a_link_to_nowhere_is_watched_too(tmp_path: Path, time: Time) -> None:
    (tmp_path / ".lease-000003.json").symlink_to(tmp_path / "nowhere")
    lease(tmp_path, "one", time).take()
    assert time.now_s >= 30
    assert files(tmp_path) == [".lease-000004.json"]


def test_a_lease_that_somebody_removed_is_written_again(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    one = taken(tmp_path / "run", "one")
    (tmp_path / "run" / ".lease-000001.json").unlink()
    (tmp_path / "run").rmdir()
    one.check()
    assert said(tmp_path / "run", 1)["holder"]["run_id"] == "one"
    assert [r.message for r in log.records] == [
        f"the lease of {tmp_path / 'run'} was removed, and is written again"
    ]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_who_lost_its_folder_to_a_run_that_began_in_the_emptied_one_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, released: bool
) -> None:
    for _ in range(number - 1):
        taken(tmp_path, "before").release()
    one = taken(tmp_path, "one")
    (tmp_path / f".lease-{number:06d}.json").unlink()
    two = taken(tmp_path, "two")
    if released:
        two.release()
    monkeypatch.setattr(LocalLocation, "create", None)  # a higher number would end the other run
    with pytest.raises(ClusterError, match="run two"):
        one.check()
    assert files(tmp_path) == [".lease-000001.json"]


def test_of_a_holder_that_restores_its_lease_and_one_who_begins_at_that_moment_not_both_go_on(
    tmp_path: Path, before_creating: Before
) -> None:
    taken(tmp_path, "before").release()
    one, two = taken(tmp_path, "one"), lease(tmp_path, "two")
    (tmp_path / ".lease-000002.json").unlink()
    before_creating(two.take)
    with pytest.raises(ClusterError, match="run two"):
        one.check()
    two.check()


def test_where_two_can_create_one_file_the_first_finds_out_at_its_next_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = lease(tmp_path, "one"), lease(tmp_path, "two")

    def replaces(self: LocalLocation, data: bytes) -> bool:
        self.write_bytes(data)
        return True

    def late(self: LocalLocation, data: bytes) -> bool:
        monkeypatch.setattr(LocalLocation, "create", replaces)
        one.take()
        return self.create(data)

    monkeypatch.setattr(LocalLocation, "create", late)
    two.take()
    for deed in (one.renew, one.check):
        with pytest.raises(ClusterError, match="run two"):
            deed()
    two.check()


def test_a_file_system_that_neither_creates_nor_shows_a_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalLocation, "create", lambda self, data: False)
    with pytest.raises(OSError, match=r"was not created there.*\.lease-000001\.json"):
        lease(tmp_path, "one").take()


def test_a_lease_that_cannot_be_renewed_is_a_warning_and_may_still_be_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def write_bytes(self: LocalLocation, data: bytes) -> None:
        raise OSError(errno.EIO, "the disk does not answer")

    one = Lease(LocalLocation(tmp_path), holder("one"), renew_s=0.001)
    with one.held():
        monkeypatch.setattr(LocalLocation, "write_bytes", write_bytes)
        wait_for(lambda: log.records, "a warning")
        one.check()
        lines = [record.message for record in log.records]
        assert lines == [
            f"the lease of {tmp_path} cannot be renewed now, but training goes on: the disk does not answer"
        ]
    assert log.records[-1].message == (
        f"the lease of {tmp_path} cannot be released, but ends by itself: the disk does not answer"
    )


def test_it_is_renewed_while_it_is_held_and_released_after_an_error(tmp_path: Path) -> None:
    def renewals() -> int:
        return int(said(tmp_path, 1)["renewals"])

    def interrupted() -> None:
        with Lease(LocalLocation(tmp_path), holder("one"), renew_s=0.001).held():
            wait_for(lambda: renewals() > 2, "renewals")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert said(tmp_path, 1)["released"]
    wait_for(
        lambda: not any(thread.name == "sparksgd-lease" for thread in threading.enumerate()), "its thread"
    )


class Counted:
    """A folder whose listings take long; they are counted."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.listings = LocalLocation(folder), 0

    def __truediv__(self, name: str) -> LocalLocation:
        return self._folder / name

    def guarded(self, check: Callable[[], None]) -> LocalLocation:
        return self._folder.guarded(check)

    def names(self) -> list[str]:
        self.listings += 1
        return self._folder.names()


def test_elsewhere_a_check_lists_the_folder_at_most_once_a_second(tmp_path: Path, time: Time) -> None:
    place: Any = Counted(tmp_path)
    one = lease(place, "one", time)
    one.take()
    before, time.now_s = place.listings, 100.0
    for _ in range(1000):
        one.check()
        time.now_s += 0.01
    assert place.listings - before == 10
    lease(tmp_path, "two").take()
    time.now_s += 1.0
    for _ in range(2):  # who has lost it needs no listing
        with pytest.raises(ClusterError, match="run two"):
            one.check()
    assert place.listings - before == 11


def test_a_check_that_got_no_answer_is_made_again(tmp_path: Path, time: Time) -> None:
    place: Any = Counted(tmp_path)
    one = lease(place, "one", time)
    one.take()
    names = place.names

    def unanswered() -> list[str]:
        raise OSError(errno.ETIMEDOUT, "no answer")

    place.names = unanswered
    for _ in range(2):
        with pytest.raises(TimeoutError):
            one.check()
    place.names = names
    one.check()


# Real processes


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
