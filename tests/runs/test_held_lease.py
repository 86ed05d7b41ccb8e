"""A lease that is held is renewed until it is released, and checked without a listing for each check."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import wait_for
from virtual_leases import Time, holder, lease, said

from sparksgd.errors import ClusterError
from sparksgd.runs.lease import Lease
from sparksgd.storage import LocalLocation


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

    def patient(self) -> Counted:
        return self

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
