"""Restrict torch to one instruction set, by environment variables that it reads when it is imported.

torch believes these variables: on a CPU without the instruction set the process would die by SIGILL.  So the
CPU is asked first, where it can be: Linux lists its flags in /proc/cpuinfo.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparksgd.errors import ConfigError

__all__ = ["HELD_BY", "Machine", "best_of", "pin", "refuse", "variables"]

HELD_BY = "ATEN_CPU_CAPABILITY"
"""The environment variable that tells torch's own kernels what to use."""

_VARIABLES = {
    "default": {
        HELD_BY: "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    },
    "avx2": {
        HELD_BY: "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
    },
    "avx512": {
        HELD_BY: "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_CBWR": "AVX512",
    },
}
_FLAGS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
    "avx2": ("avx2", "fma"),
    "default": (),
}
"""What torch's dispatcher asks of a CPU before it chooses an instruction set itself; the best comes first."""

_X86 = ("x86_64", "amd64", "i686", "i386", "x86")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine's CPU, as far as it is known."""

    name: str
    """The host's, for errors."""

    architecture: str
    """As `platform.machine()` says; "" if it does not know."""

    cpuinfo: str
    """The lines of /proc/cpuinfo, or those of them that list flags; "" where there is no such file."""

    @classmethod
    def here(cls, cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
        """Return this machine."""
        try:
            text = cpuinfo.read_text(errors="replace")
        except OSError:
            text = ""
        return cls(name="this machine", architecture=platform.machine(), cpuinfo=text)

    def lacks(self, instruction_set: str) -> tuple[str, ...]:
        """Return the flags that an instruction set needs and a core of this machine has not.

        Nothing, if it cannot be known.
        """
        wanted = _FLAGS.get(instruction_set, ())
        if self.architecture and self.architecture.lower() not in _X86:
            return wanted
        lines = [line.partition(":")[2] for line in self.cpuinfo.splitlines() if line.startswith("flags")]
        cores = [set(line.split()) for line in lines]
        return tuple(flag for flag in wanted if not all(flag in core for core in cores))


def refuse(instruction_set: str | None, machines: Iterable[Machine], called: str) -> None:
    """Refuse an instruction set that a machine does not have.

    Args:
        instruction_set: what is asked for; None: nothing.
        machines: where torch would use it.
        called: what asks for it, for the error.

    Raises:
        ConfigError: with the machine, what it lacks, and the best that all of them have.
    """
    if instruction_set is None:
        return
    machines = list(machines)
    for machine in machines:
        lacking = machine.lacks(instruction_set)
        if lacking:
            raise ConfigError(
                f"{called} is {instruction_set!r}, but the CPU of {machine.name}"
                f" ({machine.architecture}) has no {', '.join(lacking)}: torch would die by an illegal "
                f"instruction. Set it to {best_of(machines)!r}, or leave it out"
            )


def best_of(machines: Iterable[Machine]) -> str:
    """Return the best instruction set that all of these machines have."""
    machines = list(machines)
    return next(name for name in _FLAGS if not any(machine.lacks(name) for machine in machines))


def variables(instruction_set: str | None) -> Mapping[str, str]:
    """Return the environment variables that restrict torch, oneDNN and MKL to an instruction set."""
    return {} if instruction_set is None else _VARIABLES[instruction_set]


def pin(instruction_set: str | None, machine: Machine | None = None) -> None:
    """Restrict this process to an instruction set.

    Args:
        instruction_set: which; None: the best of this machine, or what the environment says.
        machine: this one.

    Raises:
        ConfigError: this machine does not have it, or torch was imported before, with other settings.
    """
    asked, called = instruction_set, "train.instruction_set"
    if asked is None:
        asked, called = os.environ.get(HELD_BY), f"{HELD_BY}, an environment variable,"
    if asked is not None:
        refuse(asked, [machine or Machine.here()], called)
    wanted = variables(instruction_set)
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    if "torch" in sys.modules:
        raise ConfigError(
            f"train.instruction_set is {instruction_set!r}, but torch is already imported: set "
            + " ".join(f"{name}={value}" for name, value in wanted.items())
            + " in the environment before Python starts"
        )
    os.environ.update(wanted)
