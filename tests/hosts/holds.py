"""The test's side of tests/modules/holding.py: where a run waits, and its leave to go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from servers import Process, wait_for

__all__ = ["Hold"]


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A run that is held at a step until it has been struck.

    Args:
        folder: of the run's and the test's files.
        at: which step, from 1.
    """

    folder: Path
    at: int

    @property
    def settings(self) -> tuple[str, ...]:
        """What the run is to be configured with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return ("model.name=holding:HeldNet", f"model.folder={self.folder}", f"model.at={self.at}")

    def wait(self, workers: int = 1, *, process: Process | None = None, log: Path | None = None) -> list[int]:
        """Return the processes that wait, once there are so many; see `wait_for` for the rest."""
        what = f"{workers} workers that are held at step {self.at}"
        return wait_for(lambda: self._held(workers), what, process=process, log=log, timeout_s=290)

    def _held(self, workers: int) -> list[int]:
        held = [int(file.name.partition("-")[2]) for file in self.folder.glob("held-*")]
        return held if len(held) >= workers else []

    def go(self) -> None:
        """Let the run go on."""
        (self.folder / "go").touch()
