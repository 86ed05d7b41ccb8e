"""Keys of a section: of the experiment, or of the cluster."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["arguments", "cluster_key", "experiment_key"]


def experiment_key(default: Any) -> Any:
    """Return the field of a key that changes the bits of the trained parameters."""
    return dataclasses.field(default=default, metadata={"scope": "experiment"})


def cluster_key(default: Any) -> Any:
    """Return the field of a key that does not."""
    return dataclasses.field(default=default, metadata={"scope": "cluster"})


def arguments() -> Any:
    """Return the field of all keys that a section passes on."""
    return dataclasses.field(default_factory=dict, metadata={"scope": "experiment"})
