"""Faults of a standalone cluster: its hosts, its master, and the driver that trains on it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import servers
from experiment import AT, QUICK_EXECUTORS, Trainings
from spark_fixtures import sessions
from spark_helpers import striking, with_descendants, write_rows
from submissions import Submissions
from table import BACKUP, ENGINES, SERVER, Fault, Outcome, Place

__all__ = ["places"]

_HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
_EXECUTORS = {
    "spark.executor.memory": "600m", "spark.executor.cores": "1", "spark.cores.max": "2", **QUICK_EXECUTORS,
}  # fmt: skip


class _Cluster:
    """A standalone cluster of three hosts, of which a run takes two."""

    def __init__(self, folder: Path, cluster: servers.Standalone) -> None:
        self.folder, self.cluster = folder, cluster
        self.rows = write_rows(folder / "rows", 1003)
        settings = _EXECUTORS | {"spark.master": cluster.address}
        self.submissions = Submissions(folder / "submitted", settings, self.rows)
        of_three = settings | {"spark.cores.max": "3"}
        self.with_backup = Submissions(folder / "with-backup", of_three, self.rows)

    @contextmanager
    def trainings(self) -> Iterator[Trainings]:
        """Give trainings in a session of this process."""
        with sessions(self.folder / "local") as session_for:
            spark = session_for(self.cluster.address, **_EXECUTORS)
            yield Trainings(spark, self.rows, self.folder / f"trainings-{time.monotonic_ns()}")


def _kill_host(here: _Cluster, engine: str) -> Outcome:
    killed: list[int] = []

    with here.trainings() as trainings:

        def kill() -> None:
            asleep = int(trainings.asleep.read_text())
            hosts = here.cluster.workers
            killed.extend(n for n, host in enumerate(hosts) if asleep in with_descendants([host.pid]))
            here.cluster.kill_worker(killed[0])

        try:
            beside = striking(trainings.asleep.exists, kill)
            return trainings.struck(engine, trainings.flag("sleep"), beside=beside, retries=1)
        finally:
            for number in killed:
                here.cluster.restart_worker(number)


def _kill_master(here: _Cluster, engine: str) -> Outcome:
    with _started(here.folder / f"master-{engine}") as own, own.trainings() as trainings:
        return trainings.struck(engine, lambda _: servers.stop(own.cluster.master))


def _kill_driver(here: _Cluster, engine: str) -> Outcome:
    submissions = here.with_backup if engine == BACKUP else here.submissions
    return submissions.struck(engine, lambda process, _: os.killpg(process.pid, signal.SIGKILL))


@contextmanager
def _started(folder: Path) -> Iterator[_Cluster]:
    environment = os.environ | {"SPARK_LOCAL_DIRS": str(folder / "local")}
    with servers.standalone(
        folder / "servers", environment=environment, hosts=_HOSTS, memory="1g"
    ) as cluster:
        yield _Cluster(folder, cluster)


_FAULTS = (
    Fault(
        name="worker host",
        killed=f"a standalone Worker with its executors, in step {AT + 1}; a third host takes over",
        strike=_kill_host,
    ),
    Fault(
        name="driver",
        killed=f"kill -9 of its Python and JVM, in step {AT + 1}; the same command resumed",
        engines=(*ENGINES, SERVER, BACKUP),
        strike=_kill_driver,
    ),
    Fault(name="standalone master", killed=f"its process, after step {AT}", strike=_kill_master),
)


def places(folder: Path) -> list[Place]:
    """Return the places of these faults.

    Args:
        folder: for their files; it is made.
    """
    return [
        Place(name="a standalone cluster of three hosts", opened=partial(_started, folder), faults=_FAULTS)
    ]
