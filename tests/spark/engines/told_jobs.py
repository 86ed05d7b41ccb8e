"""Jobs of the server's workers that a test tells what happens; without Spark."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pyspark.serializers import CPickleSerializer

from sparksgd.engines.protocol import Recovery
from sparksgd.spark.engines.server_jobs import ServerJobs

__all__ = ["DYING", "Job", "jobs_of"]

DYING = "Cannot run program: the executor is dying"


class Job:
    """A job, as told."""

    def __init__(self, worker: int) -> None:
        self.worker, self.ended, self.is_cancelled = worker, None, False

    def ends(self, with_it: Any = None) -> None:
        """Let it end, with what its task yields, or with an error."""
        self.ended = with_it if isinstance(with_it, RuntimeError) else [CPickleSerializer().dumps([with_it])]

    def isDone(self) -> bool:  # noqa: N802  # it is the JVM's
        return self.ended is not None

    def cancel(self, _: bool) -> None:
        self.is_cancelled = True
        self.ends(RuntimeError("Job 7 cancelled"))

    def get(self) -> Any:
        if isinstance(self.ended, RuntimeError):
            raise self.ended
        return self.ended


def jobs_of(submitted: list[Job], mend: Callable[..., Any] = lambda _: [], **cluster: Any) -> ServerJobs:
    """Return the jobs of a server whose workers are only told."""

    def submit(worker: int, request: int) -> Job:
        submitted.append(Job(worker))
        return submitted[-1]

    context = SimpleNamespace(
        applicationId="app-1", _jsc=None, master="yarn", setJobGroup=lambda *_: None,
        cancelJobGroup=lambda _: None,
    )  # fmt: skip
    lost = SimpleNamespace(look=lambda: None, killed_for_memory=0)
    of_all = {"context": context, "run_id": "run-1", "lost_executors": lost, "running_of": len}
    told = SimpleNamespace(**of_all | cluster)
    return ServerJobs(
        told, Recovery(), 4, submit=submit, mend=mend, is_dying=lambda error: DYING in str(error),
        dying_s=0.0, hung_s=60.0,
    )  # fmt: skip
