"""Ctrl-C in a program whose session is the user's; a socket that never answers stands for the JVM."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
from py4j.clientserver import ClientServer, JavaParameters, PythonParameters
from py4j.java_gateway import GatewayClient, JavaMember

from sparksgd.spark.signals import interrupted_quietly

FAILED = "Exception while sending command."


class Silent:
    """Takes calls as a JVM does, and answers none."""

    def __init__(self) -> None:
        self._server, self._taken = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()
        threading.Thread(target=self._take, daemon=True).start()
        port = self._server.getsockname()[1]
        self._gateway = ClientServer(JavaParameters(port=port), PythonParameters(port=0))
        self.client: GatewayClient = self._gateway._gateway_client

    def call(self, name: str) -> None:
        JavaMember(name, None, "o1", self.client)()

    def close(self) -> None:
        self._gateway.shutdown_callback_server()
        self._server.shutdown(socket.SHUT_RDWR)
        for each in (self._server, *self._taken):
            each.close()

    def _take(self) -> None:
        try:
            while True:
                taken, _ = self._server.accept()
                self._taken.append(taken)
        except OSError:  # closed
            return


@pytest.fixture
def jvm() -> Iterator[Silent]:
    """Yield a JVM that is silent; Ctrl-C is handled as PySpark does it."""
    silent = Silent()

    def cancel_all(*_: object) -> None:
        try:
            silent.call("cancelAllJobs")
        finally:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, cancel_all)
    try:
        yield silent
    finally:
        signal.signal(signal.SIGINT, before)
        silent.close()


def interrupted(jvm: Silent, block: AbstractContextManager[None]) -> str:
    """Press Ctrl-C in a call to the JVM; return the traceback of what that raises."""

    def ctrl_c() -> None:
        while sys._current_frames()[threading.main_thread().ident].f_code.co_name != "readinto":
            time.sleep(0.01)  # nothing tells that it waits for the answer
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ctrl_c, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as raised, block:
        jvm.call("collect")
    return "".join(traceback.format_exception(raised.value))


def test_by_itself_py4j_logs_tracebacks(jvm: Silent, caplog: pytest.LogCaptureFixture) -> None:
    assert "During handling of the above" in interrupted(jvm, nullcontext())
    assert FAILED in caplog.messages  # otherwise the next test would show nothing


def test_ctrl_c_in_a_training_raises_with_one_traceback_and_logs_none(
    jvm: Silent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert "During handling of the above" not in interrupted(jvm, interrupted_quietly())
    assert not [record for record in caplog.records if record.exc_info]


def test_afterwards_py4j_logs_again_and_others_always_do(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("a user's own")
    with interrupted_quietly():
        with interrupted_quietly():
            logging.error("a user's message", exc_info=error)
        logging.error(FAILED, exc_info=error)
        assert caplog.messages == ["a user's message"]
    logging.error(FAILED, exc_info=error)
    logging.getLogger("py4j.clientserver").error("of py4j", exc_info=error)
    assert caplog.messages == ["a user's message", FAILED, "of py4j"]
