"""Which keys of a configuration may differ between a run and the one that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PATHS", "free_keys"]

PATHS = frozenset(("data.train", "data.test"))
"""Keys that are not compared: fingerprints identify the files, whatever their path."""

_FREE = frozenset(("train.epochs", "train.steps", "data.test"))


def free_keys(experiment: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys that may change where a run goes on: they shape no step that was made.

    Args:
        experiment: as `Config.experiment` returns it.
    """
    return _FREE - {"data.test"} if "early_stopping.patience" in experiment else _FREE
