"""Silence about one thing that is no fault: a Python worker that Spark lets go of.

Spark closes the socket of a worker that was idle for a minute.  Over a Unix socket the worker's last
flush then fails at once, and PySpark's daemon prints the traceback of a BrokenPipeError, though nothing
is wrong and nothing was lost.
"""

from __future__ import annotations

import sys
import traceback

__all__ = ["leave_quietly"]

_print_exc = traceback.print_exc


def leave_quietly() -> None:
    """Keep this worker process from reporting that Spark let go of it; other errors are printed."""
    traceback.print_exc = _print_exc_but_goodbye


def _print_exc_but_goodbye(*arguments: object, **options: object) -> None:
    if sys.exc_info()[0] is not BrokenPipeError:
        _print_exc(*arguments, **options)  # type: ignore[arg-type]  # handed through as they came
