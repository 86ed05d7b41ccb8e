"""Trainings of one small experiment in a session, undisturbed and struck."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from pyspark.sql import SparkSession
from spark_helpers import AtStep, configured, read_files_apart, undisturbed
from table import BACKUP, RECORDED, SERVER, Outcome

from sparksgd.config import Config
from sparksgd.errors import SparkSGDError
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.replay import read_replay
from sparksgd.spark.train import train
from sparksgd.storage import Location
from sparksgd.training.in_process import train_in_process
from sparksgd.training.state import NO_PROBE, Observer, Probe, Training

__all__ = ["AT", "OF_ENGINE", "QUICK_EXECUTORS", "Trainings", "outcome", "replayed", "said"]

AT = 10
"""The step after which, or in which, faults strike."""

QUICK_EXECUTORS = {"spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
"""Java machines that live for some minutes need no optimising compiler."""

OF_ENGINE = {
    "tree": ("engine.name=tree",),
    "allreduce": ("engine.name=allreduce",),
    SERVER: (
        "engine.name=server", "solver.name=async_sgd", "optimizer.lr=0.02", "train.steps=48",
        "train.epochs=4",
    ),
    BACKUP: ("engine.name=tree", "solver.backup_workers=1"),
}  # fmt: skip
"""The settings of each engine of the table; after those of the experiment."""

_HERE = {"allreduce": ("engine.segment_steps=4",), BACKUP: ("engine.num_workers=4",)}
_STEPS = 24
_CALM_RUNS = 3


def said(error: BaseException) -> str:
    """Return the first line of an error's message, with its type."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def replayed(config: Config, rows: str, out: str | Location) -> str:
    """Return the parameters at which the replay of a run on `inline` ends.

    Args:
        config: of the run.
        rows: path of its rows.
        out: its folder.

    Raises:
        SparkSGDError: it cannot be replayed, or a step, or the end, is another.
    """
    replay = read_replay(out, trust=["users_modules", "holding"])
    config = replace(config, engine=replace(config.engine, name="inline"))
    return train_in_process(config, rows, None, replay=replay).flat.parameters_sha256()


def outcome(
    training: Training,
    reference: str,
    lost_s: float,
    *,
    retries: int = 0,
    rebuilt_shards: int = 0,
    lost_workers: int = 0,
    staleness: int = 0,
) -> Outcome:
    """Return what came of a run that ended well.

    Args:
        training: the run.
        reference: the parameters of an undisturbed one, or of its replay.
        lost_s: how much longer it took.
        retries: how many steps, segments or workers were tried again at least, if the fault struck.
        rebuilt_shards: how many shards were written again at least, likewise.
        lost_workers: how many workers the server has lost at least, likewise.
        staleness: how stale the stalest message was at least, likewise.
    """
    right, recovery = training.flat.parameters_sha256() == reference, training.recovery
    words, came = ["same bits" if right else "OTHER BITS"], training.participation
    stalest = max(came.staleness, default=0)
    seen = (recovery.retries, recovery.rebuilt_shards, came.lost_workers, stalest)
    if any(
        count < least
        for count, least in zip(seen, (retries, rebuilt_shards, lost_workers, staleness), strict=True)
    ):
        words.append("BUT NOTHING WAS STRUCK")
        right = False
    if came.lost_workers:
        words.append(f"workers lost: {came.lost_workers}")
    elif recovery.retries:
        words.append(f"steps or segments tried again: {recovery.retries}")
    if recovery.rebuilt_shards:
        words.append(f"{recovery.rebuilt_shards} shards written again")
    if staleness:
        words.append(f"a message was {stalest} steps old")
    return Outcome(result="; ".join(words), is_right=right, lost_s=lost_s)


class Trainings:
    """Trains a FlagNet on some rows.

    Args:
        spark: the session.
        rows: path of the rows.
        folder: of the flags and the runs; it is made.
    """

    def __init__(self, spark: SparkSession, rows: str, folder: Path) -> None:
        self.spark, self.rows, self.folder = spark, rows, folder
        self.flags = folder / "flags"
        self.flags.mkdir(parents=True)
        self._numbers = count()
        self._calm_s = cache(self._measured_s)
        self._undisturbed = cache(self._measured_bits)

    @property
    def asleep(self) -> Path:
        """The file that a FlagNet leaves when it sleeps."""
        return self.flags.with_name("asleep")

    def flag(self, name: str) -> Callable[[Training], None]:
        """Return a deed: let a worker find a flag in its next turn."""
        return lambda _: (self.flags / name).touch()

    def struck(
        self,
        engine: str,
        deed: Callable[[Training], None],
        settings: Sequence[str] = (),
        *,
        beside: AbstractContextManager[Any] | None = None,
        probe: Probe = NO_PROBE,
        **signs: int,
    ) -> Outcome:
        """Train while a fault strikes; return what came of it.

        Args:
            engine: its name.
            deed: done after step `AT`.
            settings: over those of the experiment.
            beside: what goes on meanwhile.
            probe: of the run.
            signs: by which one sees that the fault struck, see `outcome`.
        """
        given = tuple(settings)
        calm_s, out = self._calm_s(engine, given), self.folder / f"run-{next(self._numbers)}"
        self.asleep.unlink(missing_ok=True)
        try:
            with beside or nullcontext():
                took_s, training = self._timed(engine, given, out, [AtStep(AT, deed)], probe)
            left = [flag.name for flag in self.flags.iterdir()]
            for name in left:
                (self.flags / name).unlink()
            if left:
                return Outcome(result=f"nobody obeyed {', '.join(left)}", is_right=False)
            return outcome(training, self._reference(engine, given, out), took_s - calm_s, **signs)
        except SparkSGDError as error:
            return Outcome(result=said(error), is_right=False)

    def _reference(self, engine: str, settings: tuple[str, ...], out: Path) -> str:
        """Return the bits at which a run must have ended: of its replay, or of an undisturbed one."""
        if engine in RECORDED:
            return replayed(self._config(engine, settings), self.rows, str(out))
        return self._undisturbed(settings)

    def _measured_bits(self, settings: tuple[str, ...]) -> str:
        if "data.placement=in_place" in settings:  # which inline does not read
            _, training = self._timed("tree", settings, self.folder / f"run-{next(self._numbers)}")
            return training.flat.parameters_sha256()
        return undisturbed(self.rows, self._config("tree", settings))

    def _measured_s(self, engine: str, settings: tuple[str, ...]) -> float:
        """Return the median time of undisturbed runs; the first one is slow, and does not count so."""
        outs = (self.folder / f"run-{next(self._numbers)}" for _ in range(_CALM_RUNS))
        return median(self._timed(engine, settings, out)[0] for out in outs)

    def _timed(
        self,
        engine: str,
        settings: tuple[str, ...],
        out: Path,
        observers: Sequence[Observer] = (),
        probe: Probe = NO_PROBE,
    ) -> tuple[float, Training]:
        started_s = time.perf_counter()
        if engine in RECORDED:
            observers = [*observers, RunFolder(out)]
        training = train(
            self.spark, self._config(engine, settings), read_files_apart(self.spark, self.rows),
            observers=observers, probe=probe,
        )  # fmt: skip
        return time.perf_counter() - started_s, training

    def _config(self, engine: str, settings: tuple[str, ...]) -> Config:
        return configured(
            "model.name=users_modules:FlagNet", f"model.folder={self.flags}", f"train.steps={_STEPS}",
            *OF_ENGINE[engine], *_HERE.get(engine, ()), *settings,
        )  # fmt: skip
