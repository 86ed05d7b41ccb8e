"""Driver and executors: Java, Python, packages, instruction sets, cores, and the disks of the shards."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich.filesize import decimal

from sparksgd.arithmetic.instruction_set import Machine, best_of
from sparksgd.errors import SparkSGDError
from sparksgd.spark.cluster.environments import ExecutorPython, require_fit
from sparksgd.spark.doctor.findings import Finding, bad, broken, good, poor, unseen

__all__ = [
    "PACKAGES",
    "Executor",
    "free_on_disks",
    "judge_cores",
    "judge_driver",
    "judge_executors",
    "judge_instruction_sets",
    "judge_java",
    "listed_disks",
]

PACKAGES = ("torch", "numpy", "pyarrow", "pandas")
"""Whose versions are compared; of sparksgd the digest is, when it computes."""

_OLDEST_JAVA = 17
_MOST_TOLD = 4
_SAME = "ship one environment to all: `make dist`, --archives (jobs/README.md, The archive)"


@dataclass(frozen=True, kw_only=True)
class Executor:
    """What one executor said of itself."""

    python: ExecutorPython

    process: int
    """Of its JVM, on its host."""

    java: str | None
    """Its version, as 17.0.2; None: not known."""

    python_version: str

    versions: Mapping[str, str | None]
    """Of PACKAGES; None: not there."""

    cpus: int
    """Cores that its processes may use."""

    memory_bytes: int
    """All memory of its machine."""

    free_bytes: Mapping[str, int]
    """Of each disk with local directories of Spark, by a name that all its executors give it."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """Return an answer of `environment_tasks.survey`."""
        return cls(**{**answer, "python": ExecutorPython(**answer["python"])})

    @property
    def host(self) -> str:
        """Return its host."""
        return self.python.host


def judge_java(driver: str, found: Sequence[Executor]) -> Finding:
    """Return what is to be said of Java.

    Args:
        driver: its version at the driver, as 17.0.2.
        found: the executors.
    """
    known = {one.java for one in found if one.java is not None}
    versions = sorted({driver, *known}, key=_major)
    old = [version for version in versions if _major(version) < _OLDEST_JAVA]
    seen = driver if known == {driver} else f"{driver} at the driver; on executors {', '.join(sorted(known))}"
    if old:
        return bad("Java", seen, f"install Java {_OLDEST_JAVA} or newer where it is {', '.join(old)}")
    if not known:
        return unseen("Java", f"{driver} at the driver; that of executors cannot be read")
    if len({_major(version) for version in versions}) > 1:
        return poor("Java", seen, "give all hosts the same major version (JAVA_HOME)")
    return good("Java", seen)


def _major(version: str) -> int:
    """Return the major version: 17 of 17.0.2, 8 of 1.8.0_402."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    return numbers[1] if numbers[0] == 1 and len(numbers) > 1 else numbers[0]


def judge_driver(spark: str, own: str | None, versions: Mapping[str, str | None]) -> Finding:
    """Return what the driver has; it runs this, so it has what it needs.

    Args:
        spark: version of Spark.
        own: of sparksgd.
        versions: of PACKAGES.
    """
    parts = [f"sparksgd {own}", f"Spark {spark}", f"Python {platform.python_version()}", *_listed(versions)]
    return good("driver", ", ".join(parts))


