"""What an executor's Python says of itself: what it lacks, its CPU, and the environment that it runs from.

An executor may lack sparksgd.  So this module travels by value: it imports the standard library alone, and
its answers are plain values.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["look"]


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
