"""Silence about two things that are no fault: a Python worker that Spark lets go of, and Ctrl-C.

Spark closes the socket of a worker that was idle for a minute.  Over a Unix socket the worker's last
flush then fails at once, and PySpark's daemon prints the traceback of a BrokenPipeError, though nothing
is wrong and nothing was lost.

At Ctrl-C PySpark's handler calls into the JVM from within the call that it interrupts, which fails with
two tracebacks; under spark-submit that JVM ends anyway, and elsewhere the end of the session does it.
"""

from __future__ import annotations

import logging
import signal
import sys
import traceback

__all__ = ["end_quietly", "leave_quietly"]

_print_exc = traceback.print_exc


def leave_quietly() -> None:
    """Keep this worker process from reporting that Spark let go of it; other errors are printed."""
    traceback.print_exc = _print_exc_but_goodbye


def _print_exc_but_goodbye(*arguments: object, **options: object) -> None:
    if sys.exc_info()[0] is not BrokenPipeError:
        _print_exc(*arguments, **options)  # type: ignore[arg-type]  # handed through as they came


def end_quietly() -> None:
    """Let Ctrl-C raise KeyboardInterrupt in this process, a driver of ours, and do no more."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # what it cannot do, it raises as well
    logging.getLogger().addFilter(lambda record: "while sending command" not in str(record.msg))
