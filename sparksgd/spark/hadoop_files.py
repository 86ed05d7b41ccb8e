"""Files on Hadoop's file systems, through the driver's JVM.

This needs the JVM, but no session: the configuration is read, and the output checked, before Spark asks the
cluster for anything.  Bytes are copied by Hadoop to and from files on this machine, which is twice as fast as
sending them through py4j.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import SparkContext

from sparksgd.storage import HIDDEN, FileStatus, Lines, SpooledLines, part_of, require_at_most, unchecked
from sparksgd.storage.scratch import in_temporary_folder, scratch_folder

__all__ = ["HadoopLocation", "hadoop_configuration"]

_ERRNO = {
    "java.io.FileNotFoundException": errno.ENOENT,
    "java.nio.file.NoSuchFileException": errno.ENOENT,
    "org.apache.hadoop.fs.FileAlreadyExistsException": errno.EEXIST,
    "org.apache.hadoop.security.AccessControlException": errno.EACCES,
    "java.nio.file.AccessDeniedException": errno.EACCES,
    "java.net.ConnectException": errno.ECONNREFUSED,
    "java.net.NoRouteToHostException": errno.EHOSTUNREACH,
    "java.net.SocketTimeoutException": errno.ETIMEDOUT,
    "org.apache.hadoop.net.ConnectTimeoutException": errno.ETIMEDOUT,
}

_WHOLE_AT_ONCE = frozenset(("s3a", "s3", "s3n", "gs", "oss", "cosn", "wasb", "wasbs"))
"""Object stores: a file appears only when it is complete, and to rename it means to copy it."""

_REPLACES_AT_ONCE = frozenset(("hdfs", "webhdfs", "swebhdfs"))
"""Where a file can be moved to the place of another one in one step."""

_BEFORE = ".before"
"""Ends the hidden name of a file while another one takes its place, where that takes two steps."""

_RETRIES_OF_THE_PATIENT = "2000,5"
"""Pauses in ms, and how many.  The client makes as many in each of its tries: a minute in all, in which a
NameNode that is started anew is there."""

_SECONDS_TO_SETTLE = 1.0
"""How long a file that was created is left alone before it counts, where two writers could create it."""

_file_systems: dict[tuple[str, str, bool], Any] = {}
"""By scheme, authority, and whether it is patient."""


class HadoopLocation:
    """A file or folder of a file system that Hadoop knows.

    Args:
        uri: its scheme names the file system: hdfs:, s3a:, abfss:, dbfs: ...
        check: called before each change, see `guarded`.
        is_patient: see `patient`.
    """

    def __init__(self, uri: str, check: Callable[[], None] = unchecked, *, is_patient: bool = False) -> None:
        self._uri = uri.rstrip("/") if uri.rstrip("/").rpartition(":")[2] else uri
        self._check, self._is_patient = check, is_patient

    def __str__(self) -> str:
        return self._uri

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._uri.rpartition("/")[2]

    def __truediv__(self, name: str, /) -> HadoopLocation:
        """Return what lies in it under a relative path."""
        return HadoopLocation(self._inside(name), self._check, is_patient=self._is_patient)

    def exists(self) -> bool:
        """Return whether it is there."""
        with self._errors():
            return bool(self._files.exists(self._found))

    def read_bytes(self, most_bytes: int | None = None, /) -> bytes:
        """Return the content of the file; raise OSError for a folder, or a longer file."""
        with self._copied(most_bytes) as copy:
            return copy.read_bytes()

    @contextmanager
    def opened(self) -> Iterator[tuple[IO[bytes], int]]:
        """Yield a copy of the file, to be read, and its size; raise OSError for a folder."""
        with self._copied() as copy, copy.open("rb") as file:
            yield file, copy.stat().st_size

    @contextmanager
    def _copied(self, most_bytes: int | None = None) -> Iterator[Path]:
        """Yield a copy of the file on this machine."""
        with scratch_folder() as folder:
            copy = folder / "copy"
            try:
                self._copy(copy, most_bytes)
            except FileNotFoundError:
                if self._replaces_at_once:
                    raise
                self._copy(copy, most_bytes)  # another one may just have taken its place
            yield copy

    def _copy(self, copy: Path, most_bytes: int | None) -> None:
        with self._errors():
            found = self._found
            status = self._files.getFileStatus(found)
            if not status.isFile():
                raise OSError(errno.EINVAL, "it is not a regular file", self._uri)
            require_at_most(self._uri, int(status.getLen()), most_bytes)
            self._files.copyToLocalFile(False, found, _java_path(f"file:{copy}"), True)

    def write_bytes(self, data: bytes) -> None:
        """Write the file, whole or not at all; create its folder if it does not exist."""
        with scratch_folder() as folder:
            self.put(_spooled(folder, data))

    def create(self, data: bytes) -> bool:
        """Write the file if it is not there, and its folder if need be; return whether this call did.

        HDFS decides between two writers.  Elsewhere both may write, as on S3A, which looks before it writes:
        the second replaces the first.  So the file is read again after a second: whose content is there has
        written it.  If the second was slower still, the first one finds its content gone later.
        """
        self._check()
        try:
            with self._errors():
                if self._scheme == "hdfs":
                    with scratch_folder() as folder, self._part() as part:
                        spool = _spooled(folder, data)
                        self._files.copyFromLocalFile(False, True, _java_path(f"file:{spool}"), part)
                        return bool(self._files.rename(part, self._path))  # False if it is there
                stream = self._files.create(self._path, False)
                try:
                    stream.write(data)
                finally:
                    stream.close()
        except FileExistsError:
            return False
        time.sleep(_SECONDS_TO_SETTLE)
        return self.read_bytes() == data

    def put(self, file: Path) -> None:
        """Write the file as a copy of one on this machine, whole or not at all."""
        self._check()
        with self._errors():
            here = _java_path(f"file:{file.absolute()}")
            if self._scheme in _WHOLE_AT_ONCE:
                self._files.copyFromLocalFile(False, True, here, self._path)
                return
            with self._part() as part:
                self._files.copyFromLocalFile(False, True, here, part)
                self._check()  # to copy may have taken long
                self._rename(part)

    @contextmanager
    def _part(self) -> Iterator[Any]:
        """Yield a path beside it where this writer alone prepares the file; remove what is left there."""
        folder, _, name = self._uri.rpartition("/")
        part = _java_path(f"{folder}/{part_of(Path(name))}")
        try:
            yield part
        finally:
            self._files.delete(part, False)

    def lines(self, kept: bytes = b"") -> Lines:
        """Begin a new file, which grows line by line after what is kept of an earlier one."""
        return SpooledLines(self, kept)

    def remove(self) -> None:
        """Remove the file, if it is there."""
        self._check()
        with self._errors():
            if not self._replaces_at_once:
                self._files.delete(self._before, False)
            self._files.delete(self._path, False)

    def remove_folder(self) -> None:
        """Remove the folder, if it is there; raise OSError if something is in it."""
        self.remove()  # not what is in it, either

    def files(self) -> list[FileStatus]:
        """Return the file, all files of the folder, or all that a pattern matches, in order."""
        found = []
        with self._errors():
            for top in self._files.globStatus(self._path) or ():
                if str(top.getPath().getName()) != self.name and _is_hidden(str(top.getPath().getName())):
                    continue
                within = str(top.getPath().toUri().getPath())
                if top.isFile():
                    within = within.rpartition("/")[0]
                listed = self._files.listFiles(top.getPath(), True)
                while listed.hasNext():
                    file = listed.next()
                    path = str(file.getPath().toUri().getPath()).removeprefix(within).lstrip("/")
                    if not any(map(_is_hidden, path.split("/"))):
                        found.append(FileStatus(path, int(file.getLen()), int(file.getModificationTime())))
        return sorted(found)

    def with_parents(self) -> Iterator[HadoopLocation]:
        """Yield it, then each folder around it, from the innermost on."""
        path = self._path
        while path is not None:
            yield HadoopLocation(str(path.toString()))
            path = path.getParent()

    def names_of(self, pattern: str) -> list[str]:
        """Return the last names of what matches a pattern in the folder, hidden or not."""
        with self._errors():
            found = self._files.globStatus(_java_path(self._inside(pattern))) or ()
            return [str(status.getPath().getName()) for status in found]

    def moved_aside(self) -> str:
        """Rename the folder to NAME.1, or the first number that is free; return where it is now."""
        self._check()
        with self._errors():
            number = 1
            while self._files.exists(_java_path(f"{self._uri}.{number}")):
                number += 1
            aside = f"{self._uri}.{number}"
            if not self._files.rename(self._path, _java_path(aside)):
                raise OSError(errno.EIO, "the file system did not rename it", self._uri)
            return aside

    def names(self) -> list[str]:
        """Return the names of all that lies in the folder, hidden or not; none if there is no folder."""
        try:
            with self._errors():
                found = [str(status.getPath().getName()) for status in self._files.listStatus(self._path)]
        except FileNotFoundError:
            return []
        moved = [name[1 : -len(_BEFORE)] for name in found if name.startswith(".") and name.endswith(_BEFORE)]
        return [*found, *(name for name in moved if name not in found)]

    def guarded(self, check: Callable[[], None]) -> HadoopLocation:
        """Return the same place; each change of it, or in it, calls `check` before, which may raise."""
        return HadoopLocation(self._uri, check, is_patient=self._is_patient)

    def patient(self) -> HadoopLocation:
        """Return the same place; its file system is waited for, a minute at most, if it does not answer.

        HDFS alone needs this: others are patient by default, also one with several NameNodes.
        """
        return HadoopLocation(self._uri, self._check, is_patient=self._scheme == "hdfs")

    def _inside(self, name: str) -> str:
        return self._uri + name if self._uri.endswith("/") else f"{self._uri}/{name}"  # the root ends with it

    @property
    def _path(self) -> Any:
        return _java_path(self._uri)

    @property
    def _scheme(self) -> str:
        return str(self._path.toUri().getScheme())

    @property
    def _files(self) -> Any:
        """Return a file system of our own.

        Hadoop closes shared ones at the JVM's shutdown, before the last model is written.
        """
        uri = self._path.toUri()
        key = str(uri.getScheme()), str(uri.getAuthority()), self._is_patient
        if key not in _file_systems:
            conf = hadoop_configuration()
            conf.setBoolean("fs.automatic.close", False)
            if self._is_patient and not conf.getBoolean("dfs.client.retry.policy.enabled", False):
                conf.setBoolean("dfs.client.retry.policy.enabled", True)
                conf.set("dfs.client.retry.policy.spec", _RETRIES_OF_THE_PATIENT)
            _file_systems[key] = _jvm().org.apache.hadoop.fs.FileSystem.newInstance(uri, conf)
        return _file_systems[key]

    def _rename(self, part: Any) -> None:
        """Move a file to its place, replacing what is there; a reader finds the one or the other."""
        files, fs = self._files, _jvm().org.apache.hadoop.fs
        if self._scheme in _REPLACES_AT_ONCE:
            assert SparkContext._gateway is not None
            overwrite = SparkContext._gateway.new_array(getattr(fs, "Options$Rename"), 1)
            overwrite[0] = getattr(fs, "Options$Rename").OVERWRITE
            files.rename(part, self._path, overwrite)
            return
        if files.exists(self._path):
            files.delete(self._before, False)
            self._move(self._path, self._before)
        self._move(part, self._path)
        files.delete(self._before, False)

    def _move(self, one: Any, other: Any) -> None:
        if not self._files.rename(one, other):
            raise OSError(errno.EIO, "the file system did not rename it", str(one))

    @property
    def _before(self) -> Any:
        """Where the file is while another one takes its place; it stays there if the writer is killed."""
        folder, _, name = self._uri.rpartition("/")
        return _java_path(f"{folder}/.{name}{_BEFORE}")

    @property
    def _found(self) -> Any:
        """Where the file is to be read."""
        is_moved = not self._replaces_at_once and not self._files.exists(self._path)
        return self._before if is_moved and self._files.exists(self._before) else self._path

    @property
    def _replaces_at_once(self) -> bool:
        return self._scheme in _REPLACES_AT_ONCE | _WHOLE_AT_ONCE

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn exceptions of Java into those that Python raises for files."""
        try:
            yield
        except Py4JJavaError as error:
            thrown = error.java_exception
            kind = str(thrown.getClass().getName())
            said = str(thrown.getMessage() or kind).splitlines()[0]
            number = _error_number(kind, said)
            reason = os.strerror(number) if number in (errno.ENOENT, _number_in(said)) else said
            raise OSError(number, reason, self._uri) from error
        except Py4JError as error:
            raise OSError(errno.EIO, f"the driver's JVM does not answer: {error}", self._uri) from error


