"""Trainings of one small experiment in a session, undisturbed and struck."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from pyspark.sql import SparkSession
from spark_helpers import AtStep, configured, undisturbed
from table import Outcome

from sparksgd.errors import SparkSGDError
from sparksgd.spark.train import train
from sparksgd.training.state import NO_PROBE, Observer, Probe, Training

__all__ = ["AT", "QUICK_EXECUTORS", "Trainings", "outcome", "said"]

AT = 10
"""The step after which, or in which, faults strike."""

QUICK_EXECUTORS = {"spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
"""Java machines that live for some minutes need no optimising compiler."""

_STEPS = 24
_CALM_RUNS = 3


def said(error: BaseException) -> str:
    """Return the first line of an error's message, with its type."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def outcome(
    training: Training, reference: str, lost_s: float, *, retries: int = 0, rebuilt_shards: int = 0
) -> Outcome:
    """Return what came of a run that ended well.

    Args:
        training: the run.
        reference: the parameters of an undisturbed one.
        lost_s: how much longer it took.
        retries: how many steps or segments were tried again at least, if the fault struck.
        rebuilt_shards: how many shards were written again at least, likewise.
    """
    right, recovery = training.flat.parameters_sha256() == reference, training.recovery
    words = ["same bits" if right else "OTHER BITS"]
    if recovery.retries < retries or recovery.rebuilt_shards < rebuilt_shards:
        words.append("BUT NOTHING WAS STRUCK")
        right = False
    if recovery.retries:
        words.append(f"steps or segments tried again: {recovery.retries}")
    if recovery.rebuilt_shards:
        words.append(f"{recovery.rebuilt_shards} shards written again")
    return Outcome(result="; ".join(words), is_right=right, lost_s=lost_s)


class Trainings:
    """Trains a FlagNet on some rows.

    Args:
        spark: the session.
        rows: path of the rows.
        folder: of the flags; it is made.
    """

    def __init__(self, spark: SparkSession, rows: str, folder: Path) -> None:
        self.spark, self.rows = spark, rows
        self.flags = folder / "flags"
        self.flags.mkdir(parents=True)
        self._calm_s = cache(self._measured_s)
        self._reference = cache(lambda settings: undisturbed(rows, self._config("tree", settings)))

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
        calm_s, reference = self._calm_s(engine, given), self._reference(given)
        self.asleep.unlink(missing_ok=True)
        try:
            with beside or nullcontext():
                took_s, training = self._timed(engine, given, [AtStep(AT, deed)], probe)
        except SparkSGDError as error:
            return Outcome(result=said(error), is_right=False)
        left = [flag.name for flag in self.flags.iterdir()]
        for name in left:
            (self.flags / name).unlink()
        if left:
            return Outcome(result=f"nobody obeyed {', '.join(left)}", is_right=False)
        return outcome(training, reference, took_s - calm_s, **signs)

    def _measured_s(self, engine: str, settings: tuple[str, ...]) -> float:
        """Return the median time of undisturbed runs; the first one is slow, and does not count so."""
        return median(self._timed(engine, settings)[0] for _ in range(_CALM_RUNS))

    def _timed(
        self,
        engine: str,
        settings: tuple[str, ...],
        observers: Sequence[Observer] = (),
        probe: Probe = NO_PROBE,
    ) -> tuple[float, Training]:
        started_s = time.perf_counter()
        training = train(
            self.spark, self._config(engine, settings), self.spark.read.parquet(self.rows),
            observers=observers, probe=probe,
        )  # fmt: skip
        return time.perf_counter() - started_s, training

    def _config(self, engine: str, settings: tuple[str, ...]) -> Any:
        of_engine = ("engine.segment_steps=4",) if engine == "allreduce" else ()
        return configured(
            "model.name=users_modules:FlagNet", f"model.folder={self.flags}", f"engine.name={engine}",
            f"train.steps={_STEPS}", *of_engine, *settings,
        )  # fmt: skip
