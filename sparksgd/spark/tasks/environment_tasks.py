"""What an executor's Python knows of the environment that it runs from."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["UnpackedEnvironment", "look"]


@dataclass(frozen=True)
class UnpackedEnvironment:
    """An environment that was unpacked from an archive, on one host."""

    host: str

    place: tuple[int, int]
    """Device and inode of its folder; if they differ on one host, there are two copies."""

    first_s: float
    last_s: float
    """When its first and its last file were written, seconds since the epoch."""


def look(partition: Iterable[int]) -> Iterator[UnpackedEnvironment]:
    """Yield the environment of this Python, if it was unpacked into the executor's own folder."""
    list(partition)
    prefix = Path(sys.prefix)
    if prefix.is_relative_to(Path.cwd()):
        top = prefix.resolve()
        # Unpacking restores the modification time of the archive, but it cannot set this time.
        written_s = [entry.lstat().st_ctime for entry in _files(top)]
        status = top.stat()
        host = os.environ.get("NM_HOST") or socket.gethostname()  # YARN's name of this node
        yield UnpackedEnvironment(host, (status.st_dev, status.st_ino), min(written_s), max(written_s))


def _files(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name != "__pycache__"]  # Python adds files to it later
        yield from (Path(folder, name) for name in names)
