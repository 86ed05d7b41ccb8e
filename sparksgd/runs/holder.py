"""Who drives a run: a process of a machine, or an attempt of an application of YARN.

What another holder can be told from is written down in full, so that a process of another container, or one
that got the number of a process that is gone, is not taken for it.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Holder"]

_CONTAINER = re.compile(r"container_(?:e[0-9]+_)?([0-9]+_[0-9]+)_([0-9]+)_[0-9]+")
_ENDED = "ZXx"
"""States of processes that have ended, but are not forgotten yet."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A run, and the process that drives it."""

    run_id: str
    host: str
    pid: int

    started: str | None
    """When the process started, in clock ticks since the machine did; None where /proc is absent."""

    boot_id: str | None
    """Names the machine since it started."""

    pid_namespace: str | None
    """Names the table that `pid` is of: each container has its own."""

    application: str | None = None
    """YARN's application, if the process runs in a container of it."""

    attempt: int | None = None
    """Which attempt of the application, from 1."""

    @classmethod
    def here(cls, run_id: str, environment: Mapping[str, str] = os.environ) -> Holder:
        """Return a run that this process drives.

        Args:
            run_id: names the run.
            environment: in CONTAINER_ID YARN names the container.
        """
        pid = os.getpid()
        application, attempt = _application(environment.get("CONTAINER_ID", ""))
        return cls(
            run_id=run_id,
            host=socket.gethostname(),
            pid=pid,
            started=_state_and_start(pid)[1],
            boot_id=_read(Path("/proc/sys/kernel/random/boot_id")),
            pid_namespace=_link(Path("/proc/self/ns/pid")),
            application=application,
            attempt=attempt,
        )

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.pid} on {self.host})"

    def end_seen_from(self, other: Holder) -> str | None:
        """Return why it certainly drives its run no longer, as a holder of this process sees it; or None."""
        if self.application is not None and self.application == other.application:
            assert self.attempt is not None
            assert other.attempt is not None
            if self.attempt < other.attempt:
                return f"this is a later attempt of {self.application}"
        machine = (self.host, self.boot_id, self.pid_namespace)
        if machine == (other.host, other.boot_id, other.pid_namespace) and self._is_gone():
            return "its process is gone"
        return None

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


def _application(container: str) -> tuple[str | None, int | None]:
    """Return the application and the attempt that a container belongs to.

    >>> _application("container_e17_1410901177871_0001_02_000001")
    ('application_1410901177871_0001', 2)
    """
    found = _CONTAINER.fullmatch(container)
    return (None, None) if found is None else (f"application_{found[1]}", int(found[2]))


def _state_and_start(pid: int) -> tuple[str, str | None]:
    """Return the state of a process, and when it started; nothing where /proc does not say."""
    words = (_read(Path(f"/proc/{pid}/stat")) or "").rpartition(")")[2].split()
    return (words[0], words[19]) if len(words) > 19 else ("", None)  # fields 3 and 22


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
