"""Ctrl-C and SIGTERM in a driver: the run ends without noise, and in order where its session is ours.

At Ctrl-C, PySpark's handler calls the JVM in the middle of the call that it interrupts.  That fails with two
tracebacks, which py4j logs, and is not needed: a run that ends cancels its jobs.  A JVM that ends also
removes files that its tasks still use, and would log their errors.

spark-submit is a JVM, and the driver's Python is its child.  A scheduler sends SIGTERM to the JVM.  If the
JVM ended then, Python could no longer write to HDFS.  So the JVM passes the signal on to Python, and ends
after it.
"""

from __future__ import annotations

import logging
import os
import socketserver
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from py4j.protocol import Py4JError
from pyspark import SparkContext

from sparksgd.training.interrupts import end_in_order

__all__ = ["end_quietly", "interrupted_quietly"]


def end_quietly(context: SparkContext) -> None:
    """Let Ctrl-C and SIGTERM end this process, a driver with its own session, in order and without noise."""
    with suppress(Exception):  # a logger of another kind keeps logging
        _log_nothing_at_exit(context._jvm)
    with suppress(Exception):  # if the JVM was told to ignore signals
        _hand_signals_on(context)

    def no_more_errors_of_requests() -> None:
        socketserver.BaseServer.handle_error = lambda *request: None  # type: ignore[method-assign]  # PySpark's accumulators

    end_in_order(no_more_errors_of_requests)
    logging.getLogger("py4j").setLevel(logging.CRITICAL)
    _hush()


@contextmanager
def interrupted_quietly() -> Iterator[None]:
    """In the block, let Ctrl-C raise in a session of the user's, but without what py4j tells of it."""
    speak = _hush()
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error.__context__, Py4JError):  # the call that PySpark's handler made
            raise error from None
        raise
    finally:
        speak()


def _hush() -> Callable[[], None]:
    """Let py4j log no tracebacks: what it cannot do, it raises as well; return what ends this."""

    def is_told(record: logging.LogRecord) -> bool:
        is_of_py4j = record.name.startswith("py4j") or "while sending command" in str(record.msg)
        return not (record.exc_info and is_of_py4j)

    loggers = [logging.getLogger(name) for name in (None, "py4j.java_gateway", "py4j.clientserver")]
    for logger in loggers:
        logger.addFilter(is_told)

    def speak() -> None:
        for logger in loggers:
            logger.removeFilter(is_told)

    return speak


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
