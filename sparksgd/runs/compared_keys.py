"""Which keys of a configuration may differ between a run and the one that goes on from it."""

from __future__ import annotations

from sparksgd.config import Config

__all__ = ["PATHS", "free_keys"]

PATHS = frozenset(("data.train", "data.test"))
"""Keys that are not compared: fingerprints identify the files, whatever their path."""

_FREE = frozenset(("train.epochs", "train.steps", "data.test"))


def free_keys(config: Config) -> frozenset[str]:
    """Return the keys that may change where a run goes on: they shape no step that was made."""
    return _FREE - {"data.test"} if config.is_judged else _FREE
