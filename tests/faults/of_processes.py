"""Faults of a session's own processes and files: executors, workers, daemons, shard files."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiment import AT, QUICK_EXECUTORS, Trainings
from failing import FailingTasks, FailingTurns
from spark_fixtures import sessions
from spark_helpers import LOCAL_CLUSTER, executor_pids, flip_bit, striking, with_descendants, write_rows
from stragglers import HeldUntil, HeldWhile
from table import BACKUP, ENGINES, SERVER, Fault, Outcome, Place

from sparksgd.training.state import NO_PROBE, Probe, Training

__all__ = ["places"]

_STOPPED_S = 10.0
_FAILING_SHARE = 0.05
_MANY_STEPS = 500
_FAILING_TURNS = 0.02
_MANY_TURNS = 125
_HELD_TURN = 36
"""From which turn on the workers of the server wait until the struck one is back: they go on without it, and
the run would be over before.  All rows have been read again by then."""


class _Here(Trainings):
    """Trainings in a session of two executors.

    Args:
        local: Spark's local directory.
    """

    def __init__(self, local: Path, *given: Any) -> None:
        super().__init__(*given)
        self.local = local

    def struck(self, *given: Any, **more: Any) -> Outcome:
        """Train while a fault strikes; of the run no file may be left, wherever it was."""
        found, left = super().struck(*given, **more), list(self.local.rglob("sparksgd-*"))
        if not left:
            return found
        return replace(found, result=f"{found.result}; left {len(left)} folders", is_right=False)

    def shard_files(self) -> list[Path]:
        return sorted(self.local.rglob("sparksgd-*/shard-*"))

    def until_back(self, engine: str, processes: int) -> Probe:
        """Return a probe that holds a server's workers until so many processes have made turns."""
        if engine != SERVER:
            return NO_PROBE
        seen = self.folder / f"processes-{time.monotonic_ns()}"
        seen.mkdir()
        return Probe(before_gradients=HeldUntil(folder=str(seen), processes=processes, turn=_HELD_TURN))


class _Held:
    """Holds a server's workers while its file is there.

    Args:
        here: where they train.
        engine: another one's workers are not held.
    """

    def __init__(self, here: _Here, engine: str) -> None:
        self._file = here.folder / "held"
        self._training: Training | None = None
        self._is_held = engine == SERVER
        name = here.folder / "held-by"
        name.write_text(str(self._file))
        held = HeldWhile(named_in=str(name), turn=_HELD_TURN)
        self.probe = Probe(before_gradients=held) if self._is_held else NO_PROBE

    def begin(self, training: Training) -> None:
        self._training = training
        self._file.touch()

    def end(self) -> None:
        self._file.unlink()

    def until_rebuilt(self) -> AbstractContextManager[None]:
        """Hold them until a shard has been written again."""
        if not self._is_held:
            return nullcontext()
        return striking(lambda: self._training and self._training.recovery.rebuilt_shards, self.end)


def _by_flag(name: str, processes: int = 0, **signs: int) -> Callable[[_Here, str], Outcome]:
    """Return what strikes by a flag.

    Args:
        name: of the flag.
        processes: how many make turns for the server, with those that take the place of struck ones.
        signs: that it struck.
    """

    def strike(here: _Here, engine: str) -> Outcome:
        probe = here.until_back(engine, processes)
        return here.struck(engine, here.flag(name), probe=probe, **_signs(engine, **signs))

    return strike


def _signs(engine: str, **signs: int) -> dict[str, int]:
    """Return the signs that a fault struck; of the server's workers Spark itself starts the tasks again."""
    if engine == SERVER and signs.pop("retries", 0):
        signs["lost_workers"] = 1
    return signs


def _kill_all(here: _Here, engine: str) -> Outcome:
    def kill() -> None:
        for executor in executor_pids():
            os.kill(executor, signal.SIGKILL)

    beside, probe = striking(here.asleep.exists, kill), here.until_back(engine, 4)
    return here.struck(engine, here.flag("sleep"), beside=beside, probe=probe, **_signs(engine, retries=1))


def _stop(here: _Here, engine: str) -> Outcome:
    stopped: list[int] = []
    held = _Held(here, engine)

    def send(sent: signal.Signals) -> None:
        for process in stopped:
            with suppress(ProcessLookupError):
                os.kill(process, sent)

    def wake() -> None:
        time.sleep(_STOPPED_S)  # that long is the fault
        send(signal.SIGCONT)
        held.end()

    waking = threading.Thread(target=wake)

    def stop(training: Training) -> None:
        held.begin(training)
        stopped.extend(sorted(with_descendants(executor_pids()[:1])))
        send(signal.SIGSTOP)
        waking.start()

    try:
        return here.struck(engine, stop, probe=held.probe, staleness=AT if engine == SERVER else 0)
    finally:
        if waking.ident is not None:
            waking.join()


def _delete(here: _Here, engine: str) -> Outcome:
    def delete() -> None:
        for folder in {file.parent for file in here.shard_files()}:
            shutil.rmtree(folder)

    return _strike_files(here, engine, delete, retries=1)


