"""A worker of the all-reduce engine: it makes its shards' turns, sums with the others, and updates.

    messages of its shards ── part-reduce ──> its strip of the sum
    solver of its strip ── part-broadcast ──> all parameters, at every worker

If a solver cannot be updated by strips, the sums are broadcast instead, and the solver of every worker
updates everything.  In both cases all workers have the same bits after each step.  A process keeps its strip
from one segment to the next as long as the mesh is kept, even if Spark makes it another worker.
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

from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.data.shard import Descriptor
from sparksgd.engines.compute import Computer
from sparksgd.engines.replies import with_place
from sparksgd.engines.trial.outside import watch_steps
from sparksgd.errors import (
    ClusterError,
    PeerLost,
    PeerSilent,
    SparkSGDError,
    TrainingError,
    UserCodeError,
)
from sparksgd.peers.mesh import Meeting, Mesh
from sparksgd.peers.part_reduce import AllReduce
from sparksgd.solvers.protocol import MakeReplica, RoundSolver, SolverState, Vector, total_weight

__all__ = ["STEP_TIMES", "Replica", "Segment", "SegmentAnswer"]

STEP_TIMES = np.dtype(
    [
        ("rows", "<i8"),  # of all workers
        ("shards", "<i8"),
        ("weight", "<f8"),
        ("loss", "<f8"),  # mean over the rows
        ("lr", "<f8"),
        ("turn", "<i8"),  # turns that every shard had made after it
        ("own_rows", "<i8"),
        ("started_at_s", "<f8"),
        ("computed_at_s", "<f8"),
        ("ended_at_s", "<f8"),
        ("reduce_s", "<f8"),
        ("update_s", "<f8"),
        ("broadcast_s", "<f8"),
    ]
)
"""One step as one worker saw it; times by its own clock, seconds since the epoch or of a part."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What a worker is asked to do in a segment."""

    meeting: Meeting
    """Where to find the others."""

    version: int
    """The version of the weights that it begins with."""

    steps: int
    """How many to make."""

    owned: Sequence[Sequence[int]]
    """The shards of each worker."""

    by_strips: bool
    """Whether each worker updates only its strip."""

    make_replica: MakeReplica
    """Makes a solver."""

    overlaps: bool = False
    """Whether parts of a gradient are sent while others are computed; each worker must have one shard."""


@dataclass(kw_only=True)
class SegmentAnswer:
    """What one worker did."""

    worker: int
    host: str
    numerics: Numerics

    rank: int = 0
    """Which strip it updates."""

    steps: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, STEP_TIMES))
    """STEP_TIMES[n]: steps that were finished."""

    state: SolverState | None = None
    """The solver's state: of this process's strip, or, without strips, the whole of it from rank 0 only."""

    parameters_sha256: str | None = None
    """Digest of the parameters that it ended with, if every solver updates everything."""

    lacks_state: bool = False
    """Whether nothing was done: this process has no solver at that step, and was given no state."""

    failure: SparkSGDError | None = None
    """What went wrong, as a value."""

    sent_bytes: int = 0
    """Bytes of vectors that it sent to other workers."""

    dropped: Counter[str] = field(default_factory=Counter)
    """How many connections it refused since its last answer, by reason."""


