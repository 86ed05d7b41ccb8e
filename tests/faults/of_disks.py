"""Faults of disks: full ones, and an output that cannot be written.  They are small tmpfs of this process."""

from __future__ import annotations

import errno
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from at_once import every_checkpoint
from experiment import AT, outcome, said
from mounts import HAS_OWN_MOUNTS
from spark_fixtures import sessions
from spark_helpers import AtStep, configured, undisturbed, write_rows
from table import Fault, NotHere, Outcome, Place

from sparksgd.errors import SparkSGDError
from sparksgd.runs.checkpoints import manifests
from sparksgd.runs.earlier import Found, resumable
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.lease import remove_leases
from sparksgd.spark.frame_rows import DataFrameRows
from sparksgd.spark.hadoop_files import HadoopLocation
from sparksgd.spark.train import train
from sparksgd.storage import Location, location
from sparksgd.training.state import Training

__all__ = ["places"]

_DISK_BYTES = 64 << 20
_FREED_AT = AT + 6
_WITHOUT_SHUFFLE = ("data.placement=in_place", "train.num_shards=1", "engine.num_workers=1")


class _Disk:
    """A disk that can be filled and made read-only.

    Args:
        folder: where it is; it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "disk", str(folder)], check=True)

    def fill(self, *_: object) -> None:
        """Leave no byte free."""
        with self._filler.open("wb", 0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self, *_: object) -> None:
        """Remove what fills it."""
        self._filler.unlink(missing_ok=True)

    def set_writable(self, writable: bool, *_: object) -> None:
        """Let it be written, or not."""
        options = f"remount,{'rw' if writable else 'ro'}"
        subprocess.run(["mount", "-o", options, str(self.folder)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class _OnDisk:
    """Trainings with a disk for shards, one for the output, and one for spools."""

    def __init__(self, folder: Path, session_for: Callable[..., object]) -> None:
        self.rows = write_rows(folder / "rows", 1003)
        self.local, self.out, self.spool = (_Disk(folder / name) for name in ("local", "out", "spool"))
        self.spark = session_for("local[2]", spark__local__dir=str(self.local.folder))
        self._numbers = iter(range(1000))
        self._calm_s: dict[tuple[object, ...], float] = {}

    def config(self, engine: str) -> object:
        of_engine = ("engine.segment_steps=2",) if engine == "allreduce" else ()
        return configured(f"engine.name={engine}", "train.steps=24", "checkpoint.every_steps=2", *of_engine)

    def trained(self, engine: str, out: Location, deeds: Sequence[AtStep], found: Found) -> Training:
        """Train into a folder, as a job does."""
        folder, config = RunFolder(out), self.config(engine)
        with folder.held():
            folder.require_writable()
            return train(
                self.spark, config, self.spark.read.parquet(self.rows),
                observers=[folder, *deeds], checkpoints=folder.checkpoints(config, found),
            )  # fmt: skip

    def place_of_output(self, by_hadoop: bool) -> Location:
        path = self.out.folder / f"run-{next(self._numbers)}"
        return HadoopLocation(f"file:{path}") if by_hadoop else location(path)

    def calm_s(self, engine: str, by_hadoop: bool) -> float:
        """Return the time of an undisturbed run, after one that warms up."""
        key = (engine, by_hadoop)
        if key not in self._calm_s:
            for _ in range(2):
                started_s = time.perf_counter()
                self.trained(engine, self.place_of_output(by_hadoop), [], Found())
                self._calm_s[key] = time.perf_counter() - started_s
        return self._calm_s[key]

    def struck(
        self, engine: str, deeds: Sequence[AtStep], mend: Callable[[], None], *, by_hadoop: bool
    ) -> Outcome:
        """Train while an output is struck; if that ends the run, mend it, and let the run go on."""
        calm_s, out, config = (
            self.calm_s(engine, by_hadoop),
            self.place_of_output(by_hadoop),
            self.config(engine),
        )
        reference, found, words = undisturbed(self.rows, config), Found(), []
        started_s = time.perf_counter()
        try:
            training = self.trained(engine, out, deeds, found)
        except SparkSGDError as error:
            words.append(f"{said(error)}; mended, and the run went on from its last checkpoint")
            mend()
            remove_leases(out)  # another process would see that their holder is gone
            found = resumable(out, config, {}, "out")
            training = self.trained(engine, out, [], found)
            if not training.resumed:
                return Outcome(result=f"{words[0]}, but it began anew", is_right=False)
        ended = outcome(training, reference, time.perf_counter() - started_s - calm_s)
        lines = (out / "metrics.jsonl").read_bytes().splitlines()
        is_whole = len(lines) == training.version and len(manifests(out / "checkpoints")) > 0
        words.append(ended.result if is_whole else f"{ended.result}; metrics or checkpoints lack something")
        return Outcome(result=": ".join(words), is_right=ended.is_right and is_whole, lost_s=ended.lost_s)

    def close(self) -> None:
        for disk in (self.local, self.out, self.spool):
            disk.close()


def _full_in_dealing(here: _OnDisk, engine: str, *settings: str) -> Outcome:
    """Fill the shards' disk when its free space has just been looked at; then let the session train again."""
    announced, config = DataFrameRows._announce, configured(f"engine.name={engine}", *settings)
    rows = here.spark.read.parquet(here.rows)
    reference = train(here.spark, config, rows).flat.parameters_sha256()

    def and_fill(self: DataFrameRows, *given: object) -> None:
        announced(self, *given)
        here.local.fill()

    try:
        with mock.patch.object(DataFrameRows, "_announce", and_fill):
            train(here.spark, config, rows)
        return Outcome(result="it was not refused", is_right=False)
    except SparkSGDError as error:
        told = said(error)
    finally:
        here.local.free()
    left = list(here.local.folder.rglob("sparksgd-*"))
    again = outcome(train(here.spark, config, rows), reference, 0.0)
    is_right = again.is_right and not left and "No space left on device" in told
    more = f"; it left {left}" if left else ""
    return Outcome(result=f"{told}{more}; another run in the session: {again.result}", is_right=is_right)


