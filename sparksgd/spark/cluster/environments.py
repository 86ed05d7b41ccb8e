"""The Python of the executors: whether it can train, and how to bring what it lacks."""

from __future__ import annotations

import re
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark import cloudpickle

from sparksgd.arithmetic.instruction_set import HELD_BY, Machine, refuse
from sparksgd.errors import ConfigError, ModelError, SparkSGDError
from sparksgd.imports import shortened
from sparksgd.spark.tasks import environment_tasks

__all__ = [
    "NEEDED",
    "ExecutorPython",
    "by_value",
    "cannot_start",
    "missing_module",
    "own_version",
    "require_fit",
]

NEEDED = ("numpy", "pandas", "pyarrow", "torch", "sparksgd")
"""What executors import."""

_ARCHIVE = (
    "`make dist` builds dist/environment.tar.gz: submit with --archives dist/environment.tar.gz#environment "
    "and --conf spark.pyspark.python=./environment/bin/python (conf/spark-*.conf set it), or install it on "
    "every host"
)
_ZIP = "`make dist` builds dist/sparksgd.zip: submit with --py-files dist/sparksgd.zip"

_OTHER_PYTHON = re.compile(
    r"Python in worker has different version:? \(?(\d+)(?:\.|, )(\d+)\)? than that in driver:? (\d+\.\d+)"
)
_NO_PROGRAM = re.compile(
    r'Cannot run program "([^"]+)"[^\n]*error[=:] ?(?:2|13)\b.*PythonWorkerFactory', re.DOTALL
)
"""Errors 2 and 13 of the system: it is not there, or may not be run."""

_ON_HOST = re.compile(r"\(TID \d+\) \((\S+) executor")

_registering = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ExecutorPython:
    """What the Python of an executor said of itself."""

    host: str

    executable: str

    missing: tuple[str, ...]
    """Modules of NEEDED that it does not find."""

    version: str | None
    """Of its sparksgd; None if it has none that can be imported."""

    held: str | None
    """The instruction set that its environment holds torch to."""

    architecture: str

    cpuinfo: str
    """Lines of /proc/cpuinfo that list flags, if they were asked for."""

    unpacked: tuple[int, int, float, float] | None
    """Device and inode of its unpacked environment (if they differ on one host, there are two copies), and
    when that was written, from when to when."""

    @property
    def machine(self) -> Machine:
        """Return its machine."""
        return Machine(name=self.host, architecture=self.architecture, cpuinfo=self.cpuinfo)


def by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function of `environment_tasks` that is pickled with its code, not by its name."""
    with _registering:
        cloudpickle.register_pickle_by_value(environment_tasks)  # type: ignore[no-untyped-call]  # it has no types
        try:
            data = cloudpickle.dumps(function)  # type: ignore[no-untyped-call]  # as above
        finally:
            cloudpickle.unregister_pickle_by_value(environment_tasks)  # type: ignore[no-untyped-call]  # as above
    copy: Callable[..., Any] = cloudpickle.loads(data)
    return copy


def own_version() -> str | None:
    """Return the version of the driver's sparksgd."""
    (own,) = environment_tasks.look((), HELD_BY, False, False, ())
    version: str | None = own["version"]
    return version


def _here(python: ExecutorPython) -> str:
    """Return what to do if the executors are on this machine, but in another Python than this program."""
    if python.host != socket.gethostname() or python.executable == sys.executable:
        return ""
    return f"set PYSPARK_PYTHON={sys.executable}, which runs this program, before its session starts; or "


def require_fit(found: Sequence[ExecutorPython], version: str | None, instruction_set: str | None) -> None:
    """Refuse executors whose Python cannot train.

    Args:
        found: what they said.
        version: of the driver's sparksgd.
        instruction_set: what the configuration asks for.

    Raises:
        ConfigError: something is missing, or of another version, or a CPU cannot do what is asked.
    """
    for python in found:
        where = f"the executors' Python on {python.host} ({python.executable})"
        foreign = [name for name in python.missing if name != "sparksgd"]
        if foreign:
            raise ConfigError(f"{where} lacks {' and '.join(foreign)}: {_here(python)}{_ARCHIVE}")
        if python.missing:
            raise ConfigError(f"{where} lacks sparksgd: {_ZIP}")
        if python.version != version:
            raise ConfigError(
                f"sparksgd is {python.version or 'damaged'} for {where}, but {version} at the driver: "
                f"{_ZIP}, and remove the other one from that host or from its environment"
            )
    machines = [python.machine for python in found]
    refuse(instruction_set, machines, "train.instruction_set")
    for python in found:
        refuse(python.held, [python.machine], f"spark.executorEnv.{HELD_BY}")


def missing_module(name: str, where: str = "", by: str = "") -> SparkSGDError:
    """Return the error of a module that executors could not import.

    Args:
        name: of the module.
        where: the host, if it is known.
        by: what imports the module, if that is another one than the user named.
    """
    words = f"the executors' Python{where} finds no module {name!r}{by}: "
    top = name.partition(".")[0]
    if top == "sparksgd":
        return ConfigError(words + _ZIP)
    if top in NEEDED:
        return ConfigError(words + _ARCHIVE)
    return ModelError(
        f"{words}ship it with --py-files (.py files, or a zip of a package of pure Python). A package with "
        f"compiled code runs from no zip: add it to the environment of --archives, or install it on every "
        f"host"
    )


def cannot_start(text: str, hosts: Sequence[str] = ()) -> ConfigError | None:
    """Return the error of executors whose Python does not start, or is another one than the driver's.

    Args:
        text: what Spark says of a failed job.
        hosts: where its tasks failed, if the text does not say it.
    """
    host = _ON_HOST.search(text)
    where = host[1] if host else shortened(", ".join(hosts))
    on = f" on {where}" if where else ""
    if other := _OTHER_PYTHON.search(text):
        return ConfigError(
            f"the executors' Python{on} is {other[1]}.{other[2]}, but the driver's is {other[3]}, and "
            f"Spark needs the same minor version: name one that every host has, --conf "
            f"spark.pyspark.python=/path/to/python{other[3]}; or ship one, --archives "
            f"dist/environment.tar.gz#environment and --conf spark.pyspark.python=./environment/bin/python "
            f"(jobs/README.md, The archive)"
        )
    if none := _NO_PROGRAM.search(text):
        return ConfigError(
            f"there is no {none[1]}{on}, which executors shall run as their Python: name one that every host "
            f"has, --conf spark.pyspark.python=/path/to/python3; or ship one, --archives "
            f"dist/environment.tar.gz#environment (jobs/README.md, On a cluster)"
        )
    return None
