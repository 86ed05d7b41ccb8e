"""Ctrl-C and SIGTERM in a driver whose session is ours: the run ends in order, and without noise.

At Ctrl-C, PySpark's handler calls the JVM in the middle of the call that it interrupts.  That fails with two
tracebacks, and is not needed: the end of the session cancels the jobs.  A JVM that ends also removes files
that its tasks still use, and would log their errors.

spark-submit is a JVM, and the driver's Python is its child.  A scheduler sends SIGTERM to the JVM.  If the
JVM ended then, Python could no longer write to HDFS.  So the JVM passes the signal on to Python, and ends
after it.
"""

from __future__ import annotations

import logging
import os
import socketserver
from contextlib import suppress
from typing import Any

from pyspark import SparkContext

from sparksgd.training.interrupts import end_in_order

__all__ = ["end_quietly"]


def end_quietly(context: SparkContext) -> None:
    """Let Ctrl-C and SIGTERM end this process, a driver with its own session, in order and without noise."""
    with suppress(Exception):  # a logger of another kind keeps logging
        _log_nothing_at_exit(context._jvm)
    with suppress(Exception):  # if the JVM was told to ignore signals
        _hand_signals_on(context)

    def no_more_errors_of_requests() -> None:
        socketserver.BaseServer.handle_error = lambda *request: None  # type: ignore[method-assign]  # PySpark's accumulators

    end_in_order(no_more_errors_of_requests)
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # what it cannot do, it raises as well
    logging.getLogger().addFilter(lambda record: "while sending command" not in str(record.msg))


def _log_nothing_at_exit(jvm: Any) -> None:
    """Give the JVM a shutdown hook that turns its log off: Python would be too slow for that."""
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
    """Make the JVM answer SIGTERM and Ctrl-C by sending SIGTERM to this process, and go on."""
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
