"""The tree engine in ordinary stages: replies arrive one by one, and a step need not wait for all.

    driver ── broadcast(round) ──> workers: a task for each, unless a late one of theirs still runs
    driver <── sums of messages, when each task ends (desk.py)
    driver: adds those of the quorum in the order of the addition tree, solver.receive(sum)

A barrier-mode job ends when all of its tasks have ended, so it cannot leave a straggler behind.  Spark
places, retries and speculates on each task of an ordinary stage by itself, and such tasks also run with
dynamic allocation.  The price: the sums of every worker reach the driver separately.

engines/gathering decides whom to ask, who is lost, and when enough have arrived.  This file carries it out:
it submits, watches and cancels jobs, and counts slots.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, TypeVar

from pyspark import RDD, Broadcast

from sparksgd.arithmetic.addition_tree import add_partial
from sparksgd.config import EngineConfig
from sparksgd.data.shard import Descriptor
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.gathering.rounds import (
    Arrived,
    Ask,
    Began,
    Ended,
    Fail,
    Finish,
    Note,
    Placed,
    RoundEvent,
    RoundGathering,
    Slots,
    Take,
)
from sparksgd.engines.kinds import STAGES
from sparksgd.engines.protocol import Arrival, SegmentReport, StepReport, take_step
from sparksgd.engines.replies import Evaluation, Reply
from sparksgd.errors import NotEnoughSlots
from sparksgd.solvers.protocol import Answer, CentralSolver, Quorum, RoundSolver
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.failures import final_error, gist
from sparksgd.spark.cluster.jobs import cancel_jobs, cleanup
from sparksgd.spark.cluster.shards import SparkShards
from sparksgd.spark.engines import desk
from sparksgd.spark.engines.base import Exchange, SparkEngine
from sparksgd.spark.tasks.step_tasks import Round

__all__ = ["StagesEngine"]

log = logging.getLogger("sparksgd")

T = TypeVar("T")

_LOOK_S = 0.2  # how soon a failed job is noticed
_SLOTS_S = 1.0  # how often slots are counted
_PATIENCE_S = 5.0  # how long to wait for late replies before work that needs every slot


@dataclass(kw_only=True)
class _Asked:
    """A request that runs as a Spark job."""

    version: int
    """The version of the weights that it computes from."""

    began_at_s: float
    """When its step began to ask, by the driver's clock."""

    job: Any
    """The JVM's JavaFutureAction."""


@dataclass(kw_only=True)
class _Collected:
    """What a step has gathered so far."""

    taken: dict[int, Reply] = field(default_factory=dict)
    """The replies that the step uses, by worker."""

    late: tuple[int, ...] | None = None
    """The workers that it did without; None while it goes on."""

    broadcast_s: float = 0.0
    submitted_at_s: float = 0.0
    arrived_at_s: float = 0.0


