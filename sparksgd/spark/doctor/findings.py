"""Findings: what a look saw, whether that is good, and what mends it.

pass   it was seen, and it is good
warn   a run goes on with it, but slower, or with other bits than elsewhere
fail   a run would be refused, or would end by it
skip   it was not seen, and why
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sparksgd.errors import PeerLost, SparkSGDError
from sparksgd.spark.cluster.failures import gist

__all__ = ["Finding", "Status", "bad", "broken", "good", "parted", "poor", "unseen"]

Status = Literal["pass", "warn", "fail", "skip"]

_LONGEST = 400
_MENDS = (
    "add", "ask", "bring", "build", "call", "cast", "choose", "compute", "copy", "derive", "draw", "evaluate",
    "find out", "freeze", "free", "give", "install", "keep", "leave", "let", "load", "look", "lower", "make",
    "mend", "move", "name", "open", "pass", "pip install", "put", "raise", "read", "register", "remove",
    "rename", "restore", "return", "run", "save", "script", "see", "set", "ship", "start", "submit", "train",
    "trust", "unset", "use", "wait", "write", "`make dist`",
)  # fmt: skip
"""How clauses of our errors begin that say what to do."""
_ADVICE = re.compile(rf"(?:: |; |\. )(?=(?:or )?(?:{'|'.join(_MENDS)})(?: |$))", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's."""

    name: str
    """What was looked at."""

    status: Status

    seen: str
    """What was seen, with units; of "skip": why nothing was."""

    fix: str = ""
    """What mends it; nothing where there is nothing to mend."""

    def __post_init__(self) -> None:
        assert self.fix or self.status in ("pass", "skip"), f"nobody says what mends {self}"


def good(name: str, seen: str) -> Finding:
    """Return a finding of something that is as it should be."""
    return Finding(name=name, status="pass", seen=seen)


def poor(name: str, seen: str, fix: str) -> Finding:
    """Return a finding of something that a run goes on with."""
    return Finding(name=name, status="warn", seen=seen, fix=fix)


def bad(name: str, seen: str, fix: str) -> Finding:
    """Return a finding of something that ends a run."""
    return Finding(name=name, status="fail", seen=seen, fix=fix)


def unseen(name: str, why: str) -> Finding:
    """Return a finding of something that was not looked at."""
    return Finding(name=name, status="skip", seen=why)


def broken(name: str, error: BaseException, fix: str) -> Finding:
    """Return the finding of an error.

    Args:
        name: what was looked at.
        error: most refusals of ours end with what to do; of any other error one line is told.
        fix: what to do about those that do not say it.
    """
    if isinstance(error, SparkSGDError) and not isinstance(error, PeerLost):
        seen, advice = parted(str(error))
        return bad(name, seen, advice or fix)
    told = gist(str(error)) if str(error) else "no message"
    if not isinstance(error, PeerLost):
        told = f"{type(error).__name__}: {told}"
    return bad(name, _one_line(told), fix)


def parted(text: str) -> tuple[str, str]:
    """Return what an error or a warning of ours says was seen, and what it says to do; "" if it does not.

    >>> parted("train.threads is 3, but spark.task.cpus is 1: set train.threads=1")
    ('train.threads is 3, but spark.task.cpus is 1', 'set train.threads=1')
    >>> parted("cannot read /nope: it does not exist")
    ('cannot read /nope: it does not exist', '')
    """
    line = " ".join(text.split())
    found = _ADVICE.search(line)
    if found is None:
        return _one_line(line), ""
    return _one_line(line[: found.start()]), _one_line(line[found.end() :])


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
