"""Files on this machine, or on one of Hadoop's file systems.

    runs/lenet            this machine, whatever Hadoop's default file system is
    file:/data/lenet      this machine
    hdfs: s3a: abfss: ... what is registered here for URIs; in a job, spark/hadoop_files.py

A file is written whole or not at all, so that no reader ever sees half of it: its writer prepares it under a
name of its own, .NAME.12345678.part, and moves it to its place.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, Self

from sparksgd.errors import ClusterError, ConfigError, SparkSGDError
from sparksgd.storage.lines import Lines, LocalLines, SpooledLines, Throttle
from sparksgd.storage.scratch import scratch_folder

__all__ = [
    "HIDDEN", "FileStatus", "Lines", "LocalLines", "LocalLocation", "Location", "SpooledLines", "Throttle",
    "fingerprint", "has_scheme", "local_copy", "location", "part_of", "register_uris", "remove_parts",
    "replacing", "require_at_most", "require_regular", "unanswered", "unchecked",
]  # fmt: skip

_NOT_REGULAR = "it is not a regular file: it is a pipe, a socket or a device"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
HIDDEN = ("_", ".")
"""How the names of files begin that hold no data."""

_PART = re.compile(r"\.[^.].*\.[0-9a-f]{8}\.part")
"""Names of what `replacing` writes, except of files that are hidden themselves."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system raises that has no hard links."""

_UNANSWERED = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ETIMEDOUT)
_SECONDS_OF_A_DAY = 86_400.0


@dataclass(frozen=True, order=True)
class FileStatus:
    """A file within a folder."""

    path: str
    """Relative to the folder; of a single file its name."""

    size_bytes: int
    modified_ms: int


class Location(Protocol):
    """A file or folder, here or elsewhere, with the method names of `pathlib`.

    Its methods raise OSError with a strerror: FileNotFoundError, PermissionError, or another.
    """

    @property
    def name(self) -> str:
        """The last part of its path."""
        ...

    def __truediv__(self, name: str, /) -> Location:
        """Return what lies in it under a relative path."""
        ...

    def exists(self) -> bool:
        """Return whether it is there."""
        ...

    def read_bytes(self, most_bytes: int | None = None, /) -> bytes:
        """Return what a regular file holds; raise OSError for a device, a pipe, a folder or a longer one.

        Args:
            most_bytes: a longer file is not read; None reads any.
        """
        ...

    def opened(self) -> AbstractContextManager[tuple[IO[bytes], int]]:
        """Yield a regular file, or a copy of it, to be read, and its size; raise OSError as `read_bytes`."""
        ...

    def write_bytes(self, data: bytes) -> None:
        """Write the file, whole or not at all, and its folder if need be; it outlasts a loss of power."""
        ...

    def create(self, data: bytes) -> bool:
        """Write the file if it is not there, and its folder if need be; return whether this call did.

        Of several writers at the same moment one gets True, if the file system can decide that.  No two of
        them may have the same data.
        """
        ...

    def put(self, file: Path) -> None:
        """Write the file as a copy of one of this machine, whole or not at all."""
        ...

    def lines(self, kept: bytes = b"") -> Lines:
        """Begin a new file, which grows line by line after what is kept of an earlier one."""
        ...

    def remove(self) -> None:
        """Remove the file, if it is there."""
        ...

    def remove_folder(self) -> None:
        """Remove the folder, if it is there; raise OSError if something is in it."""
        ...

    def files(self) -> list[FileStatus]:
        """Return the file, all files of the folder, or all that a pattern matches, in order.

        Names that begin with _ or . are no data, and are left out.
        """
        ...

    def with_parents(self) -> Iterable[Location]:
        """Return it, then each folder around it, from the innermost on."""
        ...

    def names_of(self, pattern: str) -> list[str]:
        """Return the last names of what matches a pattern in the folder, hidden or not."""
        ...

    def moved_aside(self) -> str:
        """Rename the folder to NAME.1, or the first number that is free; return where it is now."""
        ...

    def names(self) -> list[str]:
        """Return the names of all that lies in the folder, hidden or not; none if there is no folder."""
        ...

    def guarded(self, check: Callable[[], None]) -> Self:
        """Return the same place; each change of it, or in it, calls `check` before, which may raise."""
        ...

    def patient(self) -> Self:
        """Return the same place; its file system is waited for, a minute at most, if it does not answer."""
        ...


_location_of_uri: Callable[[str], Location] | None = None


def register_uris(make: Callable[[str], Location]) -> None:
    """Make `location` understand URIs of other schemes than `file:`.

    Args:
        make: returns the Location of a URI; it knows which schemes exist.
    """
    global _location_of_uri
    _location_of_uri = make


