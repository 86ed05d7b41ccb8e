"""Servers of a Spark cluster, for tests: each in a log of its own, and none outlives who started it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pyspark

__all__ = [
    "Standalone",
    "kept",
    "node_environment",
    "standalone",
    "start_history_server",
    "start_server",
    "start_spark",
    "stop",
    "wait_for",
]

_KEEPER = Path(__file__).parent / "keeper.py"
_OF_THIS_PYTHON = ("PYTHONPATH", "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON", "VIRTUAL_ENV")
_READY_S = 120
_READY = re.compile(r"(?:Starting Spark master at|registered with master) (spark://\S+)")
_HISTORY_READY = re.compile(r"started at (http://\S+)")

Process = subprocess.Popen[bytes]
T = TypeVar("T")


def node_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a node sees that has Spark, but no package of this Python: neither torch nor sparksgd."""
    seen = {key: value for key, value in environment.items() if key not in _OF_THIS_PYTHON}
    own = Path(sys.executable).parent
    folders = [folder for folder in seen["PATH"].split(os.pathsep) if Path(folder) != own]
    return seen | {"PATH": os.pathsep.join(folders), "SPARK_HOME": str(Path(pyspark.__file__).parent)}


def kept(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str], cwd: Path | None = None
) -> Process:
    """Start a command whose descendants die with it, with the returned process, and with this one."""
    words = [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid()), *command]
    with log.open("w") as opened:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=opened, stderr=subprocess.STDOUT,
            env=environment, cwd=cwd,
            start_new_session=True,  # a Ctrl-C is for who started it, which then stops it
        )  # fmt: skip


def stop(*processes: Process) -> None:
    """Kill what `kept` started, with all that it started itself; return when nothing of it is left."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(
    ready: Callable[[], T | None], what: str, *, process: Process | None = None, log: Path | None = None,
    timeout_s: float = _READY_S,
) -> T:  # fmt: skip
    """Return what a function returns once it is true; in vain, say so with the end of the log."""
    deadline, ended = time.monotonic() + timeout_s, False
    while True:
        ended = process is not None and process.poll() is not None
        found = ready()
        if found:
            return found
        if ended or time.monotonic() > deadline:
            why = "it ended" if ended else f"not within {timeout_s:.0f} s"
            text = "" if log is None else "\n" + log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{what}: {why}{text}")
        time.sleep(0.05)  # servers tell only their logs and pages how they are


def start_spark(
    words: Sequence[str], log: Path, ready: re.Pattern[str], *, environment: Mapping[str, str],
    host: Sequence[str] = (),
) -> tuple[Process, str]:  # fmt: skip
    """Start a class of Spark; return its process, and what it tells its log when it is ready."""
    spark_class = str(Path(sys.executable).parent / "spark-class")
    process = kept([*host, spark_class, *words], log, environment=environment)
    try:
        found = wait_for(lambda: ready.search(log.read_text()), words[0], process=process, log=log)
    except BaseException:
        stop(process)
        raise
    return process, found[1]


def start_server(
    role: str, log: Path, *options: str, environment: Mapping[str, str], host: Sequence[str] = ()
) -> tuple[Process, str]:
    """Start a server in a process group of its own; return it and the master's address, once it knows that.

    Args:
        role: "Master" or "Worker".
        log: where its output goes.
        options: of Spark's class.
        environment: what it sees.
        host: command that runs another one on its host; none for this one.
    """
    words = [f"org.apache.spark.deploy.{role.lower()}.{role}", "--webui-port", "0", *options]
    return start_spark(words, log, _READY, environment=environment, host=host)


def start_history_server(
    log_directory: str, log: Path, *, environment: Mapping[str, str]
) -> tuple[Process, str]:
    """Start a history server of a folder, or URI, of event logs; return it and its http address."""
    settings = {
        "spark.history.fs.logDirectory": log_directory,
        "spark.history.ui.port": "0",
        "spark.history.fs.update.interval": "1s",
    }
    options = " ".join(f"-D{key}={value}" for key, value in settings.items())
    environment = {**environment, "SPARK_HISTORY_OPTS": options}
    words = ["org.apache.spark.deploy.history.HistoryServer"]
    return start_spark(words, log, _HISTORY_READY, environment=environment)


@dataclass(kw_only=True)
class Standalone:
    """A standalone cluster: a master, and a worker for each host."""

    folder: Path
    environment: Mapping[str, str]
    hosts: Sequence[str]
    cores: int
    memory: str
    of_host: Mapping[str, Mapping[str, str]]
    master: Process | None = None
    address: str = ""
    workers: list[Process] = field(default_factory=list)

    def start(self) -> None:
        """Start all servers; each is ready when this returns."""
        log = self.folder / "master.log"
        where = ["--host", self.hosts[0], "--port", "0"]
        self.master, self.address = start_server("Master", log, *where, environment=self.environment)
        for number in range(len(self.hosts)):
            self.workers.append(self._start_worker(number))

    def kill_worker(self, number: int) -> None:
        """Kill a worker with its executors, as if its host were gone."""
        stop(self.workers[number])

    def restart_worker(self, number: int) -> None:
        """Start a killed worker anew."""
        self.workers[number] = self._start_worker(number)

    def close(self) -> None:
        """Kill all servers."""
        stop(*self.workers, *([self.master] if self.master else []))

    def _start_worker(self, number: int) -> Process:
        name, host = f"worker-{number}", self.hosts[number]
        options = ["--host", host, "--cores", str(self.cores), "--memory", self.memory]
        options += ["--work-dir", str(self.folder / name), self.address]
        environment = {**self.environment, **self.of_host.get(host, {})}
        return start_server("Worker", self.folder / f"{name}.log", *options, environment=environment)[0]


@contextmanager
def standalone(
    folder: Path, *, environment: Mapping[str, str], hosts: Sequence[str] = ("127.0.0.1",), cores: int = 1,
    memory: str = "2g", of_host: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[Standalone]:  # fmt: skip
    """Give a cluster for the time of the block.

    Args:
        folder: where logs and the workers' folders go; it is made.
        environment: what all servers see.
        hosts: loopback address of each worker; the master is on the first one.
        cores: of each worker.
        memory: of each worker, as Spark writes it.
        of_host: what servers of a host see besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Standalone(
        folder=folder, environment=environment, hosts=hosts, cores=cores, memory=memory, of_host=of_host or {}
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
