"""Checkpoints in a folder: files of unique names, and for each checkpoint a manifest, which is written last.

checkpoint-00000500-1f0c9a2b.solver.pt      a part, for torch.load(weights_only=True)
checkpoint-00000100-5e1f0a77.constants.pt   likewise; the same in a whole run, so later manifests name it, too
checkpoint-00000500-1f0c9a2b.json           the manifest: sizes and digests of the parts, and what they are of

What lacks a manifest, or differs from it, does not exist: it is half of something that a killed run began to
write.  So no file system must be able to do more at once than to write that one small file.

On a disk of this machine each file, and then its name, is on the disk before the next one is begun: first
the lines of metrics and trace that belong to the checkpoint, then the parts, then the manifest; older
checkpoints are removed last.  So a loss of power costs no more than a killed process.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError, SparkSGDError
from sparksgd.runs.checked_files import FileEntry, checked_bytes, read_checked, write_checked
from sparksgd.runs.compared_keys import differences
from sparksgd.runs.json_files import digest_of, finite, read_json, write_json
from sparksgd.storage import Location, unanswered
from sparksgd.training.checkpoint import Checkpoint, Part, RunIdentity, Start
from sparksgd.training.state import Resumed

__all__ = [
    "CheckpointFolder",
    "Manifest",
    "manifests",
    "of_this",
    "trained_anew",
]

log = logging.getLogger("sparksgd")

_ANEW = {
    "--out": "train anew with --resume never, in another --out or with --if-exists overwrite",
    "out": "train anew without resume_from, in this out or another",
    "checkpoint_dir": "train anew with another checkpoint_dir, or with none",
    "--resume": "train anew without --resume",
    "resume_from": "train anew without resume_from",
}
"""By how errors call a run's folder.  Another --out alone would go on from --resume FOLDER, too."""