class StagesEngine(SparkEngine):
    """Runs each step as an ordinary Spark job, and ends it when enough have replied.

    Args:
        cluster: where the workers are.
        config: how often a step is tried.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = STAGES.name
    mode = STAGES.mode
    segment_steps = 1

    def __init__(
        self, cluster: Cluster, config: EngineConfig, plan: Plan, shards: Shards, test: Shards | None
    ) -> None:
        super().__init__(cluster, config, plan, shards, test)
        self._gathering = RoundGathering()
        self._asked: dict[int, _Asked] = {}
        self._rounds: dict[int, Broadcast[Round]] = {}  # by version
        self._arrivals: list[Arrival] = []  # since the last step
        self._backups = 0
        self._few_slots = False
        self._slots = 1
        self._jobs_seen_s = 0.0
        self._slots_counted_s = 0.0

    def open(self) -> None:
        """Count the slots, and send the plan to the workers."""
        self._look_at_slots()
        super().open()

    def _ship(self, plan: Plan) -> None:
        super()._ship(plan)
        self._desk = desk.Desk(self._cluster, self._shipped)
        self._place()

    def close(self) -> None:
        """End what still runs, and release the workers."""
        self._forget()
        with cleanup():
            self._await_rest()
        if self._is_open:
            self._desk.close()
        super().close()

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Continue with the same rows in other shards; that needs all slots, so late tasks end first."""
        self._rest()
        before = self._desk
        super().deal_anew(deal)
        before.close()

    def evaluate(self, solver: CentralSolver) -> Evaluation:
        """Evaluate the solver's weights on the test rows, where they are; late tasks end first."""
        self._rest()
        return super().evaluate(solver)

    def advance(self, solver: RoundSolver, steps: int) -> SegmentReport:
        """Make steps."""
        return SegmentReport(steps=[self._step(solver) for _ in range(steps)])

    def _step(self, solver: RoundSolver) -> StepReport:
        started = time.perf_counter()
        answer, quorum = solver.answer(), solver.quorum()
        self._backups = len(quorum.shards) - quorum.enough
        self._count_slots()
        epoch = self._plan.sampling.epoch_of(answer.turn) + 1
        doing = (
            f"step {solver.version + 1} (epoch {epoch}): gradients of {quorum.enough} of "
            f"{len(quorum.shards)} shards"
        )
        self._context.setJobDescription(f"sparksgd: {doing}")
        limit_s = self._step_timeout_s * answer.turns
        collected = self._run(lambda: self._collected(answer, quorum), self._shards, doing, limit_s)
        arrived = time.perf_counter()
        exchange = Exchange(
            reply=self._sum(collected),
            broadcast_s=collected.broadcast_s,
            submitted_at_s=collected.submitted_at_s,
            arrived_at_s=collected.arrived_at_s,
        )
        arrivals, self._arrivals = self._arrivals, []
        return take_step(
            solver,
            self._plan,
            exchange.reply,
            lambda: exchange.timing(started, arrived),
            collected.late or (),
            arrivals,
            self._gathering.trace.take(),
        )

    def _collected(self, answer: Answer, quorum: Quorum) -> _Collected:
        """Ask for messages until there are enough; if that fails, no job is left running."""
        collected, version = _Collected(), answer.weights.version
        before = time.time()
        self._rounds[version] = self._context.broadcast(Round(answer=answer, asked=quorum.shards))
        collected.submitted_at_s = time.time()
        collected.broadcast_s = collected.submitted_at_s - before
        try:
            self._feed(Began(version=version, turn=answer.turn, quorum=quorum), collected)
            while collected.late is None:
                self._take(collected)
        except BaseException:
            self._forget()
            raise
        self._tidy()
        return collected

    def _feed(
        self, event: RoundEvent, collected: _Collected, reply: Reply | None = None, at_s: float = 0.0
    ) -> None:
        """Give the gathering an event, and carry out its instructions."""
        for told in self._gathering.handle(event):
            if isinstance(told, Ask):
                version = self._gathering.version_of(told.request)
                assert version is not None
                job = self._desk.ask(told.request, told.workers, self._rounds[version])
                self._asked[told.request] = _Asked(
                    version=version, began_at_s=collected.submitted_at_s, job=job
                )
            elif isinstance(told, Take):
                assert reply is not None
                collected.taken[told.worker] = reply
                collected.arrived_at_s = at_s
            elif isinstance(told, Finish):
                collected.late = told.late
            elif isinstance(told, Note):
                log.warning("%s%s", told.text, f": {gist(str(told.error))}" if told.error else "")
            elif isinstance(told, Fail):
                raise told.error

    def _take(self, collected: _Collected) -> None:
        """Take the next reply, or find out why there is none."""
        found = self._desk.next(_LOOK_S)
        if found is not None:
            self._receive(*found, collected)
        now_s = time.monotonic()
        if found is None or now_s - self._jobs_seen_s > _SLOTS_S:
            self._jobs_seen_s = now_s
            running = self._gathering.running
            ended = [number for number in running if self._asked[number].job.isDone()]
            while more := self._desk.next(0):  # replies that came before the end of the job
                self._receive(*more, collected)
            for number in ended:
                if number in self._gathering.running:
                    self._feed(self._ended(number), collected)
        if found is None and self._look_at_slots_seldom():
            self._feed(self._slots_event(), collected)

    def _receive(self, at_s: float, arrived: desk.Arrived, collected: _Collected) -> None:
        """Tell of a reply, and note when it came."""
        asked, version = self._asked.get(arrived.request), self._gathering.version_of(arrived.request)
        reply = arrived.reply
        if asked is not None and version is not None:
            self._arrivals.append(
                Arrival(
                    worker=arrived.worker,
                    host=reply.workers[0].host,
                    version=version,
                    arrived_s=max(0.0, at_s - asked.began_at_s),
                )
            )
        event = Arrived(
            request=arrived.request,
            worker=arrived.worker,
            shards=tuple(reply.shards),
            rows=sum(report.rows for report in reply.workers),
            failure=reply.failure,
        )
        self._feed(event, collected, reply, at_s)

    def _ended(self, number: int) -> Ended:
        """Return the event of a job that has ended although some of its workers have not replied."""
        try:
            self._asked[number].job.get()
        except Exception as error:
            is_final = final_error(error, self._context) is not None and not self._is_dying(error)
            return Ended(request=number, error=error, is_final=is_final)
        return Ended(request=number)

    def _count_slots(self) -> None:
        """Find workers that are lost for good, and restore those whose place another executor has taken."""
        if not self._look_at_slots_seldom():
            return
        self._gathering.handle(self._slots_event())
        wanted, slots = self._cluster.num_workers, self._slots
        if slots < wanted and not self._few_slots and not self._cluster.is_elastic:
            log.warning(
                "%d of %d slots are lost, and training goes on with %d: %s", wanted - slots, wanted, slots,
                "backup workers make up for them" if self._backups else "some tasks wait for others",
            )  # fmt: skip
        elif slots >= wanted and self._few_slots:
            log.info("all %d slots are there again", wanted)
        self._few_slots = slots < wanted
        if self._gathering.lost and (self._cluster.is_elastic or not self._few_slots):
            missing = reduce(add, self._gathering.lost.values()).shards
            self._run(
                lambda: self._recover(self._shards, missing), self._shards, "bringing back lost workers"
            )

    def _look_at_slots_seldom(self) -> bool:
        """Count the slots, and return True; return False if they were counted just before.

        Raises:
            NotEnoughSlots: more workers are lost than there are backup workers.
        """
        now_s = time.monotonic()
        if now_s - self._slots_counted_s < _SLOTS_S:
            return False
        self._slots_counted_s = now_s
        if self._cluster.slots() < self._fewest_slots:
            self._await_slots()
        self._look_at_slots()
        return True

    def _look_at_slots(self) -> None:
        self._slots = self._cluster.slots()
        if self._cluster.is_elastic:
            self._slots = max(1, self._slots)  # Spark asks for executors when tasks wait

    def _slots_event(self) -> Slots:
        return Slots(count=self._slots, executors=frozenset(self._cluster.places()))

    @property
    def _fewest_slots(self) -> int:
        """Without backups, tasks can wait for each other's slots."""
        return self._cluster.num_workers - self._backups if self._backups else 1

    def _await_slots(self) -> None:
        """Wait for the slots that a step needs at least."""
        try:
            self._cluster.wait_for_slots(self._fewest_slots)
        except NotEnoughSlots as error:
            slots, workers = self._cluster.slots(), self._cluster.num_workers
            raise NotEnoughSlots(
                f"{workers - slots} of {workers} workers are lost, but solver.backup_workers is "
                f"{self._backups}, and none came back within engine.slots_timeout_s: the cluster has {slots} "
                f"slots, and a step needs {self._fewest_slots}. The model of the last step is kept; give the "
                f"cluster more executors, or the next run more backup workers"
            ) from error

    def _recover(self, shards: SparkShards, missing: tuple[int, ...]) -> None:
        super()._recover(shards, missing)
        if shards is self._shards or not missing:
            self._place()

    def _place(self) -> None:
        """Find out which worker has which shards, and where they are."""
        partition_of = self._shards.partition_of
        work: list[list[Descriptor]] = [[] for _ in self._workers]
        for descriptor in self._shards.table:
            work[partition_of[descriptor.shard]].append(descriptor)
        owned: dict[int, tuple[int, ...]] = {}
        place_of: dict[int, str | None] = {}
        for worker, mine, place in zip(self._workers, work, self._shards.places(), strict=True):
            owned[worker] = tuple(descriptor.shard for descriptor in mine)
            place_of[worker] = place
            self._desk.place(worker, mine, place)
        self._owned = owned
        self._gathering.handle(self._slots_event())
        self._gathering.handle(Placed(owned=owned, place_of=place_of))

    def _sum(self, collected: _Collected) -> Reply:
        """Add the messages that arrived, in the order of the tree; missing shards are absent leaves."""
        leaves = len(self._plan.sampling.shard_rows)
        total = Reply(leaves=leaves)
        for reply in collected.taken.values():
            total += reply
        for worker, shards in self._owned.items():
            if worker not in collected.taken:
                for shard in shards:
                    add_partial(total.partials, (shard, shard + 1), None, leaves)
        return total

    def _tidy(self) -> None:
        """Forget requests that all workers have replied to, and rounds that no worker computes any more."""
        running, versions = self._gathering.running, self._gathering.versions
        self._asked = {number: asked for number, asked in self._asked.items() if number in running}
        for version in self._rounds.keys() - versions:
            self._clear_behind(self._rounds.pop(version))

    def _rest(self) -> None:
        """Wait until no worker computes; cancel those that are late for too long."""
        late = _Collected()
        deadline = time.monotonic() + _PATIENCE_S
        while self._gathering.running and time.monotonic() < deadline:
            self._take(late)
            self._tidy()
        self._forget()
        self._await_rest()

    def _await_rest(self) -> None:
        """Wait until the slots of cancelled tasks are free: Spark gives a Python worker 2 s to end."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._cluster.running_tasks()[0] and time.monotonic() < deadline:
            time.sleep(_LOOK_S)

    def _forget(self) -> None:
        """Cancel all running jobs; their late replies are ignored."""
        if self._gathering.running:
            cancel_jobs(self._context, self._cluster.run_id)
        self._gathering.forget()
        self._tidy()

    def _map(self, shards: SparkShards, task: Callable[[int, Iterable[Descriptor]], Iterable[T]]) -> RDD[T]:
        """Return the RDD of a task over the workers' shards, in an ordinary stage."""
        return self._map_in_place(shards, task)
