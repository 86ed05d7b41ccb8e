"""What executors run before rows are dealt: they import the user's modules, as the workers will.

No pyspark at module level: executors import this as it is.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sparksgd.solvers.without_compiler import without_compiler

__all__ = ["NotImported", "import_modules"]


@dataclass(frozen=True, kw_only=True)
class NotImported:
    """A module that an executor could not import."""

    host: str

    executable: str
    """Its Python."""

    module: str

    missing: str | None
    """Which module is not there: itself, or one that it imports; None: another error was raised."""

    told: str
    """That error."""


def import_modules(modules: Iterable[str], partition: Iterable[int]) -> Iterator[NotImported]:
    """Task: import modules, and yield those that cannot be imported."""
    list(partition)
    without_compiler()  # before a module of the user's makes this process's first optimiser
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            yield NotImported(
                host=os.environ.get("NM_HOST") or socket.gethostname(),  # YARN's name of this node
                executable=sys.executable,
                module=module,
                missing=error.name if isinstance(error, ModuleNotFoundError) else None,
                told=f"{type(error).__name__}: {error}",
            )
