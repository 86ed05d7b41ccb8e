"""Of several runs that take, renew or restore the lease of a folder at one moment, one has it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from virtual_leases import Time, files, lease, taken

from sparksgd.errors import ClusterError, ConfigError
from sparksgd.storage import LocalLocation


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
