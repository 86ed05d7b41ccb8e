"""Servers of a standalone Spark cluster, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["start_server"]

_READY_S = 60
_READY = re.compile(r"(?:Starting Spark master at|registered with master) (spark://\S+)")


def start_server(
    role: str, log: Path, *options: str, environment: Mapping[str, str], host: Sequence[str] = ()
) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server in a process group of its own; return it and the master's address, once it knows that.

    Args:
        role: "Master" or "Worker".
        log: where its output goes.
        options: of Spark's class.
        environment: what it sees.
        host: command that runs another one on its host; none for this one.
    """
    spark_class = str(Path(sys.executable).parent / "spark-class")
    words = [*host, spark_class, f"org.apache.spark.deploy.{role.lower()}.{role}", "--webui-port", "0"]
    with log.open("w") as opened:
        process = subprocess.Popen(
            [*words, *options], stdout=opened, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        address = _READY.search(log.read_text())
        if address:
            return process, address[1]
        time.sleep(0.1)  # a server tells only its log that it is ready
    os.killpg(process.pid, signal.SIGKILL)
    raise RuntimeError(log.read_text())