class Replica:
    """What one process keeps of a run.

    Args:
        computer: of the run.
    """

    def __init__(self, computer: Computer) -> None:
        self._computer = computer
        # Halves with local models leave their weights in the computer's module, not the centre's.
        apart = computer.plan.halves.have_local_models
        self._flat = FlatModule(copied(computer.plan.module), computer.plan.dtype) if apart else computer.flat
        self._mesh = Mesh()
        self._solver: RoundSolver | None = None

    def meet(self, worker: int, meeting: Meeting) -> ClusterError | None:
        """Meet the others; return the error that prevented it, or None."""
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
            load: returns the solver's state at the first step; None if this process should have kept it.

        Raises:
            ClusterError: the workers did not meet.  It is raised, so that Spark ends the others, too.
            PeerSilent: another worker hangs; raised for the same reason.
        """
        answer = SegmentAnswer(worker=worker, host=socket.gethostname(), numerics=self._computer.numerics)
        own = list(shards)
        sent_before, made = self._mesh.sent_bytes, 0
        records = np.zeros(segment.steps, STEP_TIMES)
        stands = self._mesh.meet(segment.meeting, worker)
        kept = self._solver if stands else None
        if (kept is None or kept.version != segment.version) and load is None:
            self.close()
            answer.lacks_state = True
            return answer
        try:
            with (
                self._computer.many_rounds(),
                AllReduce(self._mesh, segment.owned, self._flat, overlaps=segment.overlaps) as allreduce,
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
                answer.parameters_sha256 = self._flat.parameters_sha256()
        except PeerSilent as error:
            self.close()
            raise with_place(error, worker, f"step {segment.version + made + 1}") from error
        except SparkSGDError as error:
            self._solver, answer.failure = None, error
            if isinstance(error, PeerLost):
                answer.failure = with_place(error, worker, f"step {segment.version + made + 1}")
            silent = self._mesh.leave()
            if silent and isinstance(error, UserCodeError):
                raise  # returned as a value, it would wait for the workers that hang
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
        """Leave the others, who notice at once, and forget the solver."""
        self._mesh.close()
        self._solver = None

    def _loaded(self, segment: Segment, state: SolverState, strip: range) -> RoundSolver:
        """Return a solver at the step where the segment begins."""
        flat = self._flat
        if segment.by_strips and flat is self._computer.flat:
            flat.map_twice()
        assert segment.by_strips or not flat.is_mapped, "a solver of everything may write what forward reads"
        flat.load(state.weights)
        solver = segment.make_replica(FlatStrip(flat, strip) if segment.by_strips else flat)
        solver.load_state(state.strip(strip) if segment.by_strips else state)
        watch_steps(getattr(solver, "optimizers", ()))  # a rule may have none
        return solver

    def _step(
        self,
        worker: int,
        shards: list[Descriptor],
        segment: Segment,
        solver: RoundSolver,
        allreduce: AllReduce,
        record: Any,
    ) -> None:
        step, flat, first = solver.version, self._flat, solver.turns
        turns, shape = solver.turns_at(first), solver.shape_at(first)
        record["started_at_s"] = time.time()
        record["turn"] = first + turns
        take_part = partial(allreduce.take_part, step) if allreduce.overlaps else None
        answer = replace(solver.answer(), weights=flat.view(step))
        computed = self._computer.round(worker, shards, answer, take_part=take_part)
        if computed.failure is not None:
            raise computed.failure
        record["computed_at_s"] = time.time()
        total = allreduce.part_reduce(step, computed.partials, shape)
        reduced_at_s = time.time()
        sampling = self._computer.plan.sampling
        if total.rows != sampling.rows_of_round(range(first, first + turns)):
            raise TrainingError(
                f"messages of {total.rows} rows came in step {step + 1}: a shard with rows sent none, which "
                f"the all-reduce engine does not carry"
            )
        record["rows"], record["shards"] = total.rows, total.shards
        record["weight"] = total_weight(total)
        record["loss"] = total.loss / total_weight(total)
        record["own_rows"] = computed.workers[0].rows
        record["reduce_s"] = reduced_at_s - record["computed_at_s"]
        if segment.by_strips:
            record["lr"] = solver.receive(total).lr
            halfway_s = time.time()
            allreduce.part_broadcast(step, flat.parameters.numpy())
        else:
            vectors = {
                name: self._whole(step, number, total.vectors[name], allreduce)
                for number, name in enumerate(shape.vectors)
            }
            halfway_s = time.time()
            record["lr"] = solver.receive(replace(total, vectors=vectors)).lr
        record["ended_at_s"] = time.time()
        halves = halfway_s - reduced_at_s, record["ended_at_s"] - halfway_s
        record["update_s"], record["broadcast_s"] = halves if segment.by_strips else halves[::-1]

    def _whole(self, step: int, number: int, strip_sum: Vector, allreduce: AllReduce) -> Vector:
        """Return a whole vector of sums, of which each process has a strip."""
        strip = allreduce.strip
        vector = self._flat.gradient.numpy() if number == 0 else np.empty_like(self._flat.gradient.numpy())
        vector[strip.start : strip.stop] = strip_sum
        allreduce.part_broadcast(step, vector)
        return vector
