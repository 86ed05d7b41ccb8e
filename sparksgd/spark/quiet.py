"""Silence about two things that are no fault: a Python worker that Spark lets go of, and Ctrl-C.

Spark closes the socket of a worker that was idle for a minute.  Over a Unix socket the worker's last
flush then fails at once, and PySpark's daemon prints the traceback of a BrokenPipeError, though nothing
is wrong and nothing was lost.

At Ctrl-C PySpark's handler calls into the JVM from within the call that it interrupts, which fails with
two tracebacks; under spark-submit that JVM ends anyway, and elsewhere the end of the session does it.  A
JVM that ends removes files under its tasks, and would log what they say to that.
"""

from __future__ import annotations

import logging
import signal
import socketserver
import sys
import traceback
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pyspark import SparkContext

__all__ = ["end_quietly", "leave_quietly"]

_print_exc = traceback.print_exc


def leave_quietly() -> None:
    """Keep this worker process from reporting that Spark let go of it; other errors are printed."""
    traceback.print_exc = _print_exc_but_goodbye


def _print_exc_but_goodbye(*arguments: object, **options: object) -> None:
    if sys.exc_info()[0] is not BrokenPipeError:
        _print_exc(*arguments, **options)  # type: ignore[arg-type]  # handed through as they came


def end_quietly(context: SparkContext) -> None:
    """Let Ctrl-C raise KeyboardInterrupt in this process, a driver of ours, and do no more."""
    with suppress(Exception):  # a logger of another kind keeps its words
        _log_nothing_at_exit(context._jvm)

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        socketserver.BaseServer.handle_error = lambda *request: None  # type: ignore[method-assign]  # PySpark's accumulators
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # what it cannot do, it raises as well
    logging.getLogger().addFilter(lambda record: "while sending command" not in str(record.msg))


def _log_nothing_at_exit(jvm: Any) -> None:
    """Give a JVM a shutdown hook that turns its log off: no Python is quick enough for that."""
    java, log4j = jvm.java.lang, "org.apache.logging.log4j"
    configurator = java.Class.forName(f"{log4j}.core.config.Configurator")
    signature = java.invoke.MethodType.methodType(java.Void.TYPE, java.Class.forName(f"{log4j}.Level"))
    set_level = java.invoke.MethodHandles.publicLookup().findStatic(configurator, "setRootLevel", signature)
    turn_off = set_level.bindTo(jvm.org.apache.logging.log4j.Level.OFF)
    hook = java.invoke.MethodHandleProxies.asInterfaceInstance(
        java.Class.forName("java.lang.Runnable"), turn_off
    )
    java.Runtime.getRuntime().addShutdownHook(java.Thread(hook))
