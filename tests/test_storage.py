"""Files of this machine, and lines for where no file can grow; tests/spark/ has Hadoop's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparksgd.errors import ConfigError
from sparksgd.storage import (
    LocalLocation,
    SpooledLines,
    fingerprint,
    local_copy,
    location,
    register_uris,
)


class Elsewhere:
    """Where files come whole; how often they came is counted."""

    def __init__(self) -> None:
        self.copies: list[str] = []

    def put(self, file: Path) -> None:
        self.copies.append(file.read_text())


def test_a_path_of_this_machine_may_have_a_scheme_and_odd_letters(tmp_path: Path) -> None:
    odd = tmp_path / "a b%c"
    for path in (str(odd), f"file:{odd}", f"file://{odd}", odd):
        assert location(path) == LocalLocation(odd)


def test_a_uri_leads_where_what_is_registered_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparksgd.storage._location_of_uri", None)
    with pytest.raises(ConfigError, match=r"hdfs:/x is a URI .* call sparksgd\.spark\.uris\.lead_to_hadoop"):
        location("hdfs:/x")
    register_uris(lambda uri: LocalLocation(tmp_path / uri.replace(":", "")))
    assert location("hdfs:/x") == LocalLocation(tmp_path / "hdfs" / "x")
    assert location(f"file:{tmp_path}") == location(str(tmp_path)) == LocalLocation(tmp_path)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = location(tmp_path) / "deep" / "file"
    file.write_bytes(b"old")
    file.write_bytes(b"new")
    assert file.read_bytes() == b"new"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file"]


def test_only_a_regular_file_of_the_right_length_is_read_as_one(tmp_path: Path) -> None:
    file = location(tmp_path) / "file"
    file.write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert [(location(tmp_path) / name).read_bytes(most) for most in (None, 5, 6)] == [b"12345"] * 3
        with pytest.raises(OSError, match="it has 5 bytes, but may have 4 at most"):
            (location(tmp_path) / name).read_bytes(4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(OSError, match="it is not a regular file"):
            (location(tmp_path) / name).read_bytes()
    with pytest.raises(IsADirectoryError):
        location(tmp_path).read_bytes()
    with pytest.raises(FileNotFoundError):
        (location(tmp_path) / "nothing").read_bytes()


def test_half_a_copy_is_never_seen(tmp_path: Path) -> None:
    file = location(tmp_path) / "file"
    file.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        file.put(tmp_path / "nowhere")
    assert file.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_lines_are_copied_at_most_every_five_seconds_and_at_the_end() -> None:
    now, target = [100.0], Elsewhere()
    lines = SpooledLines(target, clock=lambda: now[0])
    assert target.copies == [""]
    for second in range(1, 12):
        now[0] = 100.0 + second
        lines.write(f"{second}\n")
        lines.flush()
    assert [copy.splitlines()[-1:] for copy in target.copies] == [[], ["5"], ["10"]]
    lines.close()
    assert target.copies[-1].splitlines() == [str(second) for second in range(1, 12)]


def test_a_copy_that_takes_long_is_made_the_less_often() -> None:
    now, target = [0.0], Elsewhere()

    def slow(file: Path) -> None:
        now[0] += 1.0
        target.copies.append("")

    target.put = slow
    lines = SpooledLines(target, clock=lambda: now[0])
    while now[0] < 100.0:
        now[0] += 0.5
        lines.write("line\n")
        lines.flush()
    assert len(target.copies) == 5  # one second of each 21


def test_a_fingerprint_tells_files_that_changed_from_files_that_moved(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "part-0.parquet").write_bytes(b"rows")
    os.utime(folder / "part-0.parquet", ns=(0, 5_000_000))
    before = fingerprint(str(folder))
    (folder / "_SUCCESS").touch()
    assert fingerprint(str(folder)) == before
    folder = folder.rename(tmp_path / "elsewhere")
    assert fingerprint(str(folder)) == before == fingerprint(folder.as_uri())
    os.utime(folder / "part-0.parquet", ns=(0, 6_000_000))
    after = fingerprint(str(folder))
    assert after != before
    (folder / "part-1.parquet").write_bytes(b"more")
    assert fingerprint(str(folder)) not in (before, after)


def test_a_pattern_names_files(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "c.txt"):
        (tmp_path / name).touch()
    assert [file.path for file in location(tmp_path / "*.parquet").files()] == ["a.parquet", "b.parquet"]
    assert location(tmp_path / "nothing").files() == []


def test_what_is_here_is_read_where_it_is(tmp_path: Path) -> None:
    with local_copy(tmp_path.as_uri()) as path:
        assert path == str(tmp_path)
