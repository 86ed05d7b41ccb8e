"""Runs an arm in a process of its own, with all its temporary files in a folder that is then removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import Task

__all__ = ["ArmFailed", "run_arm"]

_LAST_LINES = 40
ROOT = Path(__file__).parent.parent.parent


class ArmFailed(Exception):
    """An arm's process ended with an error; the message has the end of its log."""


def run_arm(script: str, task: Task) -> Any:
    """Run a script of this folder, and return what it wrote.

    sparksgd's own arms run as `make run` submits them; the others in a session as Spark has it.

    Raises:
        ArmFailed: it ended with an error.
    """
    with tempfile.TemporaryDirectory(prefix="sgd-") as folder:
        task_path, answer_path, log_path = (Path(folder) / name for name in ("task", "answer", "log"))
        scratch = Path(folder) / "tmp"
        scratch.mkdir()
        task_path.write_text(json.dumps(asdict(task)))
        command = [sys.executable, str(Path(__file__).with_name(script)), str(task_path), str(answer_path)]
        with log_path.open("w") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(scratch, task),
                cwd=ROOT,
                start_new_session=True,
            )
            try:
                process.wait()
            finally:
                _end_group(process)
        if process.returncode:
            last = log_path.read_text().splitlines()[-_LAST_LINES:]
            raise ArmFailed(f"{script} ended with {process.returncode}:\n" + "\n".join(last))
        return json.loads(answer_path.read_text())


def _environment(scratch: Path, task: Task) -> dict[str, str]:
    """Say where and with which settings to run, and where temporary files go."""
    properties = "" if task.plain_session else "--properties-file conf/spark-local.conf"
    return os.environ | {
        "PYSPARK_SUBMIT_ARGS": f"--master local[{task.num_workers}] {properties} pyspark-shell",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_DIRS": str(scratch),
        "TMPDIR": str(scratch),
        "JAVA_TOOL_OPTIONS": f"-Djava.io.tmpdir={scratch}",
    }


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the arm: its JVM ends only some time after its Python does."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
