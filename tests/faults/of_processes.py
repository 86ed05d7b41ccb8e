"""Faults of a session's own processes and files: executors, workers, daemons, shard files."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiment import AT, QUICK_EXECUTORS, Trainings
from failing import FailingTasks
from spark_fixtures import sessions
from spark_helpers import LOCAL_CLUSTER, executor_pids, flip_bit, striking, with_descendants, write_rows
from table import Fault, Outcome, Place

from sparksgd.training.state import Probe

__all__ = ["places"]

_STOPPED_S = 10.0
_FAILING_SHARE = 0.05
_MANY_STEPS = 500


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


def _by_flag(name: str, **signs: int) -> Callable[[_Here, str], Outcome]:
    return lambda here, engine: here.struck(engine, here.flag(name), **signs)


def _kill_all(here: _Here, engine: str) -> Outcome:
    def kill() -> None:
        for executor in executor_pids():
            os.kill(executor, signal.SIGKILL)

    return here.struck(engine, here.flag("sleep"), beside=striking(here.asleep.exists, kill), retries=1)


def _stop(here: _Here, engine: str) -> Outcome:
    stopped: list[int] = []

    def send(sent: signal.Signals) -> None:
        for process in stopped:
            with suppress(ProcessLookupError):
                os.kill(process, sent)

    def wake() -> None:
        time.sleep(_STOPPED_S)  # that long is the fault
        send(signal.SIGCONT)

    waking = threading.Thread(target=wake)

    def stop(_: object) -> None:
        stopped.extend(sorted(with_descendants(executor_pids()[:1])))
        send(signal.SIGSTOP)
        waking.start()

    try:
        return here.struck(engine, stop)
    finally:
        if waking.ident is not None:
            waking.join()


def _delete(here: _Here, engine: str) -> Outcome:
    def delete(_: object) -> None:
        for folder in {file.parent for file in here.shard_files()}:
            shutil.rmtree(folder)

    return here.struck(engine, delete, retries=1, rebuilt_shards=1)


def _flip(here: _Here, engine: str) -> Outcome:
    return here.struck(engine, lambda _: flip_bit(here.shard_files()[0]), rebuilt_shards=1)


def _fail(here: _Here, engine: str) -> Outcome:
    turns = 4 if engine == "allreduce" else 1
    settings = (f"train.steps={_MANY_STEPS}", "train.epochs=100")
    probe = Probe(before_gradients=FailingTasks(_FAILING_SHARE, turns))
    return here.struck(engine, lambda _: None, settings, probe=probe, retries=1)


@contextmanager
def _opened(folder: Path, master: str, settings: Mapping[str, str]) -> Iterator[_Here]:
    rows = write_rows(folder / "rows", 1003)
    with sessions(folder / "local") as session_for:
        yield _Here(folder / "local", session_for(master, **settings), rows, folder)


_IN = f"in step {AT + 1}"
_FAULTS = (
    Fault(name="executor", killed=f"its JVM, {_IN}", strike=_by_flag("kill-executor", retries=1)),
    Fault(name="Python worker", killed=f"one of two, {_IN}", strike=_by_flag("kill-worker", retries=1)),
    Fault(name="daemon", killed=f"pyspark.daemon of an executor, {_IN}", strike=_by_flag("kill-daemon")),
    Fault(name="all executors", killed=f"both JVMs at once, {_IN}", strike=_kill_all),
    Fault(
        name="executor that stands still",
        killed=f"SIGSTOP to a JVM and its workers, for {_STOPPED_S:.0f} s after step {AT}",
        strike=_stop,
    ),
    Fault(name="shard files deleted", killed=f"all of them, after step {AT}", strike=_delete),
    Fault(name="flipped bit", killed=f"in a shard file, after step {AT}", strike=_flip),
)
_FAULTS_OF_TASKS = (
    Fault(
        name="tasks that fail by chance",
        killed=f"the worker of each task with probability {_FAILING_SHARE}, for {_MANY_STEPS} steps",
        strike=_fail,
    ),
)


def places(folder: Path) -> list[Place]:
    """Return the places of these faults.

    Args:
        folder: for their files; it is made.
    """
    settings = QUICK_EXECUTORS | {"spark.python.daemon.module": "pyspark.daemon"}  # as jobs have it
    executors = partial(_opened, folder / "executors", LOCAL_CLUSTER, settings)
    tasks = partial(_opened, folder / "tasks", "local[2]", {})
    return [
        Place(name="two executors of one session", opened=executors, faults=_FAULTS),
        Place(name="a session whose workers start at once", opened=tasks, faults=_FAULTS_OF_TASKS),
    ]
