"""What an executor says of itself: what its Python lacks, its CPU, disks and memory, and its environment.

An executor may lack sparksgd.  So this module travels by value: it imports the standard library alone, and
its answers are plain values.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["free_bytes", "local_folders", "look", "nothing", "survey"]

_PARENTS = 4


def look(
    names: Iterable[str], held_by: str, asks_cpu: bool, walks: bool, partition: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """Yield the fields of an `ExecutorPython`.

    Args:
        names: modules that must be there; none of them is imported.
        held_by: the environment variable that restricts torch to an instruction set.
        asks_cpu: whether the CPU's flags are wanted, even if that variable is not set.
        walks: whether all files of an unpacked environment are looked at.
        partition: nothing of use.
    """
    list(partition)
    held = os.environ.get(held_by)
    yield {
        "host": os.environ.get("NM_HOST") or socket.gethostname(),  # YARN's name of this node
        "executable": sys.executable,
        "missing": tuple(name for name in names if not _is_there(name)),
        "version": _own_version(),
        "held": held,
        "architecture": platform.machine(),
        "cpuinfo": _lines_of_flags() if asks_cpu or held else "",
        "unpacked": _unpacked() if walks else None,
    }


def survey(
    names: Iterable[str], held_by: str, packages: Iterable[str], partition: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """Yield what `look` says, and the facts of the executor around it.

    Args:
        names: as for `look`.
        held_by: as for `look`.
        packages: whose versions are wanted; none of them is imported.
        partition: nothing of use.
    """
    (python,) = look(names, held_by, True, False, partition)
    yield {
        "python": python,
        "process": (process := _executor()),
        "java": _java(process),
        "python_version": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": dict(free_bytes(())),
    }


def local_folders() -> list[str]:
    """Return this executor's local directories of Spark."""
    return os.environ.get("SPARK_LOCAL_DIRS", tempfile.gettempdir()).split(",")


def free_bytes(_: Iterable[int]) -> Iterator[tuple[str, int]]:
    """Task: yield each disk with local directories of this executor, and its free bytes."""
    for folder in local_folders():
        yield f"{socket.gethostname()}:{Path(folder).stat().st_dev}", shutil.disk_usage(folder).free


def nothing(partition: Iterable[int]) -> Iterator[int]:
    """Yield nothing: the task of an empty job."""
    list(partition)
    return iter(())


def _executor() -> int:
    """Return the process of the JVM that this worker belongs to; between them may be Python's daemon."""
    process = os.getppid()
    for _ in range(_PARENTS):
        try:
            name, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
        except OSError:
            break
        if name.endswith("(java"):
            return process
        process = int(rest.split()[1])
    return os.getppid()


def _java(process: int) -> str | None:
    """Return the version of the Java that a process runs; None if its files cannot be read."""
    try:
        home = Path(f"/proc/{process}/exe").resolve(strict=True).parents[1]
        release = (home / "release").read_text(errors="replace")
    except (OSError, IndexError):
        return None
    found = re.search(r'^JAVA_VERSION="(.+)"', release, re.MULTILINE)
    return found and found[1]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def _own_version() -> str | None:
    try:
        return str(importlib.import_module("sparksgd").__version__)
    except Exception:
        return None


def _lines_of_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join({line for line in text.splitlines() if line.startswith("flags")})  # few cores differ


def _unpacked() -> tuple[int, int, float, float] | None:
    """Return where an environment was unpacked into the executor's own folder, and when; None if none was.

    Returns:
        Device and inode of its folder, and when its first and its last file were written, seconds since the
        epoch.
    """
    prefix = Path(sys.prefix)
    if not prefix.is_relative_to(Path.cwd()):
        return None
    top = prefix.resolve()
    # Unpacking restores the modification time of the archive, but it cannot set this time.
    written_s = [entry.lstat().st_ctime for entry in _files(top)]
    status = top.stat()
    return status.st_dev, status.st_ino, min(written_s), max(written_s)


def _files(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name != "__pycache__"]  # Python adds files to it later
        yield from (Path(folder, name) for name in names)
