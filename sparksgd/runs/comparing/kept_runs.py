"""Makes each run once, and keeps it: OUT/runs/DIGEST.

The digest is of the full configuration, the rows, the user's code, and the versions of sparksgd and torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

import sparksgd
from sparksgd.config import Config
from sparksgd.errors import ConfigError, NotFinite
from sparksgd.runs.comparing.outcomes import Outcome, read_outcome
from sparksgd.runs.fingerprints import fingerprints_of
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.json_files import read_record
from sparksgd.runs.names import SUMMARY
from sparksgd.storage import Location
from sparksgd.training.in_process import train_in_process

__all__ = ["KeptRuns"]

log = logging.getLogger("sparksgd")

_OVER = ("finished", "NotFinite", "UpdateNotFinite")


class KeptRuns:
    """Gives what runs gave; makes those that were not made yet.

    Args:
        folder: holds a folder for each.
    """

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._fingerprints: Mapping[str, str] | None = None
        self._read: dict[str, Outcome] = {}
        self.made = 0
        """How many runs were made."""

    def outcome(self, config: Config) -> Outcome:
        """Return what a run gives; make it, if no folder has it.

        Args:
            config: with every key of its rule; engine.name must be "simulated".

        Raises:
            SparkSGDError: the run failed otherwise than by values that are not finite.
        """
        name = self.name_of(config)
        if name not in self._read:
            folder = self._folder / name
            if not _is_over(folder):
                self._make(config, folder)
            self._read[name] = _outcome(folder)
        return self._read[name]

    def name_of(self, config: Config) -> str:
        """Return the name of a run's folder: a digest of all that its result depends on.

        Raises:
            DataError: the rows are missing, or cannot be read.
            ClusterError: their file system does not answer.
        """
        if self._fingerprints is None:  # all runs have the same rows and code
            self._fingerprints = fingerprints_of(config)
        versions = {"sparksgd": sparksgd.__version__, "torch": str(torch.__version__)}
        text = json.dumps([config.to_dict(), self._fingerprints, versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _make(self, config: Config, folder: Location) -> None:
        assert config.data.train is not None
        run = RunFolder(folder, self._fingerprints, called="the folder of a run")
        with run.held(), _without_ordinary_lines():
            run.require_writable()
            try:
                train_in_process(config, config.data.train, observers=[run])
            except NotFinite:
                if not _is_over(folder):  # before the first step: that is no divergence
                    raise
        self.made += 1


@contextmanager
def _without_ordinary_lines() -> Iterator[None]:
    """Let the log have warnings only: hundreds of runs would fill it."""
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)


def _is_over(folder: Location) -> bool:
    """Return whether a folder has a run that was made to its end, or diverged."""
    try:
        return read_record(folder / SUMMARY)["status"] in _OVER
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _outcome(folder: Location) -> Outcome:
    try:
        return read_outcome(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{folder} has a summary, but its other files cannot be read ({type(error).__name__}: {error}): "
            f"remove the folder, and the run is made again"
        ) from error