def judge_executors(
    found: Sequence[Executor],
    executors: int,
    *,
    own: str | None,
    versions: Mapping[str, str | None],
    instruction_set: str | None,
) -> Iterator[Finding]:
    """Yield what is to be said of the executors' Python.

    Args:
        found: what they said.
        executors: how many there are.
        own: version of the driver's sparksgd.
        versions: of the driver's PACKAGES.
        instruction_set: what the configuration asks for.
    """
    processes = {(one.host, one.process) for one in found}
    hosts = len({host for host, _ in processes})
    which = f"{_count(len(processes), 'executor')} on {_count(hosts, 'host')}"
    unfit = [_unfit(one, own, instruction_set) for one in found]
    refused = {str(error): error for error in unfit if error is not None}
    for error in list(refused.values())[:_MOST_TOLD]:
        yield broken("their Python", error, _SAME)
    if len(refused) > _MOST_TOLD:
        yield bad("their Python", f"and {len(refused) - _MOST_TOLD} more of these", _SAME)
    kinds = Counter(", ".join([f"Python {one.python_version}", *_listed(one.versions)]) for one in found)
    if len(kinds) > 1 and not refused:
        told = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        yield poor("their Python", f"{which} have different packages: {told}", _SAME)
    elif not refused:
        others = [
            f"{name} {one.versions[name] or 'none'}, but {version} at the driver"
            for name, version in versions.items()
            for one in found[:1]
            if one.versions.get(name) != version
        ]
        if others:
            yield poor("their Python", f"{which}: {'; '.join(others)}", _SAME)
        else:
            yield good("their Python", f"{which}, with the driver's packages")
    if len(processes) < executors:
        yield poor(
            "their Python",
            f"{len(processes)} of {executors} executors answered: the others had no free slot",
            "look again when no other job holds the slots",
        )


def _unfit(one: Executor, own: str | None, instruction_set: str | None) -> SparkSGDError | None:
    """Return the error that a run would end with on this executor."""
    try:
        require_fit([one.python], own, instruction_set)
    except SparkSGDError as error:
        return error
    return None


def judge_instruction_sets(
    driver: Machine, found: Sequence[Executor], instruction_set: str | None
) -> Finding:
    """Return what is to be said of the CPUs: machines of different ones compute different bits.

    Args:
        driver: its machine.
        found: the executors.
        instruction_set: what the configuration holds all machines to.
    """
    machines = [driver, *(one.python.machine for one in found)]
    best = {machine.name: best_of([machine]) for machine in machines}
    common = best_of(machines)
    if instruction_set is not None:
        return good("instruction set", f"{instruction_set} (train.instruction_set); all have {common}")
    if len(set(best.values())) == 1:
        return good("instruction set", f"{common} on every machine")
    seen = "; ".join(f"{name}: {kind}" for name, kind in sorted(best.items())[: 2 * _MOST_TOLD])
    return poor(
        "instruction set",
        f"{seen}: bits depend on where a worker runs",
        f"--set train.instruction_set={common}",
    )


def judge_cores(found: Sequence[Executor], slots_of_executor: int, threads: int) -> Finding:
    """Return whether the hosts have a core for each thread of their workers.

    Args:
        found: the executors.
        slots_of_executor: how many tasks one executor runs at once.
        threads: of a worker.
    """
    executors = Counter(host for host, _ in {(one.host, one.process) for one in found})
    cpus = {one.host: one.cpus for one in found}
    wanted = {host: count * slots_of_executor * threads for host, count in executors.items()}
    crowded = [
        f"{host} runs {wanted[host]} threads of workers on {_count(cpus[host], 'core')}"
        for host in sorted(wanted)
        if wanted[host] > cpus[host]
    ]
    if crowded:
        return poor(
            "cores",
            "; ".join(crowded[:_MOST_TOLD]),
            "fewer --executor-cores (local: local[N]), or set engine.num_workers: workers would take turns",
        )
    each = sorted(set(cpus.values()))
    return good(
        "cores",
        f"{' or '.join(map(str, each))} on a host, for {max(wanted.values())} threads of workers at most",
    )


def free_on_disks(found: Sequence[Executor]) -> dict[str, int]:
    """Return the free bytes of every disk, each once."""
    return {disk: free for one in found for disk, free in one.free_bytes.items()}


def listed_disks(free: Mapping[str, int]) -> str:
    """Return the free bytes of disks, for a line."""
    told = [f"{decimal(size)} on {disk.rpartition(':')[0]}" for disk, size in sorted(free.items())]
    more = f" and {len(told) - _MOST_TOLD} more disks" if len(told) > _MOST_TOLD else ""
    return ", ".join(told[:_MOST_TOLD]) + more


def _listed(versions: Mapping[str, str | None]) -> list[str]:
    return [f"{name} {version or 'none'}" for name, version in versions.items()]


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"
