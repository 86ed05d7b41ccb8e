"""The all-reduce engine: one long barrier-mode Spark job for many steps.

    driver ── the solver's state, if they have not kept it ──> workers: a step after another, see replica.py
    driver <── the state of each strip, and what each step took ── workers

Workers exchange gradients over connections of their own (wire.py), which they find through the
driver (mesh.py).  A segment is a transaction: where a worker is lost, the solver stays as it was,
and the segment is run again from there.
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
from rich.filesize import decimal

from sparksgd.compute import WorkerReport, worse
from sparksgd.config import EngineConfig
from sparksgd.engines.protocol import SegmentReport, StepReport, StepTiming
from sparksgd.engines.spark import SparkEngine, destroy
from sparksgd.errors import (
    ClusterError,
    GradientChanged,
    NotFinite,
    PeerLost,
    UpdateNotFinite,
)
from sparksgd.mesh import Rendezvous
from sparksgd.replica import Segment, SegmentAnswer
from sparksgd.solvers.protocol import Solver, SolverState
from sparksgd.spark import step_tasks
from sparksgd.spark.cluster import Cluster
from sparksgd.wire import Credentials

__all__ = ["AllReduceEngine", "encrypts", "next_length"]

log = logging.getLogger("sparksgd")

_FIRST_STEPS = 4
_SEGMENT_S = 3.0
_LONGEST_SEGMENT_S = 10.0
_OVERHEAD = 0.03  # of a segment's time, that its start and end may take
_GROWTH = 8
_OVERLAP_PAYS_S = 0.002  # of a step's sum; less is not waited for, but worked on


class AllReduceEngine(SparkEngine):
    """Runs many steps as one Spark job, in which workers sum among themselves.

    Args:
        cluster: where the workers are.
        config: how long segments are, and how workers connect.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = "allreduce"
    mode = "a barrier stage for many steps"

    @staticmethod
    def check(cluster: Cluster, config: EngineConfig) -> None:
        """Refuse what cannot work at the driver, before anybody has waited for rows to be dealt.

        Raises:
            ClusterError: no port is free.
            ConfigError: the package for encryption is not installed.
        """
        _rendezvous(cluster, config).close()

    def _prepare(self, config: EngineConfig) -> None:
        self._fixed_steps = config.segment_steps
        self.segment_steps = config.segment_steps or _FIRST_STEPS
        self._step_s: float | None = None  # what the last segment's steps took
        self._before: tuple[SolverState, int] | None = None
        self._kept_step: int | None = None  # where the workers' own solvers should be
        self._processes_stay = True
        plan = self._plan
        self._can_overlap = (
            config.overlap != "never"
            and self._cluster.num_workers == len(plan.sampling.shard_rows)
            and plan.rows_per_backward is None
            and plan.worker_half.sends_as_it_is
        )
        self._overlaps = self._can_overlap and config.overlap == "always"
        self._rendezvous = _rendezvous(self._cluster, config)

    def close(self) -> None:
        """Let go of the workers, whose connections close with it."""
        self._rendezvous.close()
        super().close()

    def obstacle(self) -> str | None:
        """Let the workers meet once; return why they cannot, or None."""
        self._context.setJobDescription("sparksgd: whether workers reach each other")
        task = partial(step_tasks.meet, self._shipped, self._rendezvous.call(), self._workers)
        failures = self._run(lambda: self._map(self._shards, task).collect(), self._shards, "first meeting")
        reasons = [failure for failure in failures if failure is not None]
        reasons.sort(key=lambda failure: isinstance(failure, PeerLost))  # who only heard of it goes last
        return str(reasons[0]) if reasons else None

    def advance(self, solver: Solver, steps: int) -> SegmentReport:
        """Make steps; fewer where one of them has no finite loss, so that the next call fails with it."""
        started = time.perf_counter()
        start, first = solver.state(), solver.step
        self._check_size(start)
        doing = f"steps {first + 1} to {first + steps} on {self._cluster.num_workers} workers"
        self._context.setJobDescription(f"sparksgd: {doing}")
        limit_s = self._step_timeout_s * steps
        if self._step_s is not None:
            limit_s = self._step_timeout_s + 2 * self._step_s * steps
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
        self._choose_length(report, wall_s)
        by_rank = sorted(answers, key=lambda answer: answer.rank)
        states = [answer.state for answer in by_rank if answer.state is not None]
        solver.load_state(SolverState.joined(states) if solver.by_strips else states[0])
        self._before = start, steps
        self._kept_step = solver.step if self._processes_stay else None
        return report

    def _make_last_step_again(self, solver: Solver) -> None:
        """Let the solver have made its last step by itself: only then it can step back."""
        if self._before is None or self._before[1] == 1:
            return
        start, steps = self._before
        solver.load_state(start)
        self.advance(solver, steps - 1)
        self.advance(solver, 1)

    def _segment(self, solver: Solver, start: SolverState, steps: int) -> list[SegmentAnswer]:
        """Run a segment once; return the workers' answers, in their order.

        The state is sent only where the workers cannot have it: it costs a tenth of a short segment.

        Raises:
            SparkSGDError: what failed, but for a loss that is not finite: that is an answer.
        """
        state = None if self._kept_step == solver.step else self._context.broadcast(start)
        self._kept_step = None
        try:
            answers = self._answers(solver, state, steps)
        finally:
            if state is not None:
                self._behind.submit(destroy, state)
        self._note_dropped(answers)
        if any(answer.lacks_state for answer in answers):
            self._processes_stay = False  # with more slots than workers Spark takes other processes
            return self._segment(solver, start, steps)
        failures = [answer.failure for answer in answers if answer.failure is not None]
        raised = [failure for failure in failures if not isinstance(failure, (PeerLost, NotFinite))]
        if raised and all(isinstance(failure, GradientChanged) for failure in raised):
            log.warning("from now on gradients go out whole: %s", raised[0])
            self._can_overlap = self._overlaps = False
            return self._segment(solver, start, steps)
        if raised:
            raise reduce(worse, raised)
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
        self, solver: Solver, state: Broadcast[SolverState] | None, steps: int
    ) -> list[SegmentAnswer]:
        """Ask all workers for a segment once."""
        worker_of = {
            shard: self._workers[partition] for shard, partition in self._shards.partition_of.items()
        }
        owned = [
            sorted(shard for shard, worker in worker_of.items() if worker == number)
            for number in range(self._cluster.num_workers)
        ]
        segment = Segment(
            meeting=self._rendezvous.call(),
            first_step=solver.step,
            steps=steps,
            owned=owned,
            by_strips=solver.by_strips,
            make_replica=solver.make_replica(),
            overlaps=self._overlaps,
        )
        task = partial(step_tasks.segment, self._shipped, state, segment, self._workers)
        return sorted(self._map(self._shards, task).collect(), key=lambda answer: answer.worker)

    def _check_size(self, state: SolverState) -> None:
        """Refuse a state that Spark's limit on results cannot hold."""
        vectors = [v for of in state.optimizer["state"].values() for v in of.values()]
        size = state.weights.parameters.nbytes + sum(getattr(vector, "nbytes", 0) for vector in vectors)
        limit = int(self._context._jsc.sc().conf().getSizeAsBytes("spark.driver.maxResultSize", "1g"))
        if limit and size > limit:
            raise ClusterError(
                f"at the end of a segment parameters and optimiser return {decimal(size)} to the driver, but "
                f"spark.driver.maxResultSize is {decimal(limit)}: raise it"
            )

    def _reports(self, before: int, answers: Sequence[SegmentAnswer], wall_s: float) -> list[StepReport]:
        """Return the reports of a segment's steps; the first carries the segment's start and end."""
        times = np.stack([answer.steps for answer in answers])
        compute = (times["computed_at_s"] - times["started_at_s"]).max(axis=0)
        aggregate = times["reduce_s"].min(axis=0)  # of the last one to begin: the others wait for it
        update = times["update_s"].max(axis=0)
        spread = times["broadcast_s"].min(axis=0)
        total = np.diff(times["ended_at_s"], axis=1, prepend=times["started_at_s"][:, :1]).max(axis=0)
        launch = np.zeros_like(total)
        launch[0] = max(0.0, wall_s - total.sum())
        sampling = self._plan.sampling
        return [
            StepReport(
                step=before + index + 1,
                epoch=sampling.epoch_of(before + index) + 1,
                version=before + index,
                rows=int(exact["rows"]),
                shards=int(exact["shards"]),
                loss=float(exact["loss"]) / int(exact["rows"]),
                lr=float(exact["lr"]),
                timing=StepTiming(
                    total=float(total[index] + launch[index]),
                    broadcast=float(spread[index]),
                    launch=float(launch[index]),
                    compute=float(compute[index]),
                    aggregate=float(aggregate[index]),
                    update=float(update[index]),
                ),
                workers=tuple(_worker_report(answer, answer.steps[index]) for answer in answers),
                took_part=tuple(range(len(sampling.shard_rows))),
            )
            for index, exact in enumerate(answers[0].steps)
        ]

    def _choose_length(self, report: SegmentReport, wall_s: float) -> None:
        """Note what a step took, and let the next segment be as long as that suggests."""
        overhead_s = report.steps[0].timing.launch
        self._step_s = max(1e-4, (wall_s - overhead_s) / len(report.steps))
        sum_s, is_warm = median(step.timing.aggregate for step in report.steps), report.steps[0].step > 1
        if self._can_overlap and is_warm and not self._overlaps and sum_s > _OVERLAP_PAYS_S:
            log.info("summing takes %.1f ms: from now on it begins before gradients are whole", 1e3 * sum_s)
            self._overlaps = True
        if self._fixed_steps is None:
            self.segment_steps = next_length(self.segment_steps, self._step_s, overhead_s)

    def _note_dropped(self, answers: Sequence[SegmentAnswer]) -> None:
        """Say aloud, and count, who was not let in."""
        doors = {f"worker {answer.worker}": answer.dropped for answer in answers}
        for door, dropped in {"the driver": self._rendezvous.take_dropped(), **doors}.items():
            if dropped:
                self.recovery.strangers += dropped.total()
                reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
                log.warning("%d connections to %s were dropped: %s", dropped.total(), door, reasons)


def next_length(steps: int, step_s: float, overhead_s: float) -> int:
    """Return how many steps make a segment whose start and end cost little, and that progress can wait for.

    Args:
        steps: of the last one; it grows by a bounded factor, for the first ones are slow.
        step_s: what one of its steps took.
        overhead_s: what its start and end took, the way of the solver's state among it.
    """
    wanted_s = min(_LONGEST_SEGMENT_S, max(_SEGMENT_S, overhead_s / _OVERHEAD))
    return max(1, min(int(wanted_s / step_s), _GROWTH * steps))


def _rendezvous(cluster: Cluster, config: EngineConfig) -> Rendezvous:
    """Return where a run's workers will meet, open."""
    rendezvous = Rendezvous(
        run=secrets.token_bytes(8),
        num_workers=cluster.num_workers,
        credentials=Credentials.new(encrypt=encrypts(cluster, config)),
        host=cluster.driver_host,
        listen_on=cluster.driver_bind_address,
        ports=config.port_range,
        timeout_s=config.peer_timeout_s,
    )
    rendezvous.start()
    return rendezvous


def encrypts(cluster: Cluster, config: EngineConfig) -> bool:
    """Return whether the wire must be encrypted: where Spark's own traffic is, or if asked for."""
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