_FORMAT = 1
_MANIFEST = re.compile(r"(checkpoint-\d{8,}-[0-9a-f]{8})\.json")
_FILE = re.compile(r"(checkpoint-\d{8,}-[0-9a-f]{8})\..*")
_KEYS = {
    "format": int,
    "step": int,
    "turns": int,
    "total_turns": int,
    "turns_per_epoch": int,
    "written_at": str,
    "run_id": str,
    "config": dict,
    "fingerprints": dict,
    "data_digest": str,
    "parts": dict,
    "sha256": str,
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says."""

    folder: Location
    """Where it lies."""

    name: str
    """Of the checkpoint: what the names of its files begin with."""

    values: Mapping[str, Any]
    """Its keys."""

    entries: Mapping[str, FileEntry]
    """The file of each part."""

    versions: Mapping[str, int]
    """The version of each part."""

    @property
    def step(self) -> int:
        """Return the step that it is of."""
        return int(self.values["step"])

    @property
    def turns(self) -> int:
        """Return how many turns each shard had made."""
        return int(self.values["turns"])

    @property
    def test_loss(self) -> float | None:
        """Return the loss of an evaluation of this step, if there was one."""
        loss = self.values.get("test_loss")
        return loss if isinstance(loss, float) else None

    @classmethod
    def read(cls, folder: Location, name: str) -> Self:
        """Read a manifest.

        Raises:
            DataError: it is none of this version, or damaged.
            ClusterError: its file system does not answer.
        """
        where = f"{folder}/{name}.json"
        try:
            values = read_json(folder / f"{name}.json")
        except OSError as error:
            raise unanswered(error, DataError(f"{where} cannot be read: {error.strerror}")) from error
        except ValueError as error:
            raise DataError(f"{where} is no manifest of a checkpoint: {error}") from error
        if not isinstance(values, dict) or values.get("sha256") != digest_of(values):
            raise DataError(f"{where} is damaged: its digest is another")
        for key, kind in _KEYS.items():
            if type(values.get(key)) is not kind:
                raise DataError(f"{where}: {key} is {values.get(key)!r}, but must be {kind.__name__}")
        if values["format"] != _FORMAT:
            raise DataError(
                f"{where} is of format {values['format']}, but this version reads {_FORMAT}: go on with the "
                f"version that wrote it, or train anew"
            )
        entries, versions = {}, {}
        for part, about in values["parts"].items():
            if not isinstance(about, dict) or type(about.get("version")) is not int:
                raise DataError(f"{where}: parts.{part} is {about!r}, but must have a version")
            versions[part] = about["version"]
            entry = {key: value for key, value in about.items() if key != "version"}
            entries[part] = FileEntry.of(entry, f"{where}: parts.{part}")
        return cls(folder=folder, name=name, values=values, entries=entries, versions=versions)

    def checkpoint(self) -> Checkpoint:
        """Read the parts.

        Raises:
            DataError: one is missing or damaged.
            ClusterError: its file system does not answer.
        """
        parts = {
            part: Part(version=self.versions[part], values=read_checked(self.folder, entry))
            for part, entry in self.entries.items()
        }
        return Checkpoint(step=self.step, turns=self.turns, parts=parts, test_loss=self.test_loss)


def manifests(folder: Location, called: str = "") -> list[Manifest]:
    """Return the manifests of a folder, those of the last steps first; damaged ones are named in a warning.

    Args:
        folder: of the checkpoints.
        called: how errors call the folder that the run goes on in.

    Raises:
        OSError: the folder cannot be read.
        DataError: there are some, but all are damaged, or of another version.
        ClusterError: its file system does not answer.
    """
    found = []
    files = map(_MANIFEST.fullmatch, folder.names_of("checkpoint-*.json"))
    names = [file[1] for file in files if file is not None]
    for name in names:
        try:
            found.append(Manifest.read(folder, name))
        except DataError as error:
            log.warning("a checkpoint is left out: %s", error)
    if names and not found:
        raise _none_whole(folder, trained_anew(called))
    return sorted(found, key=lambda one: (one.step, one.values["written_at"]), reverse=True)


def of_this(
    manifests: Sequence[Manifest],
    config: Config,
    fingerprints: Mapping[str, str],
    *,
    free: frozenset[str],
) -> list[Manifest]:
    """Return the checkpoints of a run; those of another one, which lie beside them, are named in a warning.

    Args:
        manifests: of a folder.
        config, fingerprints, free: see `differences`.
    """
    found = []
    for manifest in manifests:
        different = differences(manifest.values, config, fingerprints, free=free)
        if different:
            log.warning(
                "the checkpoint of step %d in %s is left out, because it is of another run: %s",
                manifest.step, manifest.folder, "; ".join(different),
            )  # fmt: skip
        else:
            found.append(manifest)
    return found


def trained_anew(called: str) -> str:
    """Return how a run that cannot go on is trained anew, in the caller's words.

    Args:
        called: how errors call the folder that it goes on in.
    """
    return _ANEW.get(called, "train anew")


def _none_whole(folder: Location, anew: str) -> DataError:
    return DataError(
        f"{folder} has no whole checkpoint: look at the warnings above; restore its files, or {anew}"
    )


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they go; created if it does not exist.
        about: run_id, config and fingerprints of the run, for the manifests.
        starts: checkpoints that the run may go on from, the first one that is whole; empty: it begins anew.
        last_step: the last step that was made in the run that they are of, as its metrics say.
        called: how errors call the run's folder.
    """

    def __init__(
        self,
        folder: Location,
        about: Mapping[str, Any],
        starts: Sequence[Manifest] = (),
        last_step: int = 0,
        called: str = "out",
    ) -> None:
        self.folder, self._about, self._anew = folder, about, trained_anew(called)
        self._starts, self._last_step = starts, last_step
        self._run: RunIdentity | None = None
        self._written: list[Manifest] = []
        self._is_cleared = False
        self._keep = about["config"]["checkpoint"]["keep"]
        self._constants: tuple[Mapping[str, Any], FileEntry] | None = None  # of the last one, and their file

    @property
    def last(self) -> int | None:
        """Return the step of the last checkpoint that is there; None: there is none."""
        return self._written[-1].step if self._written else None

    def begin(self, run: RunIdentity) -> Start | None:
        """Return the checkpoint that the run goes on from; None: it begins anew.

        Raises:
            ConfigError: the run ends before the checkpoint.
            DataError: the rows are others, or no checkpoint is whole.
        """
        self._run = run
        if not self._starts:
            return None
        _refuse_other_rows(self._starts[0], run, self._anew)
        for number, manifest in enumerate(self._starts):
            try:
                _refuse_other_rows(manifest, run, self._anew)
                checkpoint = manifest.checkpoint()
            except DataError as error:
                log.warning("the checkpoint of step %d is left out: %s", manifest.step, error)
                continue
            _refuse_other_end(manifest, run, self._anew)
            here = set(self.folder.names_of("checkpoint-*.json"))  # whatever the folder was called
            older = [one for one in self._starts[number:] if f"{one.name}.json" in here]
            self._written = [replace(one, folder=self.folder) for one in older[::-1]]
            lost, written_at = max(0, self._last_step - manifest.step), manifest.values["written_at"]
            log.info("resumed from step %d of %s, %d steps were lost", manifest.step, written_at, lost)
            return Start(
                checkpoint=checkpoint,
                resumed=Resumed(step=manifest.step, lost_steps=lost, written_at=written_at),
                anew=self._anew,
            )
        raise _none_whole(self._starts[0].folder, self._anew)

    def write(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, and remove those that are not kept; return its name."""
        assert self._run is not None, "begin comes first"
        name = f"checkpoint-{checkpoint.step:08d}-{uuid.uuid4().hex[:8]}"
        try:
            values, entries = self._write_parts(name, checkpoint, self._run)
            write_json(self.folder / f"{name}.json", values | {"sha256": digest_of(values)})
        except Exception:
            self._remove_unsure(name, checkpoint.parts)  # or a full disk would get fuller with every attempt
            raise
        versions = {part: of.version for part, of in checkpoint.parts.items()}
        manifest = Manifest(folder=self.folder, name=name, values=values, entries=entries, versions=versions)
        self._written.append(manifest)
        if (constants := checkpoint.parts.get("constants")) is not None:
            self._constants = constants.values, entries["constants"]
        try:
            for superseded in self._superseded():
                self._remove(superseded)
            if self._starts and not self._is_cleared:
                self.clear()  # those that could not be read; there is a newer one now
            self._is_cleared = True
        except OSError as error:
            log.warning("older checkpoints cannot be removed now: %s", error.strerror or error)
        return name

    def _remove_unsure(self, name: str, parts: Iterable[str]) -> None:
        """Remove what was written of a checkpoint, as far as that is possible now; the manifest first."""
        with suppress(OSError, SparkSGDError):
            (self.folder / f"{name}.json").remove()  # it may be in its place, though the disk failed then
            for part in parts:
                with suppress(OSError, SparkSGDError):
                    (self.folder / _file_of(name, part)).remove()

    def _write_parts(
        self, name: str, checkpoint: Checkpoint, run: RunIdentity
    ) -> tuple[dict[str, Any], dict[str, FileEntry]]:
        """Write the parts of a checkpoint; return what its manifest must say, and the files."""
        entries = {
            part: self._known_file(of) or write_checked(self.folder, _file_of(name, part), of.values)
            for part, of in checkpoint.parts.items()
        }
        values = {
            "format": _FORMAT,
            "step": checkpoint.step,
            "turns": checkpoint.turns,
            "total_turns": run.total_turns,
            "turns_per_epoch": run.turns_per_epoch,
            "test_loss": None if checkpoint.test_loss is None else finite(checkpoint.test_loss),
            "written_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **self._about,
            "data_digest": run.data_digest,
            "test_digest": run.test_digest,
            "parts": {
                part: {"version": checkpoint.parts[part].version, **asdict(entry)}
                for part, entry in entries.items()
            },
        }
        return values, entries

    def _known_file(self, part: Part) -> FileEntry | None:
        """Return the file that has a part already: constants are the same in a whole run; None: write it."""
        values, entry = self._constants or (None, None)
        if entry is None or values is not part.values:
            return None
        try:
            checked_bytes(self.folder, entry)
        except DataError:  # it was removed or damaged: later checkpoints need not lack it
            return None
        return entry

    def read(self, name: str) -> Checkpoint:
        """Read a checkpoint as a later run would."""
        return Manifest.read(self.folder, name).checkpoint()

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""
        for manifest in [one for one in self._written if one.name == name]:
            self._remove(manifest)

    def stopped(self, parameters: str | None) -> None:
        """See `CheckpointStore`; the folder is of one run, whatever its module has become."""

    def clear(self) -> None:
        """Remove all checkpoints but those of this run, and what killed ones began to write."""
        kept = {manifest.name for manifest in self._written}
        shared = self._files_of(self._written)
        files = self.folder.names_of("checkpoint-*")
        for file in sorted(files, key=lambda file: not file.endswith(".json")):  # manifests first
            name = _FILE.fullmatch(file)
            if name and name[1] not in kept and file not in shared:
                (self.folder / file).remove()

    def _superseded(self) -> list[Manifest]:
        """Return the checkpoints that are not kept: neither the last ones, nor the best on the same rows."""
        old = self._written[: -self._keep]
        scored = [one for one in self._written if one.test_loss is not None]
        rows = scored[-1].values.get("test_digest") if scored else None
        alike = [one for one in scored if one.values.get("test_digest", rows) == rows]
        best = min(alike, key=lambda one: one.test_loss, default=None)  # type: ignore[arg-type,return-value]  # None was left out
        return [one for one in old if one is not best]

    @staticmethod
    def _files_of(manifests: Iterable[Manifest]) -> set[str]:
        """Return the names of the files of parts; checkpoints may share them."""
        return {entry.name for one in manifests for entry in one.entries.values()}

    def _remove(self, manifest: Manifest) -> None:
        (self.folder / f"{manifest.name}.json").remove()
        others = self._files_of(one for one in self._written if one is not manifest)
        for name in self._files_of([manifest]) - others:
            (self.folder / name).remove()
        self._written.remove(manifest)  # last: what could not be removed now, is with the next checkpoint


def _file_of(name: str, part: str) -> str:
    """Return the name of the file of a part."""
    return f"{name}.{part}.pt"


def _refuse_other_rows(manifest: Manifest, run: RunIdentity, anew: str) -> None:
    if manifest.values["data_digest"] != run.data_digest:
        raise DataError(
            f"the rows are not those of the run to go on with: their digest is {run.data_digest}, but was "
            f"{manifest.values['data_digest']} in {manifest.folder}. Give it those rows, or {anew}"
        )


def _refuse_other_end(manifest: Manifest, run: RunIdentity, anew: str) -> None:
    """Refuse an end before the checkpoint, and a later one if the last round was cut short at the old one."""
    made, then = manifest.turns, manifest.values["total_turns"]
    if run.total_turns < made:
        raise ConfigError(
            f"train.epochs and train.steps ask for {run.total_turns} turns, but {manifest.folder} has "
            f"made {made}: ask for more, or {anew}"
        )
    if made == then < run.total_turns and not run.ends_round(made):
        raise ConfigError(
            f"train.steps was {then}, where the last round of {run.experiment.get('solver.name')} was cut "
            f"short, in mid-epoch: a run "
            f"that goes on from there would have other bits than one that was never stopped. Leave it at "
            f"{then}, or {anew}"
        )
