"""Files through Hadoop's file systems: what holds for this machine's files holds for them.

Its `file:` stands for all here; tests/cluster/ has HDFS.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparksgd.errors import ClusterError, DataError
from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.spark.hadoop_files import HadoopLocation
from sparksgd.storage import LocalLocation, Location, fingerprint, local_copy, location, unanswered
from sparksgd.storage.reading import read_beginning, read_lines

pytestmark = pytest.mark.session("local[2]")


@pytest.fixture(params=["local", "hadoop"])
def at(request: pytest.FixtureRequest, spark: object) -> Callable[[Path], Location]:
    if request.param == "local":
        return LocalLocation
    return lambda path: HadoopLocation(f"file:{path}")


def test_a_file_is_written_read_replaced_and_removed(at: Callable[[Path], Location], tmp_path: Path) -> None:
    file = at(tmp_path) / "new folder" / "file"
    assert not file.exists()
    for data in (b"", b"old", bytes(range(256)) * 100):
        file.write_bytes(data)
        assert file.read_bytes() == data
    assert [file.name for file in (tmp_path / "new folder").iterdir()] == ["file"]  # no .crc
    assert file.name == "file"
    file.remove()
    file.remove()
    assert not file.exists()


def test_a_file_is_opened_with_its_size(at: Callable[[Path], Location], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345\n12")
    assert [*read_lines(at(tmp_path) / "file", 6)] == [b"12345\n"]
    assert read_beginning(at(tmp_path) / "file", 3) == b"123"
    for name in ("", "nothing"):
        with (
            pytest.raises(OSError, match=r"regular file|No such file|Is a directory"),
            (at(tmp_path / name)).opened(),
        ):
            pass


def test_a_folder_is_removed_once_it_is_empty(at: Callable[[Path], Location], tmp_path: Path) -> None:
    folder = at(tmp_path) / "folder"
    (folder / "file").write_bytes(b"kept")
    with pytest.raises(OSError, match="not empty"):
        folder.remove_folder()
    assert (folder / "file").read_bytes() == b"kept"
    (folder / "file").remove()
    folder.remove_folder()
    folder.remove_folder()
    assert not folder.exists()


def test_only_a_regular_file_of_the_right_length_is_read_as_one(
    at: Callable[[Path], Location], tmp_path: Path
) -> None:
    file = at(tmp_path) / "file"
    file.write_bytes(b"12345")
    assert [file.read_bytes(most) for most in (None, 5, 6)] == [b"12345"] * 3
    with pytest.raises(OSError, match="it has 5 bytes, but may have 4 at most"):
        file.read_bytes(4)
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        at(tmp_path).read_bytes()
    with pytest.raises(FileNotFoundError):
        (at(tmp_path) / "nothing").read_bytes()


def test_what_lies_around_a_file_is_found_alike_everywhere(
    at: Callable[[Path], Location], tmp_path: Path
) -> None:
    for name in ("table/day=1/a.parquet", "table/_log/0.json", "table/.hidden/1.json", "table/_log/2.text"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for inside in ("table", "table/day=1", "table/day=1/a.parquet", "table/*/a.parquet"):
        folders = list(at(tmp_path / inside).with_parents())
        assert str(folders[-1]).removeprefix("file:") == "/"
        assert str(folders[0]).removeprefix("file:") == str(tmp_path / inside)
        found = [(str(folder).rpartition("/")[2], folder.names_of("_log/*.json")) for folder in folders]
        assert [(name, names) for name, names in found if names] == [("table", ["0.json"])]
    assert at(tmp_path / "t*").names_of(".hidden/*") == ["1.json"]
    assert at(tmp_path / "nothing").names_of("_log") == []
    assert at(tmp_path / "table" / "_log" / "0.json").names_of("_log") == []


def test_what_is_not_there_is_said_as_python_says_it(at: Callable[[Path], Location], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        (at(tmp_path) / "nothing").read_bytes()
    assert refused.value.strerror == "No such file or directory"
    assert "nothing" in str(refused.value.filename)
    assert (at(tmp_path) / "nothing").files() == []


def test_what_cannot_be_opened_is_not_told_as_what_is_not_there(
    at: Callable[[Path], Location], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="File name too long") as refused:
        (at(tmp_path) / ("x" * 300)).write_bytes(b"")
    assert refused.value.errno == errno.ENAMETOOLONG


def test_lines_can_be_read_when_they_are_closed(at: Callable[[Path], Location], tmp_path: Path) -> None:
    lines = (at(tmp_path) / "run" / "lines").lines()
    assert (at(tmp_path) / "run" / "lines").read_bytes() == b""
    lines.write("one\n")
    lines.write("two\n")
    lines.close()
    assert (at(tmp_path) / "run" / "lines").read_bytes() == b"one\ntwo\n"


def test_files_are_listed_alike_everywhere(at: Callable[[Path], Location], tmp_path: Path) -> None:
    for name in ("b", "a/c", "a/_hidden", ".hidden/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(0, 7_000_000))
    for path in (tmp_path, tmp_path / "b", tmp_path / "*"):
        found = at(path).files()
        assert found == LocalLocation(path).files()
        assert found
    assert [file.path for file in at(tmp_path).files()] == ["a/c", "b"]


@pytest.mark.usefixtures("spark")
def test_a_uri_that_is_not_of_this_machine_goes_through_hadoop() -> None:
    assert isinstance(location("hdfs://somewhere/x"), HadoopLocation)
    with pytest.raises(OSError, match='No FileSystem for scheme "nosuch"'):
        location("nosuch://somewhere/x").exists()


@pytest.mark.usefixtures("spark")
def test_an_unknown_host_is_refused_with_its_name() -> None:
    with pytest.raises(OSError, match=r"hdfs://127\.0\.0\.1:1/x") as refused:
        location("hdfs://127.0.0.1:1/x").exists()
    assert type(unanswered(refused.value, DataError("x"))) is ClusterError  # a scheduler may try again


def test_an_object_store_is_written_to_in_one_step(
    at: Callable[[Path], Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparksgd.spark.hadoop_files._WHOLE_AT_ONCE", frozenset({"file"}))
    monkeypatch.setattr(HadoopLocation, "_rename", None)
    file = at(tmp_path) / "new folder" / "file"
    for data in (b"old", b"new"):
        file.write_bytes(data)
        assert file.read_bytes() == data


@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize("killed_before", [1, 2, 3])
def test_where_a_file_is_replaced_in_two_steps_one_of_both_is_always_found(
    killed_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = HadoopLocation(f"file:{tmp_path}")
    file, calls = folder / "file", []
    file.write_bytes(b"old")

    class Killed(BaseException):
        pass

    class Files:
        """Of Hadoop; the process ends before one of the calls that replace a file."""

        def __init__(self, files: Any) -> None:
            self._files = files

        def __getattr__(self, name: str) -> Any:
            if name == "rename" or (name == "delete" and len(calls) == 2):
                calls.append(name)
                if len(calls) == killed_before:
                    raise Killed
            return getattr(self._files, name)

    files = folder._files
    with monkeypatch.context() as struck:
        struck.setattr(HadoopLocation, "_files", Files(files))
        with pytest.raises(Killed):
            file.write_bytes(b"new")
    assert file.exists()
    assert file.read_bytes() == (b"new" if killed_before == 3 else b"old")
    assert "file" in folder.names()
    file.write_bytes(b"newer")
    assert file.read_bytes() == b"newer"
    assert {name for name in folder.names() if not name.endswith((".part", ".crc"))} == {"file"}
    file.remove()
    assert not file.exists()


@pytest.mark.usefixtures("spark")
def test_a_file_system_of_a_run_that_has_begun_is_waited_for(tmp_path: Path) -> None:
    place = HadoopLocation("hdfs://127.0.0.1:1/x")
    asked = "dfs.client.retry.policy.enabled"
    assert place._files.getConf().getBoolean(asked, False) is False
    for patient in (place.patient(), place.patient() / "y", place.patient().guarded(lambda: None)):
        assert patient._files.getConf().getBoolean(asked, False) is True


@pytest.mark.usefixtures("spark")
def test_a_copy_holds_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparksgd.storage._local_path", lambda path: None)  # as if `file:` were elsewhere
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("text")
    for path in (tmp_path, tmp_path / "in" / "file"):
        with local_copy(path.as_uri()) as copy:
            assert [file.read_text() for file in Path(copy).rglob("file")] == ["text"]
            assert not Path(copy).is_relative_to(tmp_path)
    assert fingerprint((tmp_path / "in").as_uri())
    with pytest.raises(FileNotFoundError), local_copy((tmp_path / "nothing").as_uri()):
        pass


def test_a_file_is_created_by_one_writer_alone(
    at: Callable[[Path], Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparksgd.spark.hadoop_files._SECONDS_TO_SETTLE", 0.0)
    file = at(tmp_path) / "new folder" / "file"
    assert at(tmp_path / "new folder").names() == []
    assert file.create(b"one")
    assert not file.create(b"two")
    assert file.read_bytes() == b"one"
    assert "file" in at(tmp_path / "new folder").names()


@pytest.mark.usefixtures("spark")
def test_where_two_writers_can_create_one_file_it_is_of_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = HadoopLocation(f"file:{tmp_path}/file")

    def settle(seconds: float) -> None:
        assert seconds == 1.0
        file.write_bytes(b"two")

    monkeypatch.setattr("sparksgd.spark.hadoop_files.time", SimpleNamespace(sleep=settle))
    assert not file.create(b"one")
    assert file.read_bytes() == b"two"


def test_every_change_of_a_guarded_place_and_in_it_is_checked_before(
    at: Callable[[Path], Location], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def check() -> None:
        raise PermissionError(errno.EACCES, "not any more")

    file = at(tmp_path).guarded(check) / "file"
    for change in (
        lambda: file.write_bytes(b""),
        lambda: file.put(Path(__file__)),
        lambda: file.create(b""),
        file.lines,
        file.remove,
    ):
        with pytest.raises(PermissionError):
            change()
    assert file.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_lease_is_taken_renewed_lost_and_released_alike_everywhere(
    at: Callable[[Path], Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparksgd.spark.hadoop_files._SECONDS_TO_SETTLE", 0.0)
    place = at(tmp_path / "run")
    one, two = Lease(place, Holder.here("one")), Lease(place, Holder.here("two"), wait_s=0.0)
    one.take()
    one.renew()
    one.check()
    two.take()
    (place.guarded(two.check) / "run.json").write_bytes(b"of two")
    monkeypatch.setattr(one, "_due_s", 0.0)
    with pytest.raises(ClusterError, match="run two"):
        (place.guarded(one.check) / "run.json").write_bytes(b"of one")
    two.release()
    one.take()
    assert (place / "run.json").read_bytes() == b"of two"
    assert sorted(name for name in place.names() if name.endswith(".json")) == [
        ".lease-000003.json", "run.json",
    ]  # fmt: skip
