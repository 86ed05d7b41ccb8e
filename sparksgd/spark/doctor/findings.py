"""Findings: what a look saw, whether that is good, and what mends it.

pass   it was seen, and it is good
warn   a run goes on with it, but slower, or with other bits than elsewhere
fail   a run would be refused, or would end by it
skip   it was not seen, and why
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparksgd.errors import PeerLost, SparkSGDError
from sparksgd.spark.cluster.failures import gist

__all__ = ["Finding", "Status", "bad", "broken", "good", "poor", "unseen"]

Status = Literal["pass", "warn", "fail", "skip"]

_LONGEST = 400


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
        error: a refusal of ours says after its first colon what to do; of any other error one line is told.
        fix: what to do about the others.
    """
    if isinstance(error, SparkSGDError) and not isinstance(error, PeerLost):
        seen, _, advice = _one_line(str(error)).partition(": ")
        return bad(name, seen, advice or fix)
    told = gist(str(error)) if str(error) else "no message"
    if not isinstance(error, PeerLost):
        told = f"{type(error).__name__}: {told}"
    return bad(name, _one_line(told), fix)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
