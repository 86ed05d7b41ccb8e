"""Restrict torch to one instruction set, by environment variables that it reads when it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from sparksgd.errors import ConfigError

__all__ = ["pin", "variables"]

_VARIABLES = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_CBWR": "AVX512",
    },
}


def variables(instruction_set: str | None) -> Mapping[str, str]:
    """Return the environment variables that restrict torch, oneDNN and MKL to an instruction set."""
    return {} if instruction_set is None else _VARIABLES[instruction_set]


def pin(instruction_set: str | None) -> None:
    """Restrict this process to an instruction set.

    Raises:
        ConfigError: torch was imported before, with other settings.
    """
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
