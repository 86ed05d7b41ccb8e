"""What an own optimiser or schedule keeps, as bytes in checkpoints: of which packages its classes may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparksgd.arithmetic.believed import check_believed, only_classes_of
from sparksgd.config import Config
from sparksgd.imports.trust import trusted
from sparksgd.training.encoding import bytes_in

__all__ = ["check_own_state", "packages_of"]


def packages_of(config: Config) -> frozenset[str]:
    """Return the packages of the user's own optimiser and schedule, and those that are trusted anyway."""
    names = (config.optimizer.name, config.schedule.name or "")
    named = {name.partition(":")[0].partition(".")[0] for name in names if ":" in name}
    return trusted(named, where="a checkpoint").packages


def check_own_state(parts: Mapping[str, Any], config: Config) -> None:
    """Refuse what an own optimiser or schedule keeps, if no run could make it again.

    Args:
        parts: the values of a checkpoint's parts, as they are saved.
        config: names the optimiser and the schedule.

    Raises:
        NotBelieved: it keeps an object of another package than its own.
    """
    with only_classes_of(packages_of(config)):
        for name in ("solver", "shards"):
            for kept in bytes_in(parts.get(name)):
                check_believed(kept)
