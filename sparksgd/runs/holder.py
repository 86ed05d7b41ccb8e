"""Who drives a run: a process of a machine, or an attempt of an application of YARN.

The process is written down in full (see storage/processes.py), so that another one is not taken for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sparksgd.storage.processes import Process, this_process

__all__ = ["Holder", "attempt_here"]

_CONTAINER = re.compile(r"container_(?:e[0-9]+_)?([0-9]+_[0-9]+)_([0-9]+)_[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Holder(Process):
    """A run, and the process that drives it."""

    run_id: str

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
        application, attempt = attempt_here(environment) or (None, None)
        return cls(
            **asdict(this_process()),
            run_id=run_id,
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
        if self.is_gone_seen_from(other):
            return "its process is gone"
        return None


def attempt_here(environment: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Return the application of YARN and its attempt, from 1, that this process belongs to; None: to none.

    >>> attempt_here({"CONTAINER_ID": "container_e17_1410901177871_0001_02_000001"})
    ('application_1410901177871_0001', 2)
    """
    found = _CONTAINER.fullmatch(environment.get("CONTAINER_ID", ""))
    return None if found is None else (f"application_{found[1]}", int(found[2]))
