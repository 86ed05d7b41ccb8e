"""Leases of runs on machines of their own, whose time is virtual."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.storage import LocalLocation, Location


class Time:
    """Seconds that pass only while somebody sleeps; what is due happens meanwhile."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, Callable[[], object]]] = []

    def at(self, *seconds: float, do: Callable[[], object]) -> None:
        self._due += [(second, do) for second in seconds]

    def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s
        now = [(second, do) for second, do in self._due if second <= self.now_s]
        self._due = [(second, do) for second, do in self._due if second > self.now_s]
        for _, do in now:
            do()


def holder(name: str, **other: Any) -> Holder:
    """Return the holder of a run on a machine of its own."""
    values = {"host": f"{name}-host", "pid": 17, "started": "1", "boot_id": name, "pid_namespace": "pid:[1]"}
    return Holder(run_id=name, **(values | other))


def lease(
    folder: Path | Location, name: str, time: Time | None = None, called: str = "out", **other: Any
) -> Lease:
    place, time = (LocalLocation(folder) if isinstance(folder, Path) else folder), time or Time()
    return Lease(place, holder(name, **other), called=called, clock=lambda: time.now_s, sleep=time.sleep)


def taken(folder: Path | Location, name: str, time: Time | None = None, **other: Any) -> Lease:
    """Return a lease that was taken at once."""
    time = time or Time()
    begun_s, one = time.now_s, lease(folder, name, time, **other)
    one.take()
    assert time.now_s == begun_s
    return one


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def said(folder: Path, number: int) -> dict[str, Any]:
    return dict(json.loads((folder / f".lease-{number:06d}.json").read_text()))


def on_this_machine(pid: int, name: str = "one", **other: Any) -> dict[str, Any]:
    """Return what makes a holder one of this machine."""
    here = Holder.here(name)
    values = {"host": here.host, "boot_id": here.boot_id, "pid_namespace": here.pid_namespace}
    return values | {"pid": pid, "started": "1"} | other
