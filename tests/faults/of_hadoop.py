"""Faults of Hadoop's servers: YARN's application master, and HDFS's NameNode."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from checkouts import processes_of
from experiment import AT
from hadoop import Hadoop
from jars import NoJars
from servers import Process, wait_for
from spark_helpers import write_rows
from submissions import Submissions
from table import Fault, NotHere, Outcome, Place

__all__ = ["places"]

_GONE_S = 20.0


class _OnHadoop:
    """Submitted trainings whose folders are on HDFS: on YARN, and with a driver of their own.

    The nodes are this machine, and have its Python.
    """

    def __init__(self, folder: Path, hadoop: Hadoop) -> None:
        self.hadoop = hadoop
        rows = write_rows(folder / "rows", 1003)
        environment = os.environ | hadoop.environment
        python = {"PYTHONPATH": os.environ["PYTHONPATH"], "PYSPARK_PYTHON": sys.executable}
        on_yarn = {
            "spark.master": "yarn", "spark.submit.deployMode": "cluster", "spark.executor.instances": "2",
            "spark.executor.memory": "640m", "spark.driver.memory": "768m", "spark.yarn.maxAppAttempts": "2",
            **{f"spark.yarn.appMasterEnv.{key}": value for key, value in python.items()},
            **{f"spark.executorEnv.{key}": value for key, value in python.items()},
            "spark.pyspark.python": sys.executable,
        }  # fmt: skip
        self.on_yarn, self.with_own_driver = (
            Submissions(
                folder / name, settings, f"file:{rows}", out=f"{hadoop.default_fs}/{name}",
                environment=environment, read=self._read,
            )
            for name, settings in (("on-yarn", on_yarn), ("own-driver", {"spark.master": "local[2]"}))
        )  # fmt: skip

    def _read(self, uri: str) -> bytes:
        return self.hadoop.read(uri.removeprefix(self.hadoop.default_fs))


def _kill_master(here: _OnHadoop, engine: str) -> Outcome:
    def kill(process: Process, log: Path) -> None:
        found = wait_for(
            lambda: re.search(r"application_\d+_\d+", log.read_text()), "the application", process=process,
            log=log,
        )  # fmt: skip
        master = "deploy.yarn.ApplicationMaster", found[0], "-Dspark.yarn.app.container.log.dir"
        for one in processes_of(*master):  # the JVM, and the shell that started it
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)

    return here.on_yarn.struck(engine, kill, is_resumed=False)


def _kill_name_node(here: _OnHadoop, engine: str) -> Outcome:
    def come_back() -> None:
        time.sleep(_GONE_S)  # that long is the fault
        here.hadoop.restart_name_node()

    def kill(*_: object) -> Callable[[], None]:
        here.hadoop.kill_name_node()
        return come_back  # a server ends with the thread that has started it

    return here.with_own_driver.struck(engine, kill, is_resumed=False)


@contextmanager
def _opened(folder: Path) -> Iterator[_OnHadoop]:
    folder.mkdir()
    try:
        with Hadoop(folder / "cluster") as hadoop:
            yield _OnHadoop(folder, hadoop)
    except NoJars as why:
        raise NotHere(str(why)) from why


_FAULTS = (
    Fault(
        name="HDFS's NameNode",
        killed=f"gone for {_GONE_S:.0f} s from step {AT + 1} on; the output is there",
        strike=_kill_name_node,
    ),
    Fault(
        name="YARN's application master",
        killed=f"kill -9 of its JVM, in step {AT + 1}; the second attempt resumed",
        strike=_kill_master,
    ),
)


def places(folder: Path) -> list[Place]:
    """Return the places of these faults.

    Args:
        folder: for their files; it is made.
    """
    return [Place(name="Hadoop's servers", opened=partial(_opened, folder), faults=_FAULTS)]