def _full_output(here: _OnDisk, engine: str, *, freed: bool, by_hadoop: bool = False) -> Outcome:
    deeds = [AtStep(AT, here.out.fill)] + ([AtStep(_FREED_AT, here.out.free)] if freed else [])
    return here.struck(engine, deeds, here.out.free, by_hadoop=by_hadoop)


def _full_spool(here: _OnDisk, engine: str, *, freed: bool) -> Outcome:
    deeds = [AtStep(AT, here.spool.fill)] + ([AtStep(_FREED_AT, here.spool.free)] if freed else [])
    with mock.patch.object(tempfile, "tempdir", str(here.spool.folder)):
        return here.struck(engine, deeds, here.spool.free, by_hadoop=True)


def _read_only_at_first(here: _OnDisk, engine: str) -> Outcome:
    here.out.set_writable(False)
    try:
        here.trained(engine, here.place_of_output(False), [], Found())
    except SparkSGDError as error:
        told = said(error)
        return Outcome(result=told, is_right="which cannot be written: Read-only file system" in told)
    finally:
        here.out.set_writable(True)
    return Outcome(result="it was not refused", is_right=False)


def _read_only(here: _OnDisk, engine: str, *, freed: bool) -> Outcome:
    strike, mend = (partial(here.out.set_writable, writable) for writable in (False, True))
    deeds = [AtStep(AT, strike)] + ([AtStep(_FREED_AT, mend)] if freed else [])
    return here.struck(engine, deeds, mend, by_hadoop=True)


@contextmanager
def _opened(folder: Path) -> Iterator[_OnDisk]:
    if not HAS_OWN_MOUNTS:
        raise NotHere("this user cannot mount a tmpfs, not even in a namespace of its own")
    folder.mkdir()
    with sessions(folder) as session_for, every_checkpoint():
        here = _OnDisk(folder, session_for)
        try:
            yield here
        finally:
            here.close()


_BRIEFLY = f"full after steps {AT} to {_FREED_AT}"
_FOR_GOOD = f"full from step {AT} on"
_FAULTS = (
    Fault(
        name="disk full during shards",
        killed="Spark's local directory, in the shuffle",
        strike=_full_in_dealing,
    ),
    Fault(
        name="disk full during shards",
        killed="Spark's local directory, in the shard file",
        strike=lambda here, engine: _full_in_dealing(here, engine, *_WITHOUT_SHUFFLE),
    ),
    Fault(
        name="disk full during checkpoints",
        killed=f"the output, by Hadoop's files, {_BRIEFLY}",
        strike=partial(_full_output, freed=True, by_hadoop=True),
    ),
    Fault(
        name="disk full during checkpoints",
        killed=f"the output, {_BRIEFLY}",
        strike=partial(_full_output, freed=True),
    ),
    Fault(
        name="disk full during checkpoints",
        killed=f"the output, {_FOR_GOOD}",
        strike=partial(_full_output, freed=False),
    ),
    Fault(
        name="disk full during spools",
        killed=f"the temporary folder, {_BRIEFLY}",
        strike=partial(_full_spool, freed=True),
    ),
    Fault(
        name="disk full during spools",
        killed=f"the temporary folder, {_FOR_GOOD}",
        strike=partial(_full_spool, freed=False),
    ),
    Fault(name="read-only output", killed="from the start", strike=_read_only_at_first),
    Fault(
        name="read-only output",
        killed=f"by Hadoop's files, after steps {AT} to {_FREED_AT}",
        strike=partial(_read_only, freed=True),
    ),
    Fault(
        name="read-only output",
        killed=f"by Hadoop's files, from step {AT} on",
        strike=partial(_read_only, freed=False),
    ),
)


def places(folder: Path) -> list[Place]:
    """Return the places of these faults.

    Args:
        folder: for their files; it is made.
    """
    return [Place(name="small disks", opened=partial(_opened, folder), faults=_FAULTS)]
