"""The all-reduce engine: one long barrier-mode Spark job for many steps.

    driver ── the solver's state, unless they kept it ──> workers: many steps, see replica.py
    driver <── the state of each strip, and the times of each step ── workers

Workers exchange gradients over connections of their own (wire.py), which they find through the
driver (mesh.py).  A segment is a transaction: if a worker is lost, the solver does not change, and the
segment is run again.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial, reduce
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark import Broadcast

from sparksgd.config import EngineConfig
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.kinds import ALLREDUCE
from sparksgd.engines.protocol import SegmentReport, StepReport, StepTiming, step_report
from sparksgd.engines.replies import WorkerReport, failure_to_tell
from sparksgd.errors import (
    ClusterError,
    GradientChanged,
    NotFinite,
    PeerLost,
    UpdateNotFinite,
)
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.mesh import Rendezvous
from sparksgd.peers.replica import Segment, SegmentAnswer
from sparksgd.peers.strangers import StrangersLog
from sparksgd.solvers.protocol import RoundSolver, SolverState
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.engines.base import SparkEngine
from sparksgd.spark.tasks import step_tasks

__all__ = ["AllReduceEngine", "encrypts", "next_length", "rendezvous_of"]

log = logging.getLogger("sparksgd")

_FIRST_STEPS = 4
_SEGMENT_S = 3.0
_LONGEST_SEGMENT_S = 10.0
_OVERHEAD = 0.03  # the share of a segment's time that its start and end may take
_GROWTH = 8
_OVERLAP_PAYS_S = 0.002  # seconds of a step's sum; a shorter one is mostly work, not waiting


class AllReduceEngine(SparkEngine):
    """Runs many steps as one Spark job, in which workers exchange their sums directly.

    Args:
        cluster: where the workers are.
        config: how long segments are, and how workers connect.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = ALLREDUCE.name
    mode = ALLREDUCE.mode

    def __init__(
        self, cluster: Cluster, config: EngineConfig, plan: Plan, shards: Shards, test: Shards | None
    ) -> None:
        super().__init__(cluster, config, plan, shards, test)
        self._fixed_steps = config.segment_steps
        self.segment_steps = config.segment_steps or _FIRST_STEPS
        self._turn_s: float | None = None  # how long a turn of the last segment took
        self._before: tuple[SolverState, int] | None = None
        # Of the state that the workers' own solvers should have: its version and revision.
        self._kept: tuple[int, int] | None = None
        self._processes_stay = True
        self._can_overlap = (
            config.overlap != "never"
            and cluster.num_workers == len(plan.sampling.shard_rows)
            and plan.rows_per_backward is None
            and plan.halves.send_gradients
        )
        self._overlaps = self._can_overlap and config.overlap == "always"
        self._rendezvous = rendezvous_of(cluster, config, cluster.num_workers)
        self._strangers = StrangersLog()

    @staticmethod
    def check(cluster: Cluster, config: EngineConfig) -> None:
        """Refuse what cannot work at the driver, before the rows are dealt.

        Raises:
            ClusterError: no port is free.
            ConfigError: the package for encryption is not installed.
        """
        rendezvous = rendezvous_of(cluster, config, cluster.num_workers)
        try:
            rendezvous.start()
        finally:
            rendezvous.close()

    def open(self) -> None:
        """Listen at the driver, and send the plan to the workers; only the first call does it."""
        if not self._is_open:
            self._rendezvous.start()
        super().open()

    def close(self) -> None:
        """Stop listening; the workers then close their connections."""
        self._rendezvous.close()
        self._note_dropped(())
        self._strangers.say(is_last=True)
        super().close()

    def obstacle(self) -> str | None:
        """Let the workers meet once; return why they cannot, or need not, else None."""
        if self._cluster.num_workers == 1:
            return "there is only one worker, which has no other to exchange sums with"
        self._context.setJobDescription("sparksgd: whether workers reach each other")
        task = partial(step_tasks.meet, self._shipped, self._rendezvous.call(), self._workers)
        failures = self._run(lambda: self._map(self._shards, task).collect(), self._shards, "first meeting")
        reasons = [failure for failure in failures if failure is not None]
        reasons.sort(key=lambda failure: isinstance(failure, PeerLost))  # who only heard of it comes last
        return f"workers cannot sum among themselves: {reasons[0]}" if reasons else None

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        """Make steps; fewer where rounds are long, or where a loss is not finite: the next call tells it."""
        started = time.perf_counter()
        steps, turns = self._as_long(solver, steps)
        start, first, first_turn = solver.state(), solver.version, solver.turns
        doing = f"steps {first + 1} to {first + steps} on {self._cluster.num_workers} workers"
        self._context.setJobDescription(f"sparksgd: {doing}")
        limit_s = self._step_timeout_s * turns
        if self._turn_s is not None:
            limit_s = self._step_timeout_s + 2 * self._turn_s * turns
        answers = self._run(lambda: self._segment(solver, start, steps), self._shards, doing, limit_s)
        diverged = [answer for answer in answers if answer.failure is not None]
        if diverged:
            earliest = min(diverged, key=lambda answer: (len(answer.steps), answer.worker))
            assert earliest.failure is not None
            if len(earliest.steps):
                return self.advance(solver, len(earliest.steps))
            if not isinstance(earliest.failure, UpdateNotFinite):
                self._make_last_step_again(solver)
            raise earliest.failure
        wall_s = time.perf_counter() - started
        report = SegmentReport(
            steps=self._reports(first, answers, wall_s),
            sent_bytes=sum(answer.sent_bytes for answer in answers),
        )
        self._choose_length(report, first_turn, wall_s)
        by_rank = sorted(answers, key=lambda answer: answer.rank)
        states = [answer.state for answer in by_rank if answer.state is not None]
        solver.load_state(SolverState.joined(states) if solver.by_strips else states[0])
        self._before = start, steps
        self._kept = (solver.version, solver.revision) if self._processes_stay else None
        return report

    def _make_last_step_again(self, solver: RoundSolver) -> None:
        """Let the driver's solver make the last step itself: it can only step back from its own step."""
        if self._before is None or self._before[1] == 1:
            return
        start, steps = self._before
        solver.load_state(start)
        self.advance(solver, steps - 1)
        self.advance(solver, 1)

    def _segment(self, solver: RoundSolver, start: SolverState, steps: int) -> list[SegmentAnswer]:
        """Run a segment once; return the answers of the workers, in their order.

        The state is sent only if the workers cannot have it, because that costs a tenth of a short segment.

        Raises:
            SparkSGDError: the failure, except a loss that is not finite, which is an answer.
        """
        is_kept = self._kept == (solver.version, solver.revision)
        state = None if is_kept else self._context.broadcast(start)
        self._kept = None
        try:
            answers = self._answers(solver, state, steps)
        finally:
            self._clear_behind(state)
        self._note_dropped(answers)
        if any(answer.lacks_state for answer in answers):
            self._processes_stay = (
                False  # if there are more slots than workers, Spark may use other processes
            )
            return self._segment(solver, start, steps)
        failures = [answer.failure for answer in answers if answer.failure is not None]
        raised = [failure for failure in failures if not isinstance(failure, (PeerLost, NotFinite))]
        if raised and all(isinstance(failure, GradientChanged) for failure in raised):
            log.warning("from now on gradients are sent whole: %s", raised[0])
            self._can_overlap = self._overlaps = False
            return self._segment(solver, start, steps)
        if raised:
            raise reduce(failure_to_tell, raised)
        if failures and not any(isinstance(failure, NotFinite) for failure in failures):
            raise failures[0]
        if len({answer.parameters_sha256 for answer in answers}) > 1 and not failures:
            raise ClusterError(
                "workers that all update everything ended with different parameters: their machines compute "
                "differently; set train.instruction_set, or use an elementwise optimiser without "
                "solver.clip_norm"
            )
        return [answer for answer in answers if not isinstance(answer.failure, PeerLost)]

    def _answers(
        self, solver: RoundSolver, state: Broadcast[SolverState] | None, steps: int
    ) -> list[SegmentAnswer]:
        """Ask all workers for a segment, once."""
        worker_of = {
            shard: self._workers[partition] for shard, partition in self._shards.partition_of.items()
        }
        owned = [
            sorted(shard for shard, worker in worker_of.items() if worker == number)
            for number in range(self._cluster.num_workers)
        ]
        segment = Segment(
            meeting=self._rendezvous.call(),
            version=solver.version,
            steps=steps,
            owned=owned,
            by_strips=solver.by_strips,
            make_replica=solver.make_replica(),
            overlaps=self._overlaps,
        )
        task = partial(step_tasks.segment, self._shipped, state, segment, self._workers)
        return sorted(self._map(self._shards, task).collect(), key=lambda answer: answer.worker)

    def _reports(self, before: int, answers: Sequence[SegmentAnswer], wall_s: float) -> list[StepReport]:
        """Return the reports of a segment's steps; the first one includes the segment's start and end."""
        times = np.stack([answer.steps for answer in answers])
        compute = (times["computed_at_s"] - times["started_at_s"]).max(axis=0)
        aggregate = times["reduce_s"].min(axis=0)  # of the worker that began last: the others waited for it
        update = times["update_s"].max(axis=0)
        spread = times["broadcast_s"].min(axis=0)
        total = np.diff(times["ended_at_s"], axis=1, prepend=times["started_at_s"][:, :1]).max(axis=0)
        launch = np.zeros_like(total)
        launch[0] = max(0.0, wall_s - total.sum())
        return [
            step_report(
                self._plan,
                version=before + index,
                turn=int(exact["turn"]),
                rows=int(exact["rows"]),
                weight=float(exact["weight"]),
                shards=int(exact["shards"]),
                loss=float(exact["loss"]),
                lr=float(exact["lr"]),
                timing=StepTiming(
                    total=float(total[index] + launch[index]),
                    broadcast=float(spread[index]),
                    launch=float(launch[index]),
                    compute=float(compute[index]),
                    aggregate=float(aggregate[index]),
                    update=float(update[index]),
                ),
                workers=[_worker_report(answer, answer.steps[index]) for answer in answers],
                took_part=tuple(range(len(self._plan.sampling.shard_rows))),
            )
            for index, exact in enumerate(answers[0].steps)
        ]

    def _choose_length(self, report: SegmentReport, first_turn: int, wall_s: float) -> None:
        """Note how long a turn took, and choose the length of the next segment."""
        overhead_s = report.steps[0].timing.launch
        turns = report.steps[-1].turn - first_turn
        self._turn_s = max(1e-4, (wall_s - overhead_s) / turns)
        sum_s, is_warm = median(step.timing.aggregate for step in report.steps), report.steps[0].step > 1
        if self._can_overlap and is_warm and not self._overlaps and sum_s > _OVERLAP_PAYS_S:
            log.info("a sum takes %.1f ms: from now on it begins before gradients are complete", 1e3 * sum_s)
            self._overlaps = True
        if self._fixed_steps is None:
            self.segment_steps = next_length(turns, self._turn_s, overhead_s)

    def _as_long(self, solver: RoundSolver, steps: int) -> tuple[int, int]:
        """Return how many of these steps the segment makes, and their turns: its length is in turns."""
        made = turns = 0
        while made < steps:
            more = solver.turns_at(solver.turns + turns)
            if made and self._fixed_steps is None and turns + more > self.segment_steps:
                break
            made, turns = made + 1, turns + more
        return made, turns

    def _note_dropped(self, answers: Sequence[SegmentAnswer]) -> None:
        """Count the connections that were refused, and log them now and then."""
        doors = {f"worker {answer.worker}": answer.dropped for answer in answers}
        for door, dropped in {"the driver": self._rendezvous.take_dropped(), **doors}.items():
            self.recovery.strangers += dropped.total()
            self._strangers.note(door, dropped)
        self._strangers.say()


