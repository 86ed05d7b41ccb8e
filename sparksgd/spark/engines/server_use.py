"""What the server and its workers did since the last step, for its report."""

from __future__ import annotations

from sparksgd.engines.protocol import ServerUse, StepTiming
from sparksgd.engines.replies import WorkerReport
from sparksgd.peers.server_desk import ServerDesk
from sparksgd.peers.server_frames import Here, Times

__all__ = ["UseSinceStep"]


class UseSinceStep:
    """Counts from one step to the next.

    Args:
        desk: knows for how long it waited.
    """

    def __init__(self, desk: ServerDesk) -> None:
        self._desk, self._idle_before_s = desk, desk.idle_s
        self.workers: list[WorkerReport] = []
        """Whose turns ended, and when."""

        self.update_s = 0.0
        """For how long the solver computed."""

        self.lost_workers = 0
        """How many connections ended."""

        self._waited_s = 0.0

    def begin(self) -> None:
        """Note that a step begins: the waits of an evaluation before it are not its own."""
        self._idle_before_s = self._desk.idle_s

    def note_turn(self, worker: int, here: Here, rows: int, times: Times) -> None:
        """Note a turn that a worker made."""
        self._waited_s += times.waited_s
        self.workers.append(
            WorkerReport(
                worker=worker,
                host=here.host,
                rows=rows,
                started_at_s=times.started_at_s,
                ended_at_s=times.started_at_s + times.computed_s,
                numerics=here.numerics,
            )
        )

    def timing(self, total_s: float) -> StepTiming:
        """Return the timing of a step that took so long."""
        slowest_s = max((report.compute_s for report in self.workers), default=0.0)
        return StepTiming(total=total_s, compute=slowest_s, update=self.update_s)

    def told(self, total_s: float) -> ServerUse:
        """Return what is reported of it."""
        return ServerUse(
            busy_s=max(0.0, total_s - (self._desk.idle_s - self._idle_before_s)),
            waited_s=self._waited_s,
            computed_s=sum(report.compute_s for report in self.workers),
            lost_workers=self.lost_workers,
        )
