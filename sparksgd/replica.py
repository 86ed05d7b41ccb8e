"""A worker of the all-reduce engine: it computes, sums with the others, and updates, step after step.

    gradients of its shards ── part-reduce ──> its strip of the sum
    solver of its strip ── part-broadcast ──> all parameters, at every worker

Where a solver cannot be updated by strips, the sums are broadcast instead, and every worker's
solver updates everything.  Either way all workers hold the same bits after each step.  A process keeps its
strip from one segment to the next while the mesh stands, though Spark may make it another worker.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sparksgd.allreduce import AllReduce
from sparksgd.compute import Computer, located
from sparksgd.errors import ClusterError, PeerLost, PeerSilent, SparkSGDError, UserCodeError
from sparksgd.flat import FlatStrip
from sparksgd.mesh import Meeting, Mesh
from sparksgd.numerics import Numerics, thread_count
from sparksgd.shard import Descriptor
from sparksgd.solvers.protocol import MakeReplica, Solver, SolverState

__all__ = ["STEP_RECORD", "Replica", "Segment", "SegmentAnswer"]

STEP_RECORD = np.dtype(
    [
        ("rows", "<i8"),  # of all workers
        ("shards", "<i8"),
        ("loss", "<f8"),  # summed over the rows
        ("lr", "<f8"),
        ("own_rows", "<i8"),
        ("started_at_s", "<f8"),
        ("computed_at_s", "<f8"),
        ("ended_at_s", "<f8"),
        ("reduce_s", "<f8"),
        ("update_s", "<f8"),
        ("broadcast_s", "<f8"),
    ]
)
"""One step as one worker saw it; times by its own clock."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What a worker is asked to do."""

    meeting: Meeting
    """Where to find the others."""

    first_step: int
    """From 0."""

    steps: int
    """How many."""

    owned: Sequence[Sequence[int]]
    """The shards of each worker."""

    by_strips: bool
    """Whether each worker updates only its strip."""

    make_replica: MakeReplica
    """Makes a solver."""

    overlaps: bool = False
    """Whether parts of a gradient go out while others are computed; each worker has one shard then."""


@dataclass(kw_only=True)
class SegmentAnswer:
    """What one worker did."""

    worker: int
    host: str
    numerics: Numerics

    rank: int = 0
    """Which strip it updates."""

    steps: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, STEP_RECORD))
    """STEP_RECORD[n]: steps that were finished."""

    state: SolverState | None = None
    """The solver's, of this process's strip; of everything from rank 0 alone where there are no strips."""

    parameters_sha256: str | None = None
    """Where every solver updates everything: what it ended with."""

    lacks_state: bool = False
    """Whether nothing was done, because this process has no solver of that step, and was given no state."""

    failure: SparkSGDError | None = None
    """What went wrong, as a value."""

    sent_bytes: int = 0
    """Bytes of vectors sent to other workers."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Strangers at this process's door since its last answer, by the reason."""


