"""Runs an arm in a process of its own, with all its temporary files in a folder that is then removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import Task
from pyspark.find_spark_home import _find_spark_home
from turns import TURNS, TurnsOf

__all__ = ["ArmFailed", "job_s", "run_arm", "run_in_turns"]

_LAST_LINES = 40
_JAVA = "SPARK_SUBMIT_OPTS"
_MALLOC = {  # as sparksgd's workers set them: for the other arms, but those of a plain session
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
}
ROOT = Path(__file__).parent.parent.parent


class ArmFailed(Exception):
    """An arm's process ended with an error; the message has the end of its log."""


class _Arm:
    """A script of this folder in a process of its own; sparksgd's own arms run as `make run` submits them."""

    def __init__(self, script: str, task: Task, *, takes_turns: bool = False) -> None:
        self._script = script
        self._folder = tempfile.TemporaryDirectory(prefix="sgd-")
        folder = Path(self._folder.name)
        self._answer, self._log = folder / "answer", folder / "log"
        task_path, scratch = folder / "task", folder / "tmp"
        scratch.mkdir()
        task_path.write_text(json.dumps(asdict(task)))
        environment = _environment(scratch, task)
        self.turns = TurnsOf(folder / "turns") if takes_turns else None
        if self.turns is not None:
            environment[TURNS] = str(self.turns.path)
        command = [sys.executable, str(Path(__file__).with_name(script)), str(task_path), str(self._answer)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> _Arm:
        return self

    def __exit__(self, *_: object) -> None:
        _end_group(self.process)
        if self.turns is not None:
            self.turns.close()
        self._folder.cleanup()

    def answer(self) -> Any:
        """Return what it wrote, once it has ended."""
        if self.process.wait():
            last = self._log.read_text().splitlines()[-_LAST_LINES:]
            raise ArmFailed(f"{self._script} ended with {self.process.returncode}:\n" + "\n".join(last))
        return json.loads(self._answer.read_text())


def run_arm(script: str, task: Task) -> Any:
    """Run a script of this folder alone, and return what it wrote.

    Raises:
        ArmFailed: it ended with an error.
    """
    with _Arm(script, task) as arm:
        return arm.answer()


def run_in_turns(arms: Sequence[tuple[str, Task]]) -> list[Any]:
    """Run scripts of this folder side by side, one of them working at a time; return what each wrote.

    Raises:
        ArmFailed: one ended with an error.
    """
    with ExitStack() as stack:
        running = [stack.enter_context(_Arm(script, task, takes_turns=True)) for script, task in arms]
        waiting = list(running)
        while waiting:
            for arm in list(waiting):
                assert arm.turns is not None
                while not arm.turns.give():
                    if arm.process.poll() is not None:
                        waiting.remove(arm)
                        break
        return [arm.answer() for arm in running]


def job_s(script: Path, words: Sequence[str], task: Task, *, warm: bool) -> float:
    """Submit a job, and return how long it took, from spark-submit's start to its end.

    Args:
        script: what to submit.
        words: its arguments.
        task: where to run, and with which settings.
        warm: whether Spark has what `make warm` gives it; else it is as pip installed it.

    Raises:
        ArmFailed: it ended with an error.
    """
    settings = [] if task.plain_session else ["--properties-file", str(ROOT / "conf" / "spark-local.conf")]
    with tempfile.TemporaryDirectory(prefix="sgd-") as folder:
        environment = _environment(Path(folder), task) | {"PYTHONPATH": str(Path(__file__).parent)}
        del environment["PYSPARK_SUBMIT_ARGS"]
        home = Path(_find_spark_home())
        if not warm:
            environment.pop(_JAVA, None)
            home = _as_installed(home, Path(folder, "spark"))
        elif "SharedArchiveFile" not in environment.get(_JAVA, ""):
            raise ArmFailed(f"{_JAVA} names no archive of Spark's classes: run it by `make bench`")
        environment["SPARK_HOME"] = str(home)
        submit = [str(home / "bin" / "spark-submit"), "--master", f"local[{task.num_workers}]"]
        started = time.perf_counter()
        done = subprocess.run(
            [*submit, *settings, str(script), *words], env=environment, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        took_s = time.perf_counter() - started
    if done.returncode:
        raise ArmFailed(f"{script.name} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return took_s


def _as_installed(spark: Path, copy: Path) -> Path:
    """Return a Spark whose pyspark.zip has no bytecode, and whose other files are links to another's."""
    library = Path("python", "lib")
    (copy / library).mkdir(parents=True)
    for folder in (Path(), library.parent, library):
        for entry in (spark / folder).iterdir():
            if not (copy / folder / entry.name).exists() and entry.name != "pyspark.zip":
                (copy / folder / entry.name).symlink_to(entry)
    with (
        zipfile.ZipFile(spark / library / "pyspark.zip") as warm,
        zipfile.ZipFile(copy / library / "pyspark.zip", "w", zipfile.ZIP_DEFLATED) as bare,
    ):
        for name in warm.namelist():
            if not name.endswith(".pyc"):
                bare.writestr(name, warm.read(name))
    return copy


def _environment(scratch: Path, task: Task) -> dict[str, str]:
    """Say where and with which settings to run, and where temporary files go."""
    where = f"--master local[{task.num_workers}]"
    if task.master is not None:
        where = f"--master {task.master} --total-executor-cores {task.num_workers} --executor-cores 1"
        where += f" --executor-memory 700m --conf spark.executorEnv.PYTHONPATH={Path(__file__).parent}"
    properties = "" if task.plain_session else "--properties-file conf/spark-local.conf"
    not_inherited = {"PYTHONDONTWRITEBYTECODE", *([_JAVA] if task.plain_session else [])}
    inherited = {key: value for key, value in os.environ.items() if key not in not_inherited}
    return inherited | {
        "PYSPARK_SUBMIT_ARGS": f"{where} {properties} pyspark-shell",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_DIRS": str(scratch),
        "TMPDIR": str(scratch),
        "JAVA_TOOL_OPTIONS": f"-Djava.io.tmpdir={scratch}",
        **({} if task.plain_session else _MALLOC),
    }


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the arm: its JVM ends only some time after its Python does."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
