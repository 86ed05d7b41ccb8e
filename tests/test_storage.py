"""Files of this machine, and lines for where no file can grow; tests/spark/ has Hadoop's."""

from __future__ import annotations

import errno
import os
import time
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
    remove_parts,
    replacing,
)
from sparksgd.storage.reading import read_beginning, read_lines


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


def test_a_file_is_created_by_one_writer_alone(tmp_path: Path) -> None:
    file = location(tmp_path) / "deep" / "file"
    assert file.create(b"one")
    assert not file.create(b"two")
    assert file.read_bytes() == b"one"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_where_there_are_no_hard_links_it_is_created_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr("os.link", link)
    test_a_file_is_created_by_one_writer_alone(tmp_path)


def test_a_link_that_was_made_though_its_answer_was_lost_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)

    monkeypatch.setattr("os.link", twice)
    assert location(tmp_path / "file").create(b"one")
    monkeypatch.setattr("os.link", link)
    assert not location(tmp_path / "file").create(b"two")


def test_a_folder_that_cannot_be_made_is_an_error_for_who_creates(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        location(tmp_path / "file" / "inside").create(b"")
    with pytest.raises(NotADirectoryError):
        location(tmp_path / "file").names()


def test_names_are_those_of_all_files_and_folders(tmp_path: Path) -> None:
    assert location(tmp_path / "nothing").names() == []
    for name in (".hidden", "_file", "file"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert sorted(location(tmp_path).names()) == [".hidden", "_file", "file", "folder"]


def test_two_writers_of_one_file_do_not_meet_and_the_last_one_is_read(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert (tmp_path / "file").read_bytes() == b"one"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_killed_writers_left_is_removed_after_a_day_or_when_somebody_says_so(tmp_path: Path) -> None:
    left = [".file.0123abcd.part", ".file.00000000.part", ".other.0123abcd.part"]
    others = [".file.part", ".file.0123abcd.part.txt", "..lease-1.json.0123abcd.part", "file.0123abcd.part"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    two_days_ago = time.time() - 2 * 86_400
    for name in (left[0], left[2]):
        os.utime(tmp_path / name, (two_days_ago, two_days_ago))
    location(tmp_path / "file").write_bytes(b"")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["file", left[1], left[2], *others])
    remove_parts(location(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["file", *others])
    remove_parts(location(tmp_path / "nothing"))


def test_lines_begin_a_new_file_which_who_wrote_to_the_old_one_does_not_reach(tmp_path: Path) -> None:
    file = location(tmp_path) / "run" / "lines"
    old, new = file.lines(), file.lines()
    new.write("new\n")
    old.write("old\n")
    assert file.read_bytes() == b"new\n"  # at once
    new.flush()
    with pytest.raises(OSError, match=r"is another file, which .*; all lines are in .*lines\.1 now"):
        old.close()
    new.close()
    assert file.read_bytes() == b"new\n"
    assert (location(tmp_path) / "run" / "lines.1").read_bytes() == b"old\n"


def test_every_change_of_a_guarded_place_and_in_it_is_checked_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    allowed = True

    def check() -> None:
        if not allowed:
            raise PermissionError(errno.EACCES, "not any more")

    place = location(tmp_path).guarded(check)
    assert place == location(tmp_path)
    file, lines = place / "folder" / ".." / "file", (place / "lines").lines()
    file.write_bytes(b"allowed")
    lines.write("allowed\n")
    allowed = False
    for change in (
        lambda: file.write_bytes(b""),
        lambda: file.put(Path(__file__)),
        lambda: (place / "new" / "file").create(b""),
        lambda: (place / "new" / "lines").lines(),
        lambda: lines.write("\n"),
        file.remove,
    ):
        with pytest.raises(PermissionError):
            change()
    lines.flush()
    lines.close()
    assert file.read_bytes() == b"allowed"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder", "lines"]
    assert (tmp_path / "lines").read_text() == "allowed\n"


def test_a_check_that_fails_when_the_file_is_prepared_leaves_nothing(tmp_path: Path) -> None:
    checks = iter([None, PermissionError(errno.EACCES, "not any more")])

    def check() -> None:
        error = next(checks)
        if error is not None:
            raise error

    with pytest.raises(PermissionError):
        (location(tmp_path).guarded(check) / "file").write_bytes(b"")
    assert list(tmp_path.iterdir()) == []


def test_lines_that_are_copied_are_checked_when_they_are(tmp_path: Path) -> None:
    allowed = True

    def check() -> None:
        if not allowed:
            raise PermissionError(errno.EACCES, "not any more")

    now = [0.0]
    lines = SpooledLines(location(tmp_path / "lines").guarded(check), clock=lambda: now[0])
    lines.write("first\n")
    now[0], allowed = 10.0, False
    with pytest.raises(PermissionError):
        lines.flush()
    with pytest.raises(PermissionError):
        lines.close()
    assert (tmp_path / "lines").read_text() == ""


def test_a_file_is_read_line_by_line_or_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345\n\n12\n123")
    file = LocalLocation(tmp_path / "file")
    assert list(read_lines(file, 6)) == [b"12345\n", b"\n", b"12\n"]
    with pytest.raises(OSError, match=r"its line 1 has more than 5 bytes, .* all of it 13: restore the file"):
        list(read_lines(file, 5))
    assert [read_beginning(file, count) for count in (0, 7, 13, 14, 10**15)] == [
        b"", b"12345\n\n", b"12345\n\n12\n123", b"", b"",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError):
        read_beginning(LocalLocation(tmp_path / "nothing"), 3)
