"""What a job asks of its output folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparksgd.config import Config

__all__ = ["Asked", "IfExists"]

IfExists = Literal["skip", "fail", "overwrite", "archive"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be trained, and what may become of what is there."""

    config: Config

    fingerprints: Mapping[str, str]
    """Of the data files, of the user's code and of the replayed run, if there is one, by the key that names
    it."""

    if_exists: IfExists = "skip"

    resume: str = "auto"
    """auto, never, must, or the folder of a run."""

    attempt: tuple[str, int] | None = None
    """YARN's application that asks, and which attempt of it, if it is one."""
