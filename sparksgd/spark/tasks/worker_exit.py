"""The end of a Python worker, which would look like a fault.

Spark closes the socket of a worker that was idle for a minute.  Over a Unix socket the worker's last flush
then fails at once, and PySpark's daemon prints the traceback of a BrokenPipeError, although nothing was lost.
"""

from __future__ import annotations

import sys
import traceback

__all__ = ["leave_quietly"]

_print_exc = traceback.print_exc


def leave_quietly() -> None:
    """Let this worker process ignore that Spark closed its socket; other errors are printed."""
    traceback.print_exc = _print_exc_but_goodbye


def _print_exc_but_goodbye(*arguments: object, **options: object) -> None:
    if sys.exc_info()[0] is not BrokenPipeError:
        _print_exc(*arguments, **options)  # type: ignore[arg-type]  # passed on unchanged
