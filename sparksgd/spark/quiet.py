"""Silence about two things that are no fault: a Python worker that Spark lets go of, and an end by signal.

Spark closes the socket of a worker that was idle for a minute.  Over a Unix socket the worker's last
flush then fails at once, and PySpark's daemon prints the traceback of a BrokenPipeError, though nothing
is wrong and nothing was lost.

At Ctrl-C PySpark's handler calls into the JVM from within the call that it interrupts, which fails with
two tracebacks; the end of the session does what it meant to.  A JVM that ends removes files under its
tasks, and would log what they say to that.

spark-submit is a JVM, whose child is the driver's Python: a scheduler's SIGTERM goes to the JVM, which would
end, and take with it the way to HDFS.  So it hands the signal on to Python, and ends when that has.
"""

from __future__ import annotations

import logging
import os
import socketserver
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sparksgd.interrupts import end_in_order

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
    """Let Ctrl-C and SIGTERM end this process, a driver of ours, in order and without noise."""
    with suppress(Exception):  # a logger of another kind keeps its words
        _log_nothing_at_exit(context._jvm)
    with suppress(Exception):  # where the JVM was told to leave signals alone
        _hand_signals_on(context)

    def no_more_errors_of_requests() -> None:
        socketserver.BaseServer.handle_error = lambda *request: None  # type: ignore[method-assign]  # PySpark's accumulators

    end_in_order(no_more_errors_of_requests)
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


def _hand_signals_on(context: SparkContext) -> None:
    """Let a JVM answer SIGTERM and Ctrl-C by sending this process a SIGTERM, and go on."""
    assert context._gateway is not None
    jvm: Any = context._jvm
    java, signals = jvm.java.lang, jvm.sun.misc
    process = java.Class.forName("java.lang.ProcessHandle")
    signature = java.invoke.MethodType.methodType(java.Boolean.TYPE)
    destroy = java.invoke.MethodHandles.publicLookup().findVirtual(process, "destroy", signature)
    ignored = context._gateway.new_array(java.Class, 1)
    ignored[0] = java.Class.forName("sun.misc.Signal")
    handler = java.invoke.MethodHandleProxies.asInterfaceInstance(
        java.Class.forName("sun.misc.SignalHandler"),
        java.invoke.MethodHandles.dropArguments(
            destroy.bindTo(java.ProcessHandle.of(os.getpid()).get()), 0, ignored
        ),
    )
    for name in ("TERM", "INT"):
        signals.Signal.handle(signals.Signal(name), handler)