def location(path: str | Path | Location) -> Location:
    """Return the location of a path or URI.

    Raises:
        ConfigError: it is a URI of another scheme than `file:`, and nothing is registered for those.
    """
    if not isinstance(path, str | Path):
        return path
    local = _local_path(path)
    if local is not None:
        return LocalLocation(local)
    if _location_of_uri is None:
        raise ConfigError(
            f"{path} is a URI of another file system, and nothing in this process opens those yet: call "
            f"sparksgd.spark.uris.lead_to_hadoop() before, or start the session with "
            f"sparksgd.spark.session.start_session; or name a path of this machine"
        )
    return _location_of_uri(str(path))


def has_scheme(path: str) -> bool:
    """Return whether a path names its file system.

    >>> has_scheme("runs/lenet"), has_scheme("file:/runs/lenet"), has_scheme("hdfs:///runs/lenet")
    (False, True, True)
    """
    return _SCHEME.match(path) is not None


def _local_path(path: str | Path) -> Path | None:
    text = str(path)
    scheme = _SCHEME.match(text)
    if isinstance(path, Path) or scheme is None:
        return Path(text)
    if scheme[1].lower() != "file":
        return None
    return Path("/" + text[scheme.end() :].lstrip("/"))  # as Hadoop does: %20 is not a space


def unchecked() -> None:
    """Let a change happen."""


