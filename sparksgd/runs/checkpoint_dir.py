"""Checkpoints of many runs in one folder, as of a cross-validation: each run has a subfolder of its own.

A subfolder is named by what shapes a run's parameters, and by how many turns it makes: runs that differ in
their ends alone may train at the same time.  The longer one begins where the shorter one is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Self

from sparksgd.config import Config
from sparksgd.errors import DataError
from sparksgd.runs.checkpoints import CheckpointFolder, Manifest, manifests, of_this
from sparksgd.runs.compared_keys import PATHS, free_keys
from sparksgd.runs.holder import Holder
from sparksgd.runs.json_files import digest_of
from sparksgd.runs.lease import Lease, unwritable
from sparksgd.storage import Location, remove_parts
from sparksgd.training.checkpoint import Checkpoint, RunIdentity, Start

__all__ = ["CheckpointFolders"]

_STOPPED: dict[str, str] = {}
"""{subfolder that a module leads to, as a run of this process left it: name of that run's subfolder}."""


class CheckpointFolders:
    """The checkpoints of many runs in one folder; each run has a subfolder, named by what it is of.

    A context manager: from `begin` to the end of its block, no other run writes to that subfolder.

    Args:
        folder: of all of them.
        config: of this run.
        fingerprints: of its files and code.
    """

    def __init__(self, folder: Location, config: Config, fingerprints: Mapping[str, str]) -> None:
        self._leases = ExitStack()
        self._folder, self._config, self._fingerprints = folder, config, fingerprints
        self._run: RunIdentity | None = None
        self._own: CheckpointFolder | None = None

    def begin(self, run: RunIdentity) -> Start | None:
        """Return the checkpoint that the run goes on from; None: it begins anew.

        Raises:
            ConfigError: another training of the same run holds its subfolder; or the run is not finished,
                and nothing can be written there.
            ClusterError: its file system does not answer.
        """
        self._run = run
        folder = self._subfolder(run)
        lease, unwritten = Lease(folder, Holder.here(folder.name), called="checkpoint_dir"), None
        try:
            self._leases.enter_context(lease.held())
            remove_parts(folder)
            place = folder.guarded(lease.check)
        except OSError as error:
            place, unwritten = folder, error  # a finished run can be read there
        about = {"run_id": folder.name, "config": self._config.to_dict(), "fingerprints": self._fingerprints}
        try:
            self._own = CheckpointFolder(place, about, self._starts_of(place, run), called="checkpoint_dir")
        except OSError as error:
            raise unwritable(folder, error, "checkpoint_dir") from error
        start = self._own.begin(run)
        if unwritten is not None and (start is None or start.checkpoint.turns < run.total_turns):
            raise unwritable(folder, unwritten, "checkpoint_dir") from unwritten
        return start

    def _subfolder(self, run: RunIdentity) -> Location:
        own = self._place_of(run)
        if (stopped := _STOPPED.get(str(own))) is not None:
            with suppress(OSError):  # it was removed
                if (self._folder / stopped).names_of("checkpoint-*.json"):
                    return self._folder / stopped
        return own

    def _starts_of(self, own: Location, run: RunIdentity) -> list[Manifest]:
        """Return the checkpoints that the run may go on from: its own, or those of one with another end.

        Runs that differ in their ends have folders of their own, because they may train at the same time.
        """
        free = free_keys(self._config)
        found = of_this(manifests(own, "checkpoint_dir"), self._config, self._fingerprints, free=free)
        if found:
            return found
        others = []
        for name in self._folder.names():
            if re.fullmatch(rf"{self._name_of(run)}(-[0-9]+)?", name):
                with suppress(DataError):  # none is whole
                    others += manifests(self._folder / name, "checkpoint_dir")
        others = of_this(others, self._config, self._fingerprints, free=free)
        within = [one for one in others if one.turns <= run.total_turns]
        return sorted(within, key=lambda one: one.step, reverse=True)

    def _place_of(self, run: RunIdentity) -> Location:
        return self._folder / f"{self._name_of(run)}-{run.total_turns}"

    def _name_of(self, run: RunIdentity) -> str:
        free = free_keys(self._config)
        shaping = {key: value for key, value in run.experiment.items() if key not in free | PATHS}
        identity: dict[str, Any] = {
            "experiment": shaping,
            "files": {key: digest for key, digest in self._fingerprints.items() if key not in free},
            "data_digest": run.data_digest,
            "module": run.module if run.parameters is not None else None,  # of a named one a resume tells
            "parameters": run.parameters,
        }
        if "data.test" not in free:
            identity["test_digest"] = run.test_digest
        if run.attributes is not None and run.parameters is not None:  # most modules have none
            identity["attributes"] = run.attributes
        if run.settings:  # a run that sets none has the name that it always had
            identity["settings"] = dict(run.settings)
        return digest_of(identity)[:16]

    def stopped(self, parameters: str | None) -> None:
        """Let a training of the module that this run has left go on from this run's checkpoints.

        Args:
            parameters: digest of those of the module; None: the run is finished, and the next one is another.
        """
        if self._run is None or self._own is None:
            return
        for before in [left for left, own in _STOPPED.items() if own == self._own.folder.name]:
            del _STOPPED[before]
        if parameters is not None:
            left = self._place_of(replace(self._run, parameters=parameters))
            _STOPPED[str(left)] = self._own.folder.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failed: object) -> None:
        self._leases.close()

    def write(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, and remove those that are not kept; return its name."""
        return self._of_run.write(checkpoint)

    def read(self, name: str) -> Checkpoint:
        """Read a checkpoint as a later run would."""
        return self._of_run.read(name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""
        self._of_run.remove(name)

    @property
    def _of_run(self) -> CheckpointFolder:
        assert self._own is not None, "begin comes first"
        return self._own
