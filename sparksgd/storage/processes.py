"""Which process something belongs to, and whether it is certain that this process has ended.

A number alone says little: another process gets it later, and each container counts for itself.  So a process
is written down in full.  Nothing is said of processes of other machines, or of other containers.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "is_mentioned", "starter", "this_process"]

_ENDED = "ZXx"
"""States of processes that have ended, but are not forgotten yet."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of a machine."""

    host: str
    pid: int

    started: str | None
    """When the process started, in clock ticks since the machine did; None where /proc is absent."""

    boot_id: str | None
    """Names the machine since it started."""

    pid_namespace: str | None
    """Names the table that `pid` is of: each container has its own."""

    def is_beside(self, other: Process) -> bool:
        """Return whether both are of one machine, and of one table of processes."""
        table = (self.host, self.boot_id, self.pid_namespace)
        return table == (other.host, other.boot_id, other.pid_namespace)

    def is_gone_seen_from(self, here: Process) -> bool:
        """Return whether it has certainly ended, as this process sees it."""
        return self.is_beside(here) and self._is_gone()

    def _is_gone(self) -> bool:
        """Return whether this machine has no such process."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass  # it is another user's
        state, started = _state_and_start(self.pid)
        if self.started is None or started is None:  # there is no /proc, or it hides other users' processes
            return False
        return started != self.started or state in _ENDED


def this_process() -> Process:
    """Return the process that calls."""
    return _process(os.getpid())


def starter() -> Process | None:
    """Return the nearest process above this one that runs another program; None where /proc does not say.

    Above a Python worker of Spark that is the executor: its daemon, in between, runs the same Python.
    """
    own, pid = _link(Path("/proc/self/exe")), os.getpid()
    while own is not None and pid > 1:
        pid = _parent(pid)
        program = _link(Path(f"/proc/{pid}/exe"))
        if program is None:
            break
        if program != own:
            return _process(pid)
    return None


def is_mentioned(word: str) -> bool:
    """Return whether a command line of this machine has this word somewhere; True where /proc is absent."""
    try:
        numbers = [name for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  # as elsewhere
    except OSError:
        return True
    return not numbers or any(word in (_read(Path(f"/proc/{number}/cmdline")) or "") for number in numbers)


def _process(pid: int) -> Process:
    return Process(
        host=socket.gethostname(),
        pid=pid,
        started=_state_and_start(pid)[1],
        boot_id=_read(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_link(Path("/proc/self/ns/pid")),
    )


def _fields(pid: int) -> list[str]:
    """Return the fields of a process's state, from the third on; none where /proc does not say."""
    return (_read(Path(f"/proc/{pid}/stat")) or "").rpartition(")")[2].split()


def _state_and_start(pid: int) -> tuple[str, str | None]:
    """Return the state of a process, and when it started; nothing where /proc does not say."""
    fields = _fields(pid)
    return (fields[0], fields[19]) if len(fields) > 19 else ("", None)  # fields 3 and 22


def _parent(pid: int) -> int:
    """Return the process that started another one; 0 where /proc does not say."""
    fields = _fields(pid)
    return int(fields[1]) if len(fields) > 1 else 0


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _link(file: Path) -> str | None:
    try:
        return str(file.readlink())
    except OSError:
        return None