@dataclass(frozen=True)
class LocalLocation:
    """A file or folder of this machine."""

    path: Path
    check: Callable[[], None] = field(default=unchecked, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return _resolved(self.path).name

    def __truediv__(self, name: str, /) -> LocalLocation:
        """Return what lies in it under a relative path."""
        return LocalLocation(self.path / name, self.check)

    def exists(self) -> bool:
        """Return whether it is there."""
        return self.path.exists()

    def read_bytes(self, most_bytes: int | None = None, /) -> bytes:
        """Return what a regular file holds; raise OSError for a device, a pipe, a folder or a longer one."""
        with self.opened() as (file, size_bytes):
            require_at_most(str(self.path), size_bytes, most_bytes)
            return file.read(size_bytes)

    @contextmanager
    def opened(self) -> Iterator[tuple[IO[bytes], int]]:
        """Yield a regular file, to be read, and its size; raise OSError for a device, a pipe or a folder."""
        with open(self.path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, _NOT_REGULAR, str(self.path))
            yield file, status.st_size

    def write_bytes(self, data: bytes) -> None:
        """Write the file, whole or not at all, and its folder if need be."""
        with self._replacing() as part:
            part.write_bytes(data)

    def create(self, data: bytes) -> bool:
        """Write the file if it is not there, and its folder if need be; return whether this call did."""
        self.check()
        self._folder().mkdir(parents=True, exist_ok=True)
        part = part_of(self.path)
        try:
            part.write_bytes(data)
            os.link(part, self.path)
            return True
        except FileExistsError:
            with suppress(FileNotFoundError):
                return part.samefile(self.path)  # NFS may ask twice for one link
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_without_links(data)
        finally:
            part.unlink(missing_ok=True)

    def _create_without_links(self, data: bytes) -> bool:
        """Do the same where a reader may see an empty file for a moment."""
        try:
            file = self.path.open("xb")
        except FileExistsError:
            return False
        with ExitStack() as unless_written, file:
            unless_written.callback(self.path.unlink)
            file.write(data)
            file.flush()
            unless_written.pop_all()
        return True

    def put(self, file: Path) -> None:
        """Write the file as a copy of one of this machine, whole or not at all."""
        with self._replacing() as part:
            shutil.copyfile(file, part)

    def _folder(self) -> Path:
        """Return the folder of the file, where links lead to it: mkdir fails at one that leads nowhere."""
        folder = self.path.parent
        return folder if ".." in folder.parts else _resolved(folder)

    @contextmanager
    def _replacing(self) -> Iterator[Path]:
        self.check()
        folder = self._folder()
        missing = list(itertools.takewhile(lambda one: not one.exists(), (folder, *folder.parents)))
        folder.mkdir(parents=True, exist_ok=True)
        for one in missing:
            _kept_on_disk(one.parent)
        with replacing(self.path) as part:
            yield part
            _kept_on_disk(part)
            self.check()  # to write may have taken long
        _kept_on_disk(folder)

    def lines(self, kept: bytes = b"") -> Lines:
        """Begin a new file, which grows line by line after what is kept of an earlier one."""
        self.write_bytes(kept)  # as a file of its own: who still writes to the old one must not write to it
        return LocalLines(self)

    def remove(self) -> None:
        """Remove the file, if it is there."""
        self.check()
        self.path.unlink(missing_ok=True)

    def remove_folder(self) -> None:
        """Remove the folder, if it is there; raise OSError if something is in it."""
        self.check()
        with suppress(FileNotFoundError):
            self.path.rmdir()

    def files(self) -> list[FileStatus]:
        """Return the file, all files of the folder, or all that a pattern matches, in order."""
        found = []
        for top in [self.path] if self.path.exists() else _matching(self.path):
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                within = path.relative_to(top if top.is_dir() else top.parent)
                if path.is_file() and not any(part.startswith(HIDDEN) for part in within.parts):
                    status = path.stat()
                    modified_ms = status.st_mtime_ns // 1_000_000
                    found.append(FileStatus(within.as_posix(), status.st_size, modified_ms))
        return sorted(found)

    def with_parents(self) -> Iterable[LocalLocation]:
        """Return it, then each folder around it, also those that links lead to."""
        places = [_resolved(self.path)]
        if ".." not in self.path.parts:
            places.insert(0, self.path.absolute())
        found = dict.fromkeys(folder for place in places for folder in (place, *place.parents))
        return map(LocalLocation, found)

    def names_of(self, pattern: str) -> list[str]:
        """Return the last names of what matches a pattern in the folder, hidden or not."""
        folder = glob.escape(str(self.path)) if self.path.exists() else str(self.path)
        return [Path(found).name for found in glob.glob(f"{folder}/{pattern}")]  # noqa: PTH207  # see _matching

    def moved_aside(self) -> str:
        """Rename the folder to NAME.1, or the first number that is free; return where it is now."""
        self.check()
        here = _resolved(self.path)
        for number in itertools.count(1):
            aside = here.with_name(f"{here.name}.{number}")
            if not os.path.lexists(aside):  # a link to nowhere is in the way, too
                break
        here.rename(aside)
        return str(aside)

    def names(self) -> list[str]:
        """Return the names of all that lies in the folder, hidden or not; none if there is no folder."""
        try:
            return os.listdir(self.path)  # noqa: PTH208  # pathlib would take twice the time
        except FileNotFoundError:
            return []

    def patient(self) -> LocalLocation:
        """Return the same place: this machine's files answer at once."""
        return self

    def guarded(self, check: Callable[[], None]) -> LocalLocation:
        """Return the same place; each change of it, or in it, calls `check` before, which may raise."""
        return LocalLocation(self.path, check)


def _resolved(path: Path) -> Path:
    """Return where links lead; of links that lead in a circle, one of them: whoever opens it is told."""
    return Path(os.path.realpath(path))


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe without a writer at once, too."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def require_at_most(path: str, size_bytes: int, most_bytes: int | None) -> None:
    """Raise OSError if a file is longer than what is to be read of it."""
    if most_bytes is not None and size_bytes > most_bytes:
        raise OSError(errno.EFBIG, f"it has {size_bytes:,} bytes, but may have {most_bytes:,} at most", path)


def require_regular(path: Path) -> None:
    """Refuse what is no file with an end: a pipe may stay silent, and a device may never end.

    Raises:
        OSError: it is a folder, a pipe, a socket or a device, or is not there.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, _NOT_REGULAR, str(path))


def _matching(pattern: Path) -> list[Path]:
    """Return what a pattern matches, except hidden names."""
    found = sorted(glob.glob(str(pattern)))  # noqa: PTH207  # pathlib's takes no absolute pattern
    return [path for path in map(Path, found) if not path.name.startswith(HIDDEN)]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it there if all goes well."""
    _remove_old_parts(path)
    part = part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _kept_on_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a loss of power.

    Raises:
        OSError: the disk failed; nothing where the file system knows no such request.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def part_of(path: Path) -> Path:
    """Return a path beside another one, where one writer alone may prepare the file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def _remove_old_parts(path: Path) -> None:
    """Remove what writers of a file left that were killed a day ago, or before."""
    with suppress(OSError):
        for name in os.listdir(path.parent):  # noqa: PTH208  # pathlib would take twice the time
            if name.startswith(f".{path.name}.") and _PART.fullmatch(name):
                left = path.with_name(name)
                if time.time() - left.stat().st_mtime > _SECONDS_OF_A_DAY:
                    left.unlink()


def remove_parts(folder: Location) -> None:
    """Remove what killed writers left in a folder; nobody else may write to it."""
    for name in folder.names():
        if _PART.fullmatch(name):
            (folder / name).remove()


def unanswered(error: OSError, refusal: SparkSGDError) -> SparkSGDError:
    """Return a refusal; or a ClusterError of the same words, if a file system did not answer."""
    return ClusterError(str(refusal)) if error.errno in _UNANSWERED else refusal


def fingerprint(path: str) -> str:
    """Return a digest of the files behind a path: their names, sizes and times, not their content."""
    digest, files = hashlib.sha256(), location(path).files()
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no file is there", path)
    for file in files:
        digest.update(f"{file.path}\0{file.size_bytes}\0{file.modified_ms}\n".encode())
    return digest.hexdigest()


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yield a path on this machine where a file, folder or pattern can be read: its own, or a copy's."""
    local = _local_path(path)
    if local is not None:
        yield str(local)
        return
    source = location(path)
    files = source.files()
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", path)
    with scratch_folder() as folder:
        single = [file.path for file in files] == [source.name]
        for file in files:
            copy = folder / "copy" / file.path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((source if single else source / file.path).read_bytes())
        yield str(folder / "copy")
