"""Trainings that are submitted by spark-submit, and held at a step until they are struck."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median

from experiment import AT, OF_ENGINE, replayed, said
from holds import Hold
from servers import Process
from table import BACKUP, RECORDED, SERVER, Outcome

from sparksgd.config import Config
from sparksgd.errors import SparkSGDError
from sparksgd.storage import location

__all__ = ["Strike", "Submissions"]

Strike = Callable[[Process, Path], Callable[[], None] | None]
"""Strikes a held run: its process, and its log; returns what is to be done while the run goes on."""

_ROOT = Path(__file__).resolve().parents[2]
_CALM_RUNS = 2


class Submissions:
    """Submits trainings of a HeldNet.

    Args:
        folder: for logs and holds; it is made.
        settings: of Spark.
        rows: path of the rows.
        out: where the runs' folders go, a path or URI; None: the folder.
        environment: what spark-submit sees.
        words: of spark-submit, beside the settings.
        read: returns a file of the output, by its path or URI.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str],
        rows: str,
        *,
        out: str | None = None,
        environment: Mapping[str, str] = os.environ,
        words: tuple[str, ...] = (),
        read: Callable[[str], bytes] = lambda path: Path(path).read_bytes(),
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self._rows, self._out = folder, rows, out or str(folder)
        self._environment, self._read = environment, read
        settings = {"spark.ui.enabled": "false", **settings}
        self._spark = [word for key, value in settings.items() for word in ("--conf", f"{key}={value}")]
        self._spark += words
        self._calm: dict[str, tuple[float, str]] = {}

    def struck(self, engine: str, strike: Strike, *, is_resumed: bool = True) -> Outcome:
        """Submit a training, strike it in step `AT` + 1, and submit it again if that ended it.

        Args:
            engine: its name.
            strike: what strikes it.
            is_resumed: whether the same command is to go on after the strike; else the run itself goes on.
        """
        calm_s, reference = self._undisturbed(engine)
        name, hold = f"struck-{engine}", Hold(folder=self.folder / f"hold-{engine}", at=AT + 1)
        command, log = self._command(engine, name, hold), self.folder / f"{name}.log"
        started_s = time.perf_counter()

        def meanwhile(process: Process) -> None:
            hold.wait(workers=2, process=process, log=log)
            then = strike(process, log)
            hold.go()
            if then is not None:
                then()

        status, told = self._run(command, log, meanwhile), log
        if is_resumed:
            told = self.folder / f"{name}-again.log"
            status = self._run(command, told)
        lost_s = time.perf_counter() - started_s - calm_s
        text = told.read_text(errors="replace")
        if status:
            errors = re.findall(r"error: .*", text) or [text[-200:]]
            return Outcome(result=f"status {status}: {errors[-1]}", is_right=False)
        try:
            right = self._is_right(engine, name, hold, reference)
        except SparkSGDError as error:
            return Outcome(result=said(error), is_right=False)
        words = ["same bits" if right else "OTHER BITS, or other lines of metrics"]
        goes_on = re.findall(r"resumed from step \d+|\d+ steps were lost", text)
        if is_resumed and not goes_on:
            words.append("BUT IT BEGAN ANEW")
            right = False
        words += goes_on
        return Outcome(result="; ".join(words), is_right=right, lost_s=lost_s)

    def _is_right(self, engine: str, name: str, hold: Hold, reference: str) -> bool:
        """Return whether a run has the bits of an undisturbed one, or of its replay, and all metrics."""
        steps = self._steps(name)
        if engine in RECORDED:
            config = Config.load(None, self._settings(engine, hold))
            reference = replayed(config, self._rows, location(f"{self._out}/{name}"))
        return self._digest(name) == reference and (steps > 0 if engine == SERVER else steps == _STEPS)

    def _undisturbed(self, engine: str) -> tuple[float, str]:
        """Return the median time of undisturbed runs, and the bits at which they end."""
        if engine not in self._calm:
            took_s = []
            for number in range(_CALM_RUNS):
                hold = Hold(folder=self.folder / f"hold-calm-{engine}", at=AT + 1)
                name = f"calm-{engine}-{number}"
                command, log = self._command(engine, name, hold), self.folder / f"{name}.log"
                hold.go()
                started_s = time.perf_counter()
                status = self._run(command, log)
                took_s.append(time.perf_counter() - started_s)
                if status:
                    raise RuntimeError(f"an undisturbed run ended with {status}: {log.read_text()[-3000:]}")
            self._calm[engine] = median(took_s), self._digest(f"calm-{engine}-0")
        return self._calm[engine]

    def _settings(self, engine: str, hold: Hold) -> list[str]:
        return [
            f"data.train={self._rows}", "engine.num_workers=2", "train.num_shards=4", f"train.steps={_STEPS}",
            "train.epochs=4", "train.rows_per_step=64", "optimizer.lr=0.1", "checkpoint.every_steps=5",
            *hold.settings, "model.inputs=16", "model.classes=4", *OF_ENGINE[engine], *_HERE.get(engine, ()),
        ]  # fmt: skip

    def _command(self, engine: str, name: str, hold: Hold) -> list[str]:
        sets = [word for setting in self._settings(engine, hold) for word in ("--set", setting)]
        submit = str(Path(sys.executable).parent / "spark-submit")
        job = [str(_ROOT / "jobs" / "train.py"), *sets, "--out", f"{self._out}/{name}"]
        return [submit, *self._spark, *job]

    def _run(self, command: list[str], log: Path, meanwhile: Callable[[Process], None] | None = None) -> int:
        """Submit a job; return its status, or the signal that ended it, below 0."""
        with log.open("w") as opened:
            process = subprocess.Popen(
                command, cwd=self.folder, env=dict(self._environment), stdin=subprocess.DEVNULL,
                stdout=opened, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            if meanwhile is not None:
                meanwhile(process)
            return process.wait(timeout=280)
        finally:
            _end(process)

    def _digest(self, name: str) -> str:
        return json.loads(self._read(f"{self._out}/{name}/summary.json"))["parameters_sha256"]

    def _steps(self, name: str) -> int:
        """Return how many steps the metrics have; 0 if one is missing or twice there."""
        lines = self._read(f"{self._out}/{name}/metrics.jsonl").splitlines()
        steps = [json.loads(line)["step"] for line in lines if json.loads(line)["kind"] == "step"]
        return len(steps) if steps == list(range(1, len(steps) + 1)) else 0


_STEPS = 24
_HERE = {
    "allreduce": ("engine.segment_steps=2",),
    SERVER: ("checkpoint.every_steps=1",),  # a turn of all shards, and four messages
    BACKUP: ("engine.num_workers=3", "train.num_shards=3"),
}


def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
