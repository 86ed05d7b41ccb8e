"""What executors run before rows are dealt: they import the user's modules, as the workers will.

No pyspark at module level: executors import this as it is.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sparksgd.errors import ModelError
from sparksgd.imports.same_code import ImportedBefore, having_code
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

    is_other_code: bool = False
    """Whether a module can be imported, but is not the driver's."""

    was_imported_before: bool = False
    """Whether it was imported before its file got the driver's code, so that another worker would do."""


def import_modules(
    modules: Iterable[str], code: Mapping[str, str], partition: Iterable[int]
) -> Iterator[NotImported]:
    """Task: import modules, and yield those that cannot be imported.

    Args:
        modules: their names.
        code: what they are made of at the driver, see `needed_code`.
        partition: of no meaning.
    """
    list(partition)
    without_compiler()  # before a module of the user's makes this process's first optimiser
    try:
        with having_code(code):
            for module in modules:
                try:
                    importlib.import_module(module)
                except Exception as error:
                    missing = error.name if isinstance(error, ModuleNotFoundError) else None
                    yield _not_imported(module, f"{type(error).__name__}: {error}", missing=missing)
    except ModelError as error:
        is_old = isinstance(error, ImportedBefore)
        yield _not_imported("", str(error), is_other_code=True, was_imported_before=is_old)


def _not_imported(module: str, told: str, missing: str | None = None, **kind: bool) -> NotImported:
    return NotImported(
        host=os.environ.get("NM_HOST") or socket.gethostname(),  # YARN's name of this node
        executable=sys.executable,
        module=module,
        missing=missing,
        told=told,
        **kind,
    )