class Replica:
    """What one process keeps of a run.

    Args:
        computer: of the run.
    """

    def __init__(self, computer: Computer) -> None:
        self._computer = computer
        self._mesh = Mesh()
        self._solver: Solver | None = None

    def meet(self, worker: int, meeting: Meeting) -> ClusterError | None:
        """Meet the others, and return what was in the way."""
        try:
            self._mesh.meet(meeting, worker)
        except ClusterError as error:
            return error
        return None

    def run(
        self,
        worker: int,
        shards: Iterable[Descriptor],
        segment: Segment,
        load: Callable[[], SolverState] | None,
    ) -> SegmentAnswer:
        """Make the steps of a segment with the others.

        Args:
            worker: which one this is.
            shards: its shards.
            segment: what to do.
            load: gives the solver's state at the first step; None where this process should have kept it.

        Raises:
            ClusterError: the workers did not meet; raised, for then the others must be ended, too.
            PeerSilent: another worker hangs; likewise.
        """
        answer = SegmentAnswer(worker=worker, host=socket.gethostname(), numerics=self._computer.numerics)
        own = list(shards)
        sent_before, made = self._mesh.sent_bytes, 0
        records = np.zeros(segment.steps, STEP_RECORD)
        stands = self._mesh.meet(segment.meeting, worker)
        kept = self._solver if stands else None
        if (kept is None or kept.step != segment.first_step) and load is None:
            self.close()
            answer.lacks_state = True
            return answer
        try:
            with (
                thread_count(self._computer.plan.threads),
                AllReduce(
                    self._mesh, segment.owned, self._computer.flat, overlaps=segment.overlaps
                ) as allreduce,
            ):
                if load is not None:
                    self._solver = kept = self._loaded(segment, load(), allreduce.strip)
                assert kept is not None
                for record in records:  # a record is a view of its row
                    self._step(worker, own, segment, kept, allreduce, record)
                    made += 1
            answer.rank = self._mesh.rank
            if segment.by_strips or answer.rank == 0:
                answer.state = kept.state()
            if not segment.by_strips:
                answer.parameters_sha256 = self._computer.flat.parameters_sha256()
        except PeerSilent as error:
            self.close()
            raise located(error, worker, f"step {segment.first_step + made + 1}") from error
        except SparkSGDError as error:
            self._solver, answer.failure = None, error
            if isinstance(error, PeerLost):
                answer.failure = located(error, worker, f"step {segment.first_step + made + 1}")
            silent = self._mesh.leave()
            if silent and isinstance(error, UserCodeError):
                raise  # as a value it would wait for those who hang
            if silent:
                raise PeerSilent(f"workers {silent} hang, after this on worker {worker}: {error}") from error
        except BaseException:
            self.close()
            raise
        answer.steps = records[:made]
        answer.sent_bytes = self._mesh.sent_bytes - sent_before
        answer.dropped = self._mesh.take_dropped()
        return answer

    def close(self) -> None:
        """Leave the others, who see so at once, and forget the solver."""
        self._mesh.close()
        self._solver = None

    def _loaded(self, segment: Segment, state: SolverState, strip: range) -> Solver:
        """Return a solver that is where the segment begins."""
        flat = self._computer.flat
        flat.load(state.weights)
        solver = segment.make_replica(FlatStrip(flat, strip) if segment.by_strips else flat)
        solver.load_state(state.strip(strip) if segment.by_strips else state)
        return solver

    def _step(
        self,
        worker: int,
        shards: list[Descriptor],
        segment: Segment,
        solver: Solver,
        allreduce: AllReduce,
        record: Any,
    ) -> None:
        step, flat = solver.step, self._computer.flat
        record["started_at_s"] = time.time()
        take_part = partial(allreduce.take_part, step) if allreduce.overlaps else None
        computed = self._computer.gradients(worker, shards, None, step, take_part=take_part)
        if computed.failure is not None:
            raise computed.failure
        record["computed_at_s"] = time.time()
        total = allreduce.part_reduce(step, computed.partials)
        reduced_at_s = time.time()
        assert total.rows == self._computer.plan.sampling.rows_of_step(step), (total.rows, step)
        record["rows"], record["shards"], record["loss"] = total.rows, total.shards, total.loss
        record["own_rows"] = computed.workers[0].rows
        record["reduce_s"] = reduced_at_s - record["computed_at_s"]
        if segment.by_strips:
            record["lr"] = solver.receive(total).lr
            halfway_s = time.time()
            allreduce.part_broadcast(step, flat.parameters.numpy())
        else:
            strip, gradient = allreduce.strip, flat.gradient.numpy()
            gradient[strip.start : strip.stop] = total.gradient
            allreduce.part_broadcast(step, gradient)
            halfway_s = time.time()
            record["lr"] = solver.receive(replace(total, gradient=gradient)).lr
        record["ended_at_s"] = time.time()
        halves = halfway_s - reduced_at_s, record["ended_at_s"] - halfway_s
        record["update_s"], record["broadcast_s"] = halves if segment.by_strips else halves[::-1]
