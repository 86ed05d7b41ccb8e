"""Runs a command, and lets nothing that it starts outlive it, or the process that wants it.

    python keeper.py PARENT COMMAND...

PARENT is the process id of who starts this: when it dies, however it dies, or when this process is
told to end (SIGTERM), the command and all its descendants are killed, those too that have made
sessions of their own, as YARN's containers do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _descendants() -> list[int]:
    """Return all processes below this one; orphans among them are its children."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208  # pathlib would cost more time
        try:
            with open(f"/proc/{name}/stat") as stat:  # noqa: PTH123  # as above
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(name))
    found, below = [], [os.getpid()]
    while below:
        more = children.get(below.pop(), [])
        found += more
        below += more
    return found


def _kill_all() -> None:
    """Kill until there is no child; what is forked meanwhile falls to this process, and is killed next."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
            time.sleep(0.01)  # killed processes take a moment to go


def main(parent: int, command: list[str]) -> int:
    """Run the command; return its status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before it could be asked to tell
        return 1
    try:
        child = subprocess.Popen(command, preexec_fn=_die_with_parent)
        while True:
            pid, status = os.wait()
            if pid == child.pid:
                return os.waitstatus_to_exitcode(status) & 0xFF
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_all()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
