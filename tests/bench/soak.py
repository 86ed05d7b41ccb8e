"""Arm: a long training, during which the driver's memory and temporary files are read off.

The process runs with all temporary folders (Spark's, Java's, Python's) in one empty folder, so that
nothing it writes is overlooked.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import Task
from product import session_of, train_lenet
from pyspark.sql import SparkSession

from sparksgd.engines.protocol import StepReport
from sparksgd.training.state import Observer, Training

_MOST_COLLECTIONS = 20
_SETTLED_SHARE = 0.005


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the driver holds after a step."""

    step: int
    """After how many steps."""

    python_rss_bytes: int
    """Resident memory of the driver's Python process."""

    jvm_rss_bytes: int
    """Resident memory of its JVM, which in local mode is the executor too."""

    jvm_heap_bytes: int
    """Heap that the JVM uses once collections free no more of it."""

    temporary_files: int
    """Files in the temporary folders."""

    temporary_bytes: int
    """Their size."""


class Sampler(Observer):
    """Observer that takes a sample early and one late.

    There is none in between: the collection that it asks for would clean up what had leaked.

    Args:
        session: whose driver is watched.
        steps: when to sample.
    """

    def __init__(self, session: SparkSession, steps: tuple[int, int]) -> None:
        self.samples: list[Sample] = []
        self._jvm: Any = session.sparkContext._jvm
        self._steps = steps

    def stepped(self, training: Training, report: StepReport) -> None:
        """Take a sample, if it is time."""
        if report.step in self._steps:
            self.samples.append(self._sample(report.step))

    def _sample(self, step: int) -> Sample:
        files = temporary_files(Path(tempfile.gettempdir()))
        gc.collect()
        return Sample(
            step=step,
            jvm_heap_bytes=self._settled_heap_bytes(),
            python_rss_bytes=resident_bytes(os.getpid()),
            jvm_rss_bytes=resident_bytes(int(self._jvm.java.lang.ProcessHandle.current().pid())),
            temporary_files=len(files),
            temporary_bytes=sum(files),
        )

    def _settled_heap_bytes(self) -> int:
        """Collect until nothing more goes.

        What one collection finds unreachable, Spark's cleaner then lets go of (each job's broadcast
        of its task), and the next collection frees.
        """
        runtime = self._jvm.java.lang.Runtime.getRuntime()
        before, after = 0, 0
        for _ in range(_MOST_COLLECTIONS):
            self._jvm.System.gc()
            before, after = after, int(runtime.totalMemory() - runtime.freeMemory())
            if abs(after - before) < _SETTLED_SHARE * after:
                break
            time.sleep(1)  # the cleaner has a thread of its own, and no way to ask whether it is done
        return after


def resident_bytes(process: int) -> int:
    """Return a process's resident memory."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def temporary_files(folder: Path) -> list[int]:
    """Return the size of every file below a folder; those that vanish meanwhile are passed over."""
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(parent) / name).lstat().st_size)
            except FileNotFoundError:
                continue
    return sizes


def main(task_path: Path, samples_path: Path) -> None:
    """Train, and write a sample after the warm-up and one after the block."""
    task = Task.read(task_path)
    session = session_of(task)
    steps = task.warmup_steps + task.block_steps
    sampler = Sampler(session, (task.warmup_steps, steps))
    train_lenet(session, task, steps=steps, shards_per_worker=1, observers=[sampler])
    session.stop()
    samples_path.write_text(json.dumps([asdict(sample) for sample in sampler.samples]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