def _error_number(kind: str, said: str) -> int:
    """Return the number of an error of Java, by its class and the first line of its message.

    Java says `FileNotFoundException: PATH (Too many open files)` of any file that it could not open: what is
    there, and cannot be read now, must not count as what is not there.

    >>> errno.errorcode[_error_number("java.io.FileNotFoundException", "/a (Read-only file system)")]
    'EROFS'
    >>> errno.errorcode[_error_number("java.io.FileNotFoundException", "File does not exist: /a (1)")]
    'ENOENT'
    >>> full = "java.io.IOException: No space left on device"
    >>> errno.errorcode[_error_number("org.apache.hadoop.fs.FSError", full)]
    'ENOSPC'
    """
    return _number_in(said) or _ERRNO.get(kind, errno.EIO)


def _number_in(said: str) -> int | None:
    """Return the error of this machine whose words a message is, or has at its end: in brackets, or after
    the class of another error of Java.
    """
    words = said[said.rfind("(") + 1 : -1] if said.endswith(")") else said.rpartition("Exception: ")[2]
    return next((number for number in errno.errorcode if os.strerror(number) == words), None)


def _spooled(folder: Path, data: bytes) -> Path:
    """Write data to a file of this machine; return it."""
    with in_temporary_folder():
        spool = folder / "spool"
        spool.write_bytes(data)
        return spool


def _is_hidden(name: str) -> bool:
    return name.startswith(HIDDEN)


def _jvm() -> Any:
    if SparkContext._jvm is None:  # to ask needs the lock that is held while a context starts
        SparkContext._ensure_initialized()
    return SparkContext._jvm


def _java_path(uri: str) -> Any:
    return _jvm().org.apache.hadoop.fs.Path(uri)


def hadoop_configuration() -> Any:
    """Return a copy of the session's, or what a session would have, with spark.hadoop.* in it."""
    jvm, context = _jvm(), SparkContext._active_spark_context
    started = getattr(context, "_jsc", None)  # while a context starts, it is there without one
    if started is not None:
        return jvm.org.apache.hadoop.conf.Configuration(started.hadoopConfiguration())
    spark_util = jvm.org.apache.spark.deploy.SparkHadoopUtil
    return spark_util.get().newConfiguration(jvm.org.apache.spark.SparkConf())
