"""Files of a lease that are foreign, damaged or removed keep nobody out for ever, and let no two in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from virtual_leases import Time, files, lease, on_this_machine, said, taken

from sparksgd.errors import ClusterError, ConfigError
from sparksgd.storage import LocalLocation


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


@pytest.mark.parametrize("number", [1, 2])
def test_who_moved_its_folder_away_knows_at_once_that_another_run_was_faster(
    tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    for _ in range(number - 1):
        taken(run, "before").release()
    one = taken(run, "one")
    run.rename(tmp_path / "run.1")
    two = taken(run, "two")
    with pytest.raises(ClusterError, match="run two"):
        one.take_along()
    two.check()
    assert files(run) == [".lease-000001.json"]


def test_who_moved_its_folder_away_and_renewed_its_lease_in_between_holds_it(tmp_path: Path) -> None:
    one = taken(tmp_path / "run", "one")
    (tmp_path / "run").rename(tmp_path / "run.1")
    one.renew()
    one.take_along()
    one.check()
    assert files(tmp_path / "run") == [".lease-000001.json"]


def test_a_file_system_that_neither_creates_nor_shows_a_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalLocation, "create", lambda self, data: False)
    with pytest.raises(OSError, match=r"was not created there.*\.lease-000001\.json"):
        lease(tmp_path, "one").take()