def next_length(turns: int, turn_s: float, overhead_s: float) -> int:
    """Return how many turns a segment should have: long enough for cheap starts, short enough for progress.

    Args:
        turns: of the last segment; the length grows by a bounded factor, because the first ones are slow.
        turn_s: how long one of its turns took.
        overhead_s: how long its start and end took, with the transfer of the solver's state.
    """
    wanted_s = min(_LONGEST_SEGMENT_S, max(_SEGMENT_S, overhead_s / _OVERHEAD))
    return max(1, min(int(wanted_s / turn_s), _GROWTH * turns))


def rendezvous_of(cluster: Cluster, config: EngineConfig, num_workers: int) -> Rendezvous:
    """Return where so many workers of a run meet."""
    return Rendezvous(
        run=secrets.token_bytes(8),
        num_workers=num_workers,
        credentials=Credentials.new(encrypt=encrypts(cluster, config)),
        host=cluster.driver_host,
        listen_on=cluster.driver_bind_address,
        ports=config.port_range,
        timeout_s=config.peer_timeout_s,
    )


def encrypts(cluster: Cluster, config: EngineConfig) -> bool:
    """Return whether connections must be encrypted: if Spark's own traffic is, or if it is asked for."""
    conf = cluster.context.getConf()
    spark_does = any(
        str(conf.get(key, "false")).lower() == "true"
        for key in (
            "spark.network.crypto.enabled",
            "spark.authenticate.enableSaslEncryption",
            "spark.ssl.enabled",
            "spark.ssl.rpc.enabled",
        )
    )
    return config.encrypt or spark_does


def _worker_report(answer: SegmentAnswer, record: npt.NDArray[Any]) -> WorkerReport:
    return WorkerReport(
        worker=answer.worker,
        host=answer.host,
        rows=int(record["own_rows"]),
        started_at_s=float(record["started_at_s"]),
        ended_at_s=float(record["computed_at_s"]),
        numerics=answer.numerics,
    )
