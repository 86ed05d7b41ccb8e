"""What a killed run leaves on disks is removed by the next one; what is not provably ours and dead stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sparksgd.spark.tasks import row_tasks
from sparksgd.storage.lines import SpooledLines
from sparksgd.storage.processes import Process, is_mentioned, starter, this_process
from sparksgd.storage.scratch import claim, make_scratch, remove_left, remove_scratch, scratch_folder

MADE = """
import sys
from sparksgd.storage.scratch import make_scratch
folder = make_scratch()
(folder / "shards").mkdir()
(folder / "shards" / "rows").write_bytes(b"rows")
(folder / "spool").write_bytes(b"lines")
print(folder, flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def another(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a process that makes a folder, and waits; return both."""
    with subprocess.Popen(
        [sys.executable, "-c", MADE], env=os.environ | {"TMPDIR": str(temporary)}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_needs_stays(
    another: tuple[subprocess.Popen[str], Path], temporary: Path
) -> None:
    process, folder = another
    own = make_scratch()
    assert remove_left() == 0
    assert sorted(child.name for child in folder.iterdir()) == [".owner.json", "shards", "spool"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert remove_left() == 1
    assert list(temporary.iterdir()) == [own]
    remove_scratch(own)
    assert not list(temporary.iterdir())


def test_one_that_stands_still_lives(another: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = another
    process.send_signal(signal.SIGSTOP)
    assert remove_left() == 0
    assert (folder / "spool").exists()


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / ".owner.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


UNPROVEN: dict[str, Callable[[Path], object]] = {
    "no owner's file": lambda folder: (folder / ".owner.json").unlink(),
    "half a file": lambda folder: os.truncate(folder / ".owner.json", 20),
    "another format": lambda folder: changed(folder, lambda values: values.update(format=2)),
    "another host": lambda folder: changed(folder, lambda values: values["process"].update(host="elsewhere")),
    "an earlier start of the machine": lambda folder: changed(
        folder, lambda values: values["process"].update(boot_id="0")
    ),
    "another container": lambda folder: changed(
        folder, lambda values: values["process"].update(pid_namespace="pid:[0]")
    ),
    "a number that is none": lambda folder: changed(folder, lambda values: values["process"].update(pid="1")),
    "a field that is none": lambda folder: changed(folder, lambda values: values["process"].update(x=1)),
    "a link for a file": lambda folder: (
        (folder / ".owner.json").rename(folder / "other"),
        (folder / ".owner.json").symlink_to(folder / "other"),
    ),
    "a link for a folder": lambda folder: (
        folder.rename(folder.with_name("elsewhere")),
        folder.symlink_to(folder.with_name("elsewhere")),
    ),
}


@pytest.mark.parametrize("change", UNPROVEN)
def test_what_is_not_provably_ours_and_dead_stays(temporary: Path, change: str) -> None:
    folder = temporary / "sparksgd-left"
    folder.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = {"format": 1, "application": None, "executor": None}
    owner["process"] = asdict(replace(this_process(), pid=gone.pid))
    (folder / ".owner.json").write_text(json.dumps(owner))
    (folder / "rows").touch()
    UNPROVEN[change](folder)
    assert remove_left() == 0
    assert (folder / "rows").exists()


def test_another_users_stays(
    another: tuple[subprocess.Popen[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder = another
    process.kill()
    process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        assert remove_left() == 0
    assert remove_left() == 1


ELSEWHERE = Process(host="driver", pid=1, started="1", boot_id="1", pid_namespace="1")


def test_shards_of_a_driver_elsewhere_live_as_long_as_an_executor_of_it_is_here(tmp_path: Path) -> None:
    folder, application = tmp_path / "sparksgd-run-deal", "app-20261129-0001"
    claim(folder, ELSEWHERE, application)
    owner = json.loads((folder / ".owner.json").read_text())
    assert owner["executor"] == asdict(starter())  # of this test: whatever started its Python
    assert remove_left([folder]) == 0
    gone = subprocess.Popen(["true"])
    gone.wait()
    changed(folder, lambda values: values["executor"].update(pid=gone.pid))
    program = "import time; print(flush=True); time.sleep(3600)"
    words = [sys.executable, "-c", program, "--app-id", application]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as executor:
        assert executor.stdout is not None
        executor.stdout.readline()  # before, the kernel may not show its words yet
        try:
            assert is_mentioned(application)
            assert remove_left([folder]) == 0
        finally:
            executor.kill()
    assert not is_mentioned(application)
    assert remove_left([folder]) == 1
    assert not list(tmp_path.glob("sparksgd-*"))


def test_shards_of_a_driver_here_live_as_long_as_it_does(
    another: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, made = another
    driver = json.loads((made / ".owner.json").read_text())["process"]
    folder = tmp_path / "sparksgd-run-deal"
    claim(folder, Process(**driver), "local-1")
    assert remove_left([folder]) == 0
    process.kill()
    process.wait()
    assert remove_left([folder]) == 1


SPARKS = "-0123abcd-0123-0123-0123-0123456789ab"


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (f"blockmgr{SPARKS}", "blockmgr-x"),
        (f"spark{SPARKS}/executor{SPARKS}/blockmgr{SPARKS}", "spark-x/executor-y/blockmgr-z"),
        (f"spark{SPARKS}/blockmgr{SPARKS}", "blockmgr-z"),
        ("", "blockmgr-z"),
    ],
)
def test_an_executor_looks_at_the_local_directories_of_others_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, other: str
) -> None:
    left, living = tmp_path / other / "sparksgd-left", tmp_path / own / "sparksgd-living"
    for folder in (left, living):
        claim(folder, this_process(), "app")
    changed(left, lambda values: values["process"].update(started="before"))
    strangers = tmp_path / other / "data-of-others"
    strangers.mkdir()
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path / own))
    ((_, free_bytes, removed),) = row_tasks.look_at_disks(())
    assert free_bytes > 0
    assert (removed, left.exists(), living.exists(), strangers.exists()) == (1, False, True, True)


def test_spools_are_in_a_folder_that_says_whose_it_is(temporary: Path) -> None:
    class Place:
        def put(self, file: Path) -> None:
            (temporary / "copied").write_bytes(file.read_bytes())

    lines = SpooledLines(Place(), b"first\n")
    lines.write("second\n")
    (folder,) = temporary.glob("sparksgd-*")
    assert (folder / ".owner.json").exists()
    assert remove_left() == 0
    lines.close()
    assert (temporary / "copied").read_text() == "first\nsecond\n"
    assert not list(temporary.glob("sparksgd-*"))


FULL = OSError(28, "No space left on device")


def test_lines_wait_for_space_where_the_temporary_folder_is_full(temporary: Path) -> None:
    copies: list[bytes] = []

    class Place:
        def put(self, file: Path) -> None:
            copies.append(file.read_bytes())

    class Disk:
        """Takes four bytes, then it is full, until `free`."""

        def __init__(self, file: Any) -> None:
            self.file, self.free_bytes = file, 4

        def write(self, data: bytearray) -> int:
            if not self.free_bytes:
                raise FULL
            count = self.file.write(data[: self.free_bytes])
            self.free_bytes -= count
            return count

    lines = SpooledLines(Place(), b"first\n")
    lines._spool = disk = Disk(lines._spool)
    for text in ("second\n", "third\n"):
        lines.write(text)
        with pytest.raises(
            OSError, match=f"No space left on device in the temporary folder {temporary}; set"
        ):
            lines.flush_all()
    disk.free_bytes = 100
    lines.write("fourth\n")
    lines.close()
    assert copies == [b"first\n", b"first\nsecond\nthird\nfourth\n"]
    assert not list(temporary.iterdir())


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    def full(*_: Any, **options: Any) -> str:
        raise FULL

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(
        OSError, match=f"No space left on device in the temporary folder {temporary}; set TMPDIR"
    ):
        make_scratch()


def test_a_folder_is_gone_after_its_block_whatever_is_in_it(temporary: Path) -> None:
    with scratch_folder() as folder:
        (folder / "link").symlink_to(tempfile.gettempdir())
        (folder / "below").mkdir()
    assert temporary.exists()
    assert not list(temporary.iterdir())