def _flip(here: _Here, engine: str) -> Outcome:
    return _strike_files(here, engine, lambda: flip_bit(here.shard_files()[0]))


def _flip_in_place(here: _Here, engine: str) -> Outcome:
    rows = write_rows(here.folder / f"rows-{engine}", 1003, files=4)  # a partition for each shard
    there = _Here(here.local, here.spark, rows, here.folder / f"in-place-{engine}")
    settings = ("data.placement=in_place",)
    return _strike_files(there, engine, lambda: flip_bit(there.shard_files()[0]), settings)


def _strike_files(
    here: _Here, engine: str, deed: Callable[[], None], settings: Sequence[str] = (), **signs: int
) -> Outcome:
    """Train while shard files are struck, and written again."""
    held = _Held(here, engine)

    def strike(training: Training) -> None:
        held.begin(training)
        deed()

    return here.struck(
        engine,
        strike,
        settings,
        beside=held.until_rebuilt(),
        probe=held.probe,
        rebuilt_shards=1,
        **_signs(engine, **signs),
    )


def _fail(here: _Here, engine: str) -> Outcome:
    return _failing(
        here, engine, FailingTasks(_FAILING_SHARE, 4 if engine == "allreduce" else 1), _MANY_STEPS
    )


def _fail_turns(here: _Here, engine: str) -> Outcome:
    return _failing(here, engine, FailingTurns(_FAILING_TURNS), _MANY_TURNS)


def _failing(here: _Here, engine: str, kills: Callable[[int, int], None], steps: int) -> Outcome:
    settings = (f"train.steps={steps}", "train.epochs=100")
    probe = Probe(before_gradients=kills)
    return here.struck(engine, lambda _: None, settings, probe=probe, **_signs(engine, retries=1))


@contextmanager
def _opened(folder: Path, master: str, settings: Mapping[str, str]) -> Iterator[_Here]:
    rows = write_rows(folder / "rows", 1003)
    with sessions(folder / "local") as session_for:
        yield _Here(folder / "local", session_for(master, **settings), rows, folder)


_IN = f"in step {AT + 1}"
_ALL = (*ENGINES, SERVER)
_FAULTS = (
    Fault(
        name="executor",
        killed=f"its JVM, {_IN}",
        engines=_ALL,
        strike=_by_flag("kill-executor", 3, retries=1),
    ),
    Fault(
        name="Python worker",
        killed=f"one of two, {_IN}",
        engines=_ALL,
        strike=_by_flag("kill-worker", 3, retries=1),
    ),
    Fault(name="daemon", killed=f"pyspark.daemon of an executor, {_IN}", strike=_by_flag("kill-daemon")),
    Fault(name="all executors", killed=f"both JVMs at once, {_IN}", engines=_ALL, strike=_kill_all),
    Fault(
        name="executor that stands still",
        killed=f"SIGSTOP to a JVM and its workers, for {_STOPPED_S:.0f} s after step {AT}",
        engines=_ALL,
        strike=_stop,
    ),
    Fault(name="shard files deleted", killed=f"all of them, after step {AT}", engines=_ALL, strike=_delete),
    Fault(name="flipped bit", killed=f"in a shard file, after step {AT}", engines=_ALL, strike=_flip),
    Fault(
        name="flipped bit",
        killed=f"in a shard file of rows dealt in place, after step {AT}",
        strike=_flip_in_place,  # no replay on inline deals rows in place
    ),
)
_FAULTS_WITH_BACKUP = (
    Fault(
        name="executor",
        killed=f"its JVM with two of four workers, {_IN}",
        engines=(BACKUP,),
        strike=_by_flag("kill-executor"),  # Spark tries lost tasks again by itself
    ),
    Fault(
        name="Python worker",
        killed=f"one of four, {_IN}",
        engines=(BACKUP,),
        strike=_by_flag("kill-worker"),
    ),
)
_FAULTS_OF_TASKS = (
    Fault(
        name="tasks that fail by chance",
        killed=f"the worker of each task with probability {_FAILING_SHARE}, for {_MANY_STEPS} steps",
        strike=_fail,
    ),
    Fault(
        name="tasks that fail by chance",
        killed=f"the worker of each turn with probability {_FAILING_TURNS}, for {4 * _MANY_TURNS} messages",
        engines=(SERVER,),
        strike=_fail_turns,
    ),
)


def places(folder: Path) -> list[Place]:
    """Return the places of these faults.

    Args:
        folder: for their files; it is made.
    """
    settings = QUICK_EXECUTORS | {"spark.python.daemon.module": "pyspark.daemon"}  # as jobs have it
    executors = partial(_opened, folder / "executors", LOCAL_CLUSTER, settings)
    with_backup = partial(_opened, folder / "with-backup", "local-cluster[2,2,1024]", settings)
    tasks = partial(_opened, folder / "tasks", "local[2]", {})
    return [
        Place(name="two executors of one session", opened=executors, faults=_FAULTS),
        Place(name="two executors of two cores", opened=with_backup, faults=_FAULTS_WITH_BACKUP),
        Place(name="a session whose workers start at once", opened=tasks, faults=_FAULTS_OF_TASKS),
    ]
