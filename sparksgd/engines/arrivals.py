"""The tree engine in ordinary stages: answers arrive one by one, and a step need not wait for all.

    driver ── broadcast(weights) ──> workers: a task each, where no late one of theirs still runs
    driver <── gradient sums, as each task ends (spark/arrivals.py)
    driver: adds those of the quorum in the order of the addition tree, solver.receive(sum)

A barrier-mode job ends when all of its tasks end, so it cannot leave a straggler behind; the tasks of an
ordinary stage are also placed, tried again and speculated on by Spark one by one, and run where executors
come and go.  In return every worker's sums reach the driver by themselves.

A straggler keeps its slot until it is done: it is not asked again before, and its late answer is known by
its request and dropped.  With b backup workers up to b workers may be lost for good.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from operator import add
from typing import TypeVar

from pyspark import RDD

from sparksgd.compute import Answer, Evaluation, Plan
from sparksgd.config import EngineConfig
from sparksgd.engines.protocol import Arrival, SegmentReport, Shards, StepReport, take_step
from sparksgd.engines.spark import Exchange, SparkEngine, destroy
from sparksgd.engines.tree import check_sizes
from sparksgd.errors import NotEnoughSlots, NotFinite, PeerLost, ShardMissing
from sparksgd.shard import Descriptor
from sparksgd.solvers.protocol import Quorum, Solver
from sparksgd.spark.arrivals import Arrived, Desk, Request
from sparksgd.spark.cluster import cancel_jobs, cleanup, final_error, gist
from sparksgd.spark.rows import SparkShards
from sparksgd.treesum import add_partial, partials_sent

__all__ = ["ArrivalsEngine"]

log = logging.getLogger("sparksgd")

T = TypeVar("T")

_LOOK_S = 0.2  # how soon a job that failed is noticed
_SLOTS_S = 1.0  # how often slots are counted
_PATIENCE_S = 5.0  # how long late answers are waited for before what needs every slot


@dataclass(kw_only=True)
class _Collected:
    """What a step has gathered so far."""

    pending: set[int] = field(default_factory=set)
    """Workers that were asked, and have not answered."""

    late: set[int] = field(default_factory=set)
    """Workers without whose answers the step ended: asked now, or busy with an earlier one, or lost."""

    fresh: dict[int, Answer] = field(default_factory=dict)
    """The answers that the step is made of, by worker."""

    arrivals: list[Arrival] = field(default_factory=list)
    """Whatever arrived meanwhile."""

    enough: int = 0
    """How many shards the step is made of."""

    broadcast_s: float = 0.0
    submitted_at_s: float = 0.0
    arrived_at_s: float = 0.0

    @property
    def shards(self) -> int:
        """How many shards have arrived."""
        return sum(len(answer.shards) for answer in self.fresh.values())

    @property
    def complete(self) -> bool:
        """Whether enough have arrived, and some of them with rows."""
        rows = sum(report.rows for answer in self.fresh.values() for report in answer.workers)
        return self.shards >= self.enough and rows > 0


class ArrivalsEngine(SparkEngine):
    """Runs each step as an ordinary Spark job, and ends it when enough have answered.

    Args:
        cluster: where the workers are.
        config: how often a step is tried.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = "tree"
    mode = "an ordinary stage for each step"
    segment_steps = 1

    def _prepare(self, config: EngineConfig) -> None:
        sent = list(partials_sent(self._cluster.num_workers, len(self._plan.sampling.shard_rows)))
        check_sizes(self._cluster, self._plan, max(sent), sum(sent))
        self._requests: list[Request] = []
        self._between: list[Arrival] = []
        self._lost: dict[int, ShardMissing] = {}
        self._before_recovery: set[int] = set()
        self._backups = 0
        self._steps_of = [0] * self._cluster.num_workers
        self._few_slots = False
        self._slots = self._cluster.slots()
        self._executors = self._cluster.places()
        self._jobs_seen_s = 0.0
        self._slots_counted_s = 0.0

    def _ship(self, plan: Plan) -> None:
        super()._ship(plan)
        self._desk = Desk(self._cluster, self._shipped)
        self._place()

    def close(self) -> None:
        """End what still runs, and let go of the workers."""
        self._forget()
        with cleanup():
            self._await_rest()
        self._desk.close()
        super().close()

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Go on with the same rows in other shards; they go to all slots, so none may be taken."""
        self._rest()
        before = self._desk
        super().deal_anew(deal)
        before.close()
        self._lost.clear()
        self._before_recovery.clear()

    def evaluate(self, solver: Solver) -> Evaluation:
        """Evaluate the solver's weights on the test rows, where they are, so no slot may be taken."""
        self._rest()
        return super().evaluate(solver)

    def advance(self, solver: Solver, steps: int) -> SegmentReport:
        """Make steps."""
        return SegmentReport(steps=[self._step(solver) for _ in range(steps)])

    def _step(self, solver: Solver) -> StepReport:
        started = time.perf_counter()
        step, quorum = solver.step, solver.quorum()
        self._backups = len(quorum.shards) - quorum.enough
        self._count_slots()
        doing = (
            f"step {step + 1} (epoch {self._plan.sampling.epoch_of(step) + 1}): gradients of {quorum.enough} "
            f"of {len(quorum.shards)} shards"
        )
        self._context.setJobDescription(f"sparksgd: {doing}")
        collected = self._run(
            lambda: self._collected(solver, quorum), self._shards, doing, self._step_timeout_s
        )
        arrived = time.perf_counter()
        for worker in collected.fresh:
            self._steps_of[worker] += 1
        exchange = Exchange(
            answer=self._sum(collected),
            broadcast_s=collected.broadcast_s,
            submitted_at_s=collected.submitted_at_s,
            arrived_at_s=collected.arrived_at_s,
        )
        return take_step(
            solver,
            self._plan,
            exchange.answer,
            lambda: exchange.timing(started, arrived),
            sorted(collected.late),
            collected.arrivals,
        )

    def _collected(self, solver: Solver, quorum: Quorum) -> _Collected:
        """Ask for gradients until there are enough; what fails leaves nothing behind that runs."""
        collected, self._between = _Collected(arrivals=self._between, enough=quorum.enough), []
        before = time.time()
        weights = self._context.broadcast(solver.weights())
        collected.submitted_at_s = time.time()
        collected.broadcast_s = collected.submitted_at_s - before
        wanted = {worker for worker, shards in self._owned.items() if quorum.shards.intersection(shards)}
        try:
            while not collected.complete:
                if len(self._lost) > self._backups:
                    raise reduce(add, self._lost.values())
                coming = sum(len(quorum.shards.intersection(self._owned[w])) for w in collected.pending)
                if not collected.pending or collected.shards + coming < quorum.enough:
                    idle = self._idle(wanted - collected.fresh.keys())
                    if idle:
                        request = self._desk.ask(
                            idle, weights, solver.step, quorum.shards, collected.submitted_at_s
                        )
                        self._requests.append(request)
                        collected.pending |= idle
                    elif self._lost and not self._requests:
                        raise reduce(add, self._lost.values())  # the step's only rows are theirs
                self._take(solver.step, collected)
        except BaseException:
            self._between = collected.arrivals
            self._forget()
            self._behind.submit(destroy, weights)
            raise
        collected.late = wanted - collected.fresh.keys()
        self._tidy()
        return collected

    def _idle(self, wanted: set[int]) -> set[int]:
        """Return which of some workers have a free slot where their shards are, rarest first.

        Spark lets no task wait for its place while another is free, where its shards' files are not; and one
        that waits for any slot would begin when its step is over.
        """
        busy = {worker for request in self._requests for worker in request.missing}
        free = self._slots - len(busy)
        each = max(1, self._slots // max(1, len(self._executors)))
        free_at: dict[str | None, int] = dict.fromkeys(self._executors, each)
        for worker in busy:
            if self._place_of[worker] in free_at:
                free_at[self._place_of[worker]] -= 1
        chosen = set()
        for worker in sorted(wanted - busy - self._lost.keys(), key=lambda one: (self._steps_of[one], one)):
            place = self._place_of[worker]
            if free <= 0 or free_at.get(place, 1) <= 0:
                continue
            chosen.add(worker)
            free -= 1
            if place in free_at:
                free_at[place] -= 1
        return chosen

    def _take(self, step: int, collected: _Collected) -> None:
        """Take what arrives next, or find out why nothing does."""
        found = self._desk.next(_LOOK_S)
        if found is not None:
            self._receive(*found, step, collected)
        now_s = time.monotonic()
        if found is None or now_s - self._jobs_seen_s > _SLOTS_S:
            self._jobs_seen_s = now_s
            ended = [request for request in self._requests if request.future.isDone()]
            while more := self._desk.next(0):  # what came before the end
                self._receive(*more, step, collected)
            for request in ended:
                if request.missing:
                    self._failed(request, step)
        if found is None:
            self._require_slots()

    def _receive(self, at_s: float, arrived: Arrived, step: int, collected: _Collected) -> None:
        """Put an answer where it belongs: into the step that asked for it, or nowhere."""
        request = next((asked for asked in self._requests if asked.number == arrived.request), None)
        if request is None:
            return  # of an attempt that was given up
        worker, answer = arrived.worker, arrived.answer
        request.missing.discard(worker)
        collected.arrivals.append(
            Arrival(
                worker=worker,
                host=answer.workers[0].host,
                version=request.version,
                arrived_s=max(0.0, at_s - request.began_at_s),
            )
        )
        fresh = request.version == step
        if fresh:
            collected.pending.discard(worker)
        if isinstance(answer.failure, ShardMissing):
            if request.number not in self._before_recovery:
                self._lose(worker, answer.failure)
        elif answer.failure is not None and (fresh or not isinstance(answer.failure, NotFinite)):
            raise answer.failure
        elif fresh and not collected.complete:
            collected.fresh[worker] = answer
            collected.arrived_at_s = at_s

    def _failed(self, request: Request, step: int) -> None:
        """Raise why a job ended without all of its answers; of an earlier step only what ends the run."""
        try:
            request.future.get()
        except Exception as error:
            if request.version == step or final_error(error, self._context) is not None:
                raise
            log.warning("a late task of step %d failed: %s", request.version + 1, gist(str(error)))
        else:
            if request.version == step:
                raise PeerLost(
                    f"a job ended, but the answers of workers {sorted(request.missing)} never came"
                )
        request.missing.clear()

    def _lose(self, worker: int, failure: ShardMissing) -> None:
        """Ask a worker no more whose shards are gone."""
        self._lost[worker] = failure
        if len(self._lost) <= self._backups:
            log.warning("worker %d is lost, and training goes on without it: %s", worker, failure)

    def _count_slots(self) -> None:
        """See who has been lost for good, and bring back those whose place another has taken."""
        if not self._require_slots():
            return
        wanted, slots = self._cluster.num_workers, self._slots
        if slots < wanted and not self._few_slots and not self._cluster.is_elastic:
            log.warning(
                "%d of %d slots are lost, and training goes on with %d: %s", wanted - slots, wanted, slots,
                "backup workers make up for them" if self._backups else "some tasks wait for others",
            )  # fmt: skip
        elif slots >= wanted and self._few_slots:
            log.info("all %d slots are there again", wanted)
        self._few_slots = slots < wanted
        if self._lost and (self._cluster.is_elastic or not self._few_slots):
            missing = reduce(add, self._lost.values()).shards
            self._run(
                lambda: self._recover(self._shards, missing), self._shards, "bringing back lost workers"
            )

    def _require_slots(self) -> bool:
        """Count the slots, and return True; or False where they were counted just now.

        Raises:
            NotEnoughSlots: more workers are lost than there are backups for.
        """
        now_s = time.monotonic()
        if now_s - self._slots_counted_s < _SLOTS_S:
            return False
        self._slots_counted_s = now_s
        if self._cluster.slots() < self._fewest_slots:
            self._await_slots()
        self._slots, self._executors = self._cluster.slots(), self._cluster.places()
        if self._cluster.is_elastic:
            self._slots = max(1, self._slots)  # Spark asks for executors where tasks wait
        return True

    @property
    def _fewest_slots(self) -> int:
        """Without backups, tasks can wait for each other's slots."""
        return self._cluster.num_workers - self._backups if self._backups else 1

    def _await_slots(self) -> None:
        """Wait for the slots without which no step can be made."""
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
            self._before_recovery = {request.number for request in self._requests}
            self._lost.clear()
            self._place()

    def _place(self) -> None:
        """Learn who owns what, and where that is."""
        partition_of = self._shards.partition_of
        work: list[list[Descriptor]] = [[] for _ in self._workers]
        for descriptor in self._shards.table:
            work[partition_of[descriptor.shard]].append(descriptor)
        self._owned: dict[int, list[int]] = {}
        self._place_of: dict[int, str | None] = {}
        for worker, owned, place in zip(self._workers, work, self._shards.places(), strict=True):
            self._owned[worker] = [descriptor.shard for descriptor in owned]
            self._place_of[worker] = place
            self._desk.place(worker, owned, place)
        self._executors = self._cluster.places()

    def _sum(self, collected: _Collected) -> Answer:
        """Add up what arrived, in the order of the tree; absent shards are no leaves."""
        leaves = len(self._plan.sampling.shard_rows)
        answer = Answer(leaves=leaves)
        for fresh in collected.fresh.values():
            answer += fresh
        for worker, shards in self._owned.items():
            if worker not in collected.fresh:
                for shard in shards:
                    add_partial(answer.partials, (shard, shard + 1), None, leaves)
        return answer

    def _tidy(self) -> None:
        """Forget the requests that all have answered."""
        done = [request for request in self._requests if not request.missing]
        self._requests = [request for request in self._requests if request.missing]
        running = {request.weights for request in self._requests}
        for weights in {request.weights for request in done} - running:
            self._behind.submit(destroy, weights)

    def _rest(self) -> None:
        """Return when nobody computes; who is late for too long is cancelled."""
        late = _Collected()
        deadline = time.monotonic() + _PATIENCE_S
        while self._requests and time.monotonic() < deadline:
            self._take(-1, late)
            self._tidy()
        self._between += late.arrivals
        self._forget()
        self._await_rest()

    def _await_rest(self) -> None:
        """Return when the slots of cancelled tasks are free: Spark gives a Python worker 2 s to end."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._cluster.running_tasks()[0] and time.monotonic() < deadline:
            time.sleep(_LOOK_S)

    def _forget(self) -> None:
        """Cancel all that runs; what still arrives of it is nobody's."""
        if not self._requests:
            return
        cancel_jobs(self._context, self._cluster.run_id)
        for request in self._requests:
            request.missing.clear()
        self._tidy()

    def _map(self, shards: SparkShards, task: Callable[[int, Iterable[Descriptor]], Iterable[T]]) -> RDD[T]:
        """Return the RDD of a task over the workers' shards; of test shards, in at most as many tasks."""
        if shards is not self._test:
            return shards.rdd.mapPartitionsWithIndex(task)
        places, partition_of = shards.places(), shards.partition_of
        at_place: dict[str | None, list[Descriptor]] = {}
        for descriptor in shards.table:
            at_place.setdefault(places[partition_of[descriptor.shard]], []).append(descriptor)
        slots = min(self._cluster.slots(), self._cluster.num_workers)
        tasks = max(1, slots // max(1, len(at_place)))
        placed = [
            self._cluster.at_place(mine[number::tasks], place)
            for place, mine in at_place.items()
            for number in range(min(tasks, len(mine)))
        ]
        flat = self._cluster.placed_rdd(placed).mapPartitions(chain.from_iterable)
        return flat.mapPartitionsWithIndex(task)
