"""Which keys of a configuration may differ between a run and the one that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparksgd.config import Config
from sparksgd.imports import shown
from sparksgd.solvers.rules import completed

__all__ = ["PATHS", "differences", "free_keys"]

PATHS = frozenset(("data.train", "data.test"))
"""Keys that are not compared: fingerprints identify the files, whatever their path."""

_GIVEN = frozenset(("module", "loss"))
"""Keys of the fingerprints of what was given in Python, not by a name."""

_FREE = frozenset(("train.epochs", "train.steps", "data.test"))


def free_keys(config: Config) -> frozenset[str]:
    """Return the keys that may change where a run goes on: they shape no step that was made."""
    return _FREE - {"data.test"} if config.is_judged else _FREE


def differences(
    then: Mapping[str, Any],
    config: Config,
    fingerprints: Mapping[str, str],
    *,
    free: frozenset[str] = frozenset(),
) -> list[str]:
    """Return how an earlier run is of something else, as sentences.

    Args:
        then: its config and fingerprints.
        config: of the run that is to begin.
        fingerprints: of that run.
        free: keys that may differ.
    """
    then_config = Config.from_dict(then["config"])
    if then_config.solver.name == config.solver.name:  # else its rule may be code that nobody trusts
        then_config = completed(then_config)
    was, now = then_config.experiment(), completed(config).experiment()
    files = then["fingerprints"]
    found = [
        f"{key} is {shown(now.get(key))}, but was {shown(was.get(key))}"
        for key in sorted((was.keys() | now.keys()) - PATHS - free)
        if was.get(key) != now.get(key)
    ]
    unknown = _GIVEN - (files.keys() & fingerprints.keys())  # to the version before, or of torch alone
    for key in sorted((files.keys() | fingerprints.keys()) - free - unknown):
        if files.get(key) != fingerprints.get(key):
            if key in PATHS:
                found.append(f"the files of {key} are different ones, or were changed since ({now.get(key)})")
            elif key in _GIVEN:
                found.append(f"the code of the {key} that was given in Python was changed since")
            elif key in now:
                if now[key] == was.get(key):  # else the difference is named already
                    found.append(f"the code of {key} was changed since ({now[key]})")
            else:
                found.append("only one of the two is a replay, or they replay different runs")
    return found
