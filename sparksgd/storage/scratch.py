"""Temporary folders, and their end: each says whose it is, so that what a killed run left is found.

    /tmp/sparksgd-4x0q2bd1/.owner.json              spools and copies of a process, shards of `inline`
    LOCAL DIRECTORY/sparksgd-RUN-DEAL/.owner.json   shards on an executor, in a local directory of Spark's

Who made a folder removes it.  If it was killed, the next run of the same user on the same machine does, by
`remove_left`.  It removes what is provably ours, and of a process that has provably ended, and nothing else:

- the folder and its owner's file are of this user, and neither is a link;
- the file names a process of this machine, since the machine started, which is gone (see processes.py);
- or it names a driver on another machine: then the executor that wrote the folder is gone, and no process
  here mentions its application, so that nobody can read it.

A folder without an owner's file, or with one that cannot be read, stays, however old it is.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparksgd.storage.processes import Process, is_mentioned, starter, this_process

__all__ = [
    "PREFIX",
    "Owner",
    "claim",
    "in_temporary_folder",
    "make_scratch",
    "remove_left",
    "remove_scratch",
    "scratch_folder",
]

PREFIX = "sparksgd-"
"""How the names of these folders begin."""

_OWNER, _FORMAT = ".owner.json", 1
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who needs a folder."""

    process: Process
    """With its end, nobody needs it any more."""

    application: str | None = None
    """Spark's application, if executors read it."""

    executor: Process | None = None
    """The executor that wrote it, if there is one."""

    def has_ended_seen_from(self, here: Process) -> bool:
        """Return whether nobody can need the folder any more, as this process sees it."""
        if self.process.is_beside(here) or self.executor is None or self.application is None:
            return self.process.is_gone_seen_from(here)
        return self.executor.is_gone_seen_from(here) and not is_mentioned(self.application)


@contextmanager
def in_temporary_folder() -> Iterator[None]:
    """Let an OSError of the block say that it is of the temporary folder.

    Raises:
        OSError: as the block raises it, with other words.
    """
    try:
        yield
    except OSError as error:
        where = f"in the temporary folder {tempfile.gettempdir()}; set TMPDIR to one on another disk"
        raise OSError(error.errno, f"{error.strerror} {where}") from error


def make_scratch() -> Path:
    """Make a folder of this process in the temporary folder; `remove_scratch` removes it.

    Raises:
        OSError: it cannot be made; the words name the temporary folder.
    """
    with in_temporary_folder():
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            _write(folder, Owner(process=this_process()))
        except BaseException:
            remove_scratch(folder)
            raise
        return folder


def remove_scratch(folder: Path) -> None:
    """Remove a folder with all that is in it, its owner's file last: until then it is provably ours."""
    with suppress(OSError):
        for child in list(folder.iterdir()):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child, ignore_errors=True)
            elif child.name != _OWNER:
                child.unlink(missing_ok=True)
        (folder / _OWNER).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder of this process for the time of the block."""
    folder = make_scratch()
    try:
        yield folder
    finally:
        remove_scratch(folder)


def claim(folder: Path, driver: Process, application: str) -> None:
    """Make a folder of a driver on an executor, if it is not there, and say so in it.

    Args:
        folder: below a local directory of Spark's.
        driver: its process, on any machine.
        application: Spark's name of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _OWNER).exists():
        _write(folder, Owner(process=driver, application=application, executor=starter()))


def remove_left(folders: Iterable[Path] | None = None) -> int:
    """Remove those of these folders that a run left which was killed; return how many they were.

    Args:
        folders: their names begin with `PREFIX`; others may look at them at the same time. None: those in
            this machine's temporary folder.
    """
    here, removed = this_process(), 0
    if folders is None:
        folders = Path(tempfile.gettempdir()).glob(f"{PREFIX}*")
    for folder in list(folders):
        with suppress(OSError):
            owner = _owner_of(folder)
            if owner is not None and owner.has_ended_seen_from(here):
                aside = folder.with_name(f"{PREFIX}left-{uuid.uuid4().hex[:12]}")
                folder.rename(aside)  # only one succeeds
                remove_scratch(aside)
                removed += 1
    return removed


def _write(folder: Path, owner: Owner) -> None:
    part = folder / f"{_OWNER}.{uuid.uuid4().hex[:8]}"
    with open(part, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        json.dump({"format": _FORMAT, **asdict(owner)}, file)
    part.replace(folder / _OWNER)


def _owner_of(folder: Path) -> Owner | None:
    """Return who needs a folder; None if it is not this user's, or does not say."""
    if not _is_own(folder, stat.S_ISDIR):
        return None
    file = folder / _OWNER
    if not _is_own(file, stat.S_ISREG) or file.stat().st_size > _MOST_BYTES:
        return None
    try:
        values = json.loads(file.read_bytes())
        if values["format"] != _FORMAT or not isinstance(values["application"], str | None):
            return None
        executor = values["executor"]
        return Owner(
            process=_parsed(values["process"]),
            application=values["application"],
            executor=None if executor is None else _parsed(executor),
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_own(path: Path, is_kind: Any) -> bool:
    status = path.lstat()
    return is_kind(status.st_mode) and status.st_uid == os.geteuid()


def _parsed(values: dict[str, Any]) -> Process:
    """Return a process as a file has it.

    Raises:
        TypeError: it is none.
    """
    process = Process(**values)
    perhaps = (process.started, process.boot_id, process.pid_namespace)
    if not (
        isinstance(process.host, str)
        and type(process.pid) is int
        and process.pid > 0
        and all(isinstance(value, str | None) for value in perhaps)
    ):
        raise TypeError(f"{values} is no process")
    return process
