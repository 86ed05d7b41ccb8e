"""The server engine: workers exchange with the driver at their own pace, over connections of their own.

    driver ── one ordinary Spark job for each worker ──> executors, see server_jobs.py
    worker <── turns, answers, evaluations ──> driver, in frames, see peers/server_frames.py

The driver applies messages one by one, in the order in which they arrive.  An executor may go and another one
come: the shards of a lost worker begin anew, as the rule says, and the others go on meanwhile.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pyspark import RDD

from sparksgd.arithmetic.addition_tree import add_partial
from sparksgd.config import EngineConfig
from sparksgd.data.shard import Descriptor
from sparksgd.data.source import Shards
from sparksgd.engines.arrival_exchange import ArrivalExchange, all_are_held
from sparksgd.engines.compute import Plan
from sparksgd.engines.kinds import SERVER
from sparksgd.engines.protocol import SegmentReport, ShardStates, StepReport, arrival_reports
from sparksgd.engines.replies import Evaluation, Reply
from sparksgd.errors import ConfigError, PeerLost
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.frames import Frame
from sparksgd.peers.server_desk import Came, Joined, Left, ServerDesk
from sparksgd.peers.server_evaluation import evaluated_by_workers
from sparksgd.peers.server_frames import (
    FAILED,
    HERE,
    LEAVE,
    SENT,
    Here,
    Vectors,
    failure_in,
    field_of,
    here_in,
    message_in,
    times_in,
    turn_frame,
)
from sparksgd.peers.server_orders import ANSWERS_OF_EVALUATIONS, ANSWERS_OF_TURNS, Orders, TurnOrder
from sparksgd.peers.strangers import StrangersLog
from sparksgd.solvers.arrivals import ArrivalSolver
from sparksgd.solvers.protocol import Answer, CentralSolver
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.jobs import HoldsSlots, Watched, cleanup
from sparksgd.spark.cluster.shards import SparkShards
from sparksgd.spark.engines.allreduce import encrypts
from sparksgd.spark.engines.base import DYING_S, SparkEngine
from sparksgd.spark.engines.server_jobs import ServerJobs
from sparksgd.spark.engines.server_use import UseSinceStep
from sparksgd.spark.tasks.server_tasks import WorkerTask, work

__all__ = ["ServerEngine"]

log = logging.getLogger("sparksgd")

T = TypeVar("T")

_LOOK_S = 0.5
_GATHER_S = 10.0
_PATIENCE_S = 5.0
_AWAY_S = 60.0


@dataclass(frozen=True)
class _Lost:
    """A shard of a worker that left."""

    shard: int


class ServerEngine(SparkEngine):
    """Lets workers exchange with the centre, which is the driver, at their own pace.

    Args:
        cluster: where the workers are.
        config: how workers connect, and how often one is asked.
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
    """

    name = SERVER.name
    mode = SERVER.mode
    segment_steps = 1

    def __init__(
        self, cluster: Cluster, config: EngineConfig, plan: Plan, shards: Shards, test: Shards | None
    ) -> None:
        super().__init__(cluster, config, plan, shards, test)
        self._desk = _desk_of(cluster, config)
        self._strangers = StrangersLog()
        self._jobs = ServerJobs(
            cluster, self.recovery, self._max_attempts,
            submit=self._submit, mend=self._mend, is_dying=self._is_dying, dying_s=DYING_S,
            hung_s=config.step_timeout_s,
        )  # fmt: skip
        self._exchange: ArrivalExchange | None = None
        self._turns: Mapping[int, int] | None = None
        self._vectors: Vectors
        self._owned: dict[int, list[int]] = {}  # the shards with rows of each worker
        self._worker_of: dict[int, int] = {}
        self._here: dict[int, Here] = {}  # the workers that are here, as far as events are handled
        self._begins_at_s = 0.0  # when those who are here begin; 0: it has begun
        self._orders = Orders()
        self._held: deque[Joined | Left | Came | _Lost] = deque()  # what happened and is not handled yet
        self._answers: dict[int, Answer] = {}  # that wait for the shard's next turn
        self._started: dict[int, tuple[int, float]] = {}  # the turn that each shard makes, and since when
        self._rows_due: dict[int, int] = {}  # the rows of each shard's turns that it has not sent
        self._wanted: set[int] = set()  # the workers that have shards
        self._seen_s: dict[int, float] = {}  # when each of them was here last
        self._looked_at_s = 0.0
        self._deaf_since_s: float | None = None  # since when nobody listens to workers; None: somebody does
        self._exchanged_bytes = 0
        self._use = UseSinceStep(self._desk)

    @staticmethod
    def check(cluster: Cluster, config: EngineConfig) -> None:
        """Refuse what cannot work at the driver, before the rows are dealt.

        Raises:
            ClusterError: no port is free.
            ConfigError: the package for encryption is not installed, or Spark would start workers twice.
        """
        conf = cluster.context.getConf()
        longest = conf.get("spark.speculation.task.duration.threshold", None)
        if longest is not None and str(conf.get("spark.speculation", "false")).lower() == "true":
            raise ConfigError(
                f'engine.name is "server", but spark.speculation is true, and '
                f"spark.speculation.task.duration.threshold is {longest}: Spark would start each worker once "
                f"more after that time, and end the first. Start with --conf spark.speculation=false"
            )
        desk = _desk_of(cluster, config)
        try:
            desk.start(most_bytes=0)
        finally:
            desk.close()

    def go_on(self, solver: ArrivalSolver, turns: Mapping[int, int], shards: ShardStates) -> None:
        """Let each shard begin anew, with the centre's weights and the turn after its last message."""
        self._turns = turns

    def advance(self, solver: ArrivalSolver, steps: int) -> SegmentReport:  # type: ignore[override]  # it carries arrivals only
        """Make steps."""
        report = SegmentReport()
        self._context.setJobDescription("sparksgd: workers of the server")
        if self._deaf_since_s is not None:  # which is not the time of turns
            deaf_s, self._deaf_since_s = time.monotonic() - self._deaf_since_s, None
            self._started = {one: (turn, since_s + deaf_s) for one, (turn, since_s) in self._started.items()}
        with self._cluster.job_watch.over(1):
            if not self._owned:
                self._begin(solver)
            while len(report.steps) < steps:
                report.steps += self._next_steps(solver)
        self._deaf_since_s = time.monotonic()
        report.sent_bytes, self._exchanged_bytes = self._exchanged_bytes, 0
        return report

    def evaluate(self, solver: CentralSolver) -> Evaluation:
        """Evaluate the solver's weights on the test rows, by the workers, each on those that its host has.

        If a host with test rows has no worker, Spark evaluates; if it has no free slot, all workers leave it.
        """
        assert self._test is not None
        found = evaluated_by_workers(
            self._desk, self._orders, self._known(), self._test.table, solver.readout(),
            hold=self._hold, meanwhile=self._look_at_jobs, timeout_s=self._step_timeout_s,
        )  # fmt: skip
        if found is None:
            ours, others = self._cluster.running_tasks()
            taken = max(ours, self._jobs.asked) + others  # who waits for a slot gets the next one
            if taken >= self._cluster.slots() or self._jobs.mends:
                with self._cluster.job_watch.over(1):
                    self._release()
                    self._jobs.end_mending()
            return super().evaluate(solver)
        total = Reply(leaves=len(found))
        for shard, sums in sorted(found.items()):
            add_partial(total.partials, (shard, shard + 1), sums, total.leaves)
        evaluation = total.total()
        assert isinstance(evaluation, Evaluation)
        return evaluation

    def _known(self) -> dict[int, Here]:
        """Return the workers that are here, also those whose events are not handled yet."""
        known = dict(self._here)
        for event in self._held:
            if isinstance(event, Came) and event.frame.kind == HERE:
                with suppress(PeerLost):  # it is cut off when that is handled
                    known[event.worker] = here_in(event.seat, event.frame)
        return known

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Continue with the same rows in other shards."""
        raise AssertionError("shards of arrivals make turns at their own pace: none is starved")

    def close(self) -> None:
        """End the workers' jobs, and stop listening."""
        with ExitStack() as last:  # all of it, also if Ctrl-C comes within
            last.callback(super().close)
            last.callback(self._strangers.say, is_last=True)
            last.callback(self._note_dropped)
            last.callback(self._desk.close)
            last.callback(cleanup()(self._jobs.close))
            with cleanup():
                self._release()

    # What the exchange carries

    def take(self, shard: int, answer: Answer) -> None:
        """Keep a shard's answer for its next turn."""
        self._answers[shard] = answer

    def start(self, shard: int, turn: int) -> None:
        """Tell a shard's worker to make a turn."""
        worker, frame = self._worker_of[shard], turn_frame(shard, turn, self._answers.pop(shard, None))
        self._started[shard] = turn, time.monotonic()
        if worker in self._here:  # else its other shards are about to be lost, too
            self._exchanged_bytes += frame.array_bytes
            self._orders.give(worker, self._here[worker].seat, TurnOrder(shard=shard, turn=turn))
            self._desk.send(worker, self._here[worker].seat, frame)

    def forget(self, shard: int) -> None:
        """Forget what is on its way to a shard."""
        self._answers.pop(shard, None)
        self._started.pop(shard, None)
        self._rows_due.pop(shard, None)

    # Steps

    def _begin(self, solver: ArrivalSolver) -> None:
        """Listen, and ask all workers."""
        rows, partition_of = self._plan.sampling.shard_rows, self._shards.partition_of
        self._worker_of = {shard: self._workers[partition_of[shard]] for shard in sorted(partition_of)}
        for worker in sorted(self._workers):
            mine = [shard for shard, of in self._worker_of.items() if of == worker]
            self._owned[worker] = [shard for shard in mine if rows[shard]]
        worker_of = {shard: worker for worker, mine in self._owned.items() for shard in mine}
        self._wanted = set(worker_of.values())
        self._seen_s = dict.fromkeys(self._wanted, time.monotonic())
        self._exchange = ArrivalExchange(solver, worker_of, self, self._turns)
        self._vectors = Vectors.of(solver.readout(), len(solver.flat.parts))
        evaluated = 0 if self._test is None else max(shard.rows for shard in self._test.table)
        most_bytes = self._vectors.most_bytes(self._plan.halves.vectors, evaluated)
        self._desk.start(most_bytes, self._vectors.shapes)
        self._ask_all()

    def _ask_all(self) -> None:
        self._begins_at_s = time.monotonic() + _GATHER_S
        self._jobs.ask(sorted(self._wanted))

    def _submit(self, worker: int, request: int) -> Any:
        """Submit the job of a worker."""
        partition = self._workers.index(worker)
        partition_of = self._shards.partition_of
        task = WorkerTask(
            request=request,
            worker=worker,
            shards=[shard for shard in self._shards.table if partition_of[shard.shard] == partition],
            server=self._desk.address,
        )
        self._desk.expect(worker, request)
        placed = self._cluster.at_place(task, self._shards.place_of(partition))
        return (
            self._cluster.placed_rdd([placed])
            .mapPartitions(partial(work, self._shipped))
            ._jrdd.collectAsync()
        )

    def _next_steps(self, solver: ArrivalSolver) -> list[StepReport]:
        """Let things happen until a step is made; return the reports of the steps."""
        exchange = self._exchange
        assert exchange is not None
        self._use.begin()
        began_s, turns_before, ignored = time.perf_counter(), solver.turns, exchange.ignored
        while not exchange.has_steps:
            self._look()
            self._begin_those_who_are_here()
            event = self._held.popleft() if self._held else self._next(_LOOK_S * self._jobs.are_out)
            if event is not None:
                self._happens(event)
            elif not self._jobs.are_out:
                self._ask_all()  # they had left for an evaluation
            elif not self._started and not self._begins_at_s and self._here.keys() >= self._wanted:
                raise all_are_held(f"step {solver.version}")
        steps, trace = exchange.take_steps()
        total_s = time.perf_counter() - began_s
        reports = arrival_reports(
            solver,
            self._plan,
            steps,
            turns_before=turns_before,
            timing=self._use.timing(total_s),
            trace=trace,
            ignored=exchange.ignored - ignored,
            workers=self._use.workers,
            server=self._use.told(total_s),
        )
        self._use = UseSinceStep(self._desk)
        return reports

    def _happens(self, event: Joined | Left | Came | _Lost) -> None:
        """Take note of what a worker did."""
        assert self._exchange is not None
        if isinstance(event, _Lost):
            self._exchange.lost(event.shard)
        elif isinstance(event, Joined):
            self._jobs.joined(event.worker)
        elif isinstance(event, Left):
            log.debug("worker %d left: %s", event.worker, event.why)
            self._jobs.left(event.worker, event.request, event.why)
            if self._here.pop(event.worker, None) is not None and not self._begins_at_s:
                self._use.lost_workers += 1
            lost = [_Lost(shard) for shard in self._owned[event.worker]]
            self._held.extendleft(reversed(lost))  # one by one: each may let others make steps
        elif isinstance(event, Came):
            try:
                self._came(event.worker, event.seat, event.frame)
            except PeerLost as error:
                self._desk.cut_off(event.worker, event.seat, error)

    def _came(self, worker: int, seat: int, frame: Frame) -> None:
        """Take a worker's frame.

        Raises:
            PeerLost: it is none that was due.
            SparkSGDError: it says that the worker failed.
        """
        assert self._exchange is not None
        if frame.kind == HERE:
            self._here[worker] = here_in(seat, frame)
            if not self._begins_at_s:
                for shard in self._owned[worker]:
                    self._exchange.back(shard)
            return
        if frame.kind == FAILED:
            raise failure_in(frame)
        if frame.kind in ANSWERS_OF_EVALUATIONS:
            return  # of an evaluation that has ended without it
        shard, turn = field_of(frame, "shard", int), field_of(frame, "turn", int)
        here = self._here.get(worker)
        is_due = here is not None and here.seat == seat and shard in self._owned[worker]
        if here is None or not is_due or frame.kind not in ANSWERS_OF_TURNS:
            raise PeerLost(f'it sent a frame of kind "{frame.kind}" of shard {shard}')
        if self._started.get(shard, (None, 0.0))[0] != turn:
            raise PeerLost(f"it made turn {turn} of shard {shard}, which was not asked for")
        rows = self._plan.sampling.piece_rows(shard, turn)
        rows_due = self._rows_due.get(shard, 0) + rows
        names = self._plan.halves.names
        message = message_in(frame, self._vectors, rows_due, names) if frame.kind == SENT else None
        self._rows_due[shard] = rows_due - (0 if message is None else message.rows)
        self._use.note_turn(worker, here, rows, times_in(frame))
        self._exchanged_bytes += frame.array_bytes
        del self._started[shard]
        self._jobs.progressed(worker)
        began_s = time.perf_counter()
        if message is None:
            self._exchange.turned(shard)
        else:
            self._exchange.pushed(shard, message)
            self._use.update_s += time.perf_counter() - began_s

    def _begin_those_who_are_here(self) -> None:
        """Let all shards begin together, or, after a while, those of the workers that are here."""
        assert self._exchange is not None
        if not self._begins_at_s or not self._here:
            return
        if self._here.keys() >= self._wanted or time.monotonic() > self._begins_at_s:
            self._begins_at_s = 0.0
            for shard, worker in self._worker_of.items():
                if worker in self._here and shard in self._owned[worker]:
                    self._exchange.back(shard)

    def _look_at_jobs(self) -> bool:
        """Now and then: look at jobs, and at who was not let in; return whether it was done now."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s < _LOOK_S:
            return False
        self._looked_at_s = now_s
        self._jobs.look()
        self._note_dropped()
        return True

    def _look(self) -> None:
        """Now and then: look at jobs, at who is away, and at turns that take too long."""
        if not self._look_at_jobs() or self._begins_at_s or self._held:
            return
        now_s = time.monotonic()
        self._say_who_is_away(set(self._here), now_s)
        for shard, (turn, since_s) in list(self._started.items()):
            worker = self._worker_of[shard]
            if now_s - since_s > self._step_timeout_s and not self._desk.has_news(worker):
                why = f"turn {turn + 1} of shard {shard} took longer than {self._step_timeout_s:g} s"
                self._jobs.give_up(worker, why)
                del self._started[shard]
                self._desk.drop(worker, self._here[worker].seat, why)

    def _say_who_is_away(self, here: set[int], now_s: float) -> None:
        """Warn now and then of workers that are gone for long: the rows of their shards are not used."""
        self._seen_s.update(dict.fromkeys(here, now_s))
        away = {w: since_s for w in self._wanted - here if now_s - (since_s := self._seen_s[w]) > _AWAY_S}
        for worker, since_s in sorted(away.items()):
            self._seen_s[worker] = now_s
            shards = ", ".join(map(str, self._owned[worker]))
            log.warning(
                "worker %d is away for %.0f s more, and rows of shards %s are not used: it waits for a slot, "
                "or for its executor",
                worker, now_s - since_s, shards,
            )  # fmt: skip

    def _note_dropped(self) -> None:
        """Count the connections that were refused, and log them now and then."""
        dropped = self._desk.take_dropped()
        self.recovery.strangers += dropped.total()
        self._strangers.note("the driver", dropped)
        self._strangers.say()

    def _mend(self, missing: tuple[int, ...]) -> Iterator[None]:
        """Write lost shards again, and these training shards; called in a thread."""
        self.recovery.rebuilt_shards += self._shards.recover(missing)
        yield
        if self._test is not None:
            self.recovery.rebuilt_shards += self._test.recover(())

    def _release(self) -> None:
        """Let all workers leave; what they sent before is used at the next step."""
        for worker, seat in self._desk.seats.items():
            self._desk.send(worker, seat, Frame(kind=LEAVE))
        self._jobs.end(_PATIENCE_S, partial(self._hear, sends_off=True))
        for worker, seat in self._desk.seats.items():
            self._desk.drop(worker, seat, "its job was cancelled")
        while self._hear(0.0):
            pass

    def _hear(self, timeout_s: float = 0.05, *, sends_off: bool = False) -> bool:
        """Keep what happens next; return whether something did."""
        event = self._next(timeout_s)
        if sends_off and isinstance(event, Joined):
            self._desk.send(event.worker, event.seat, Frame(kind=LEAVE))
        if event is not None:
            self._hold(event)
        return event is not None

    def _hold(self, event: Joined | Left | Came) -> None:
        """Keep an event for later; why a connection ended is told at once, for its job ends, too."""
        if isinstance(event, Left):
            self._jobs.left(event.worker, event.request, event.why)
        self._held.append(event)

    def _next(self, timeout_s: float) -> Joined | Left | Came | None:
        event = self._desk.next(timeout_s)
        order = self._orders.note(event)
        if order is None and isinstance(event, Came) and event.frame.kind in ANSWERS_OF_EVALUATIONS:
            why = f'it sent a frame of kind "{event.frame.kind}" unasked'
            self._desk.cut_off(event.worker, event.seat, why)
        return event

    def _watch(self, needed: int, limit_s: float | None = None) -> AbstractContextManager[Watched]:
        """Watch the job that the block runs; if it gets no slot for long, the workers leave theirs."""
        beside = (
            HoldsSlots(running=self._jobs.running, end=self._jobs.make_room) if self._jobs.asked else None
        )
        return self._cluster.job_watch.over(needed, limit_s, beside)

    def _await_slots(self) -> None:
        """Wait for one slot: workers may come later."""
        self._cluster.wait_for_slots(1)

    def _map(self, shards: SparkShards, task: Callable[[int, Iterable[Descriptor]], Iterable[T]]) -> RDD[T]:
        """Return the RDD of a task over the workers' shards, in an ordinary stage."""
        return self._map_in_place(shards, task)


def _desk_of(cluster: Cluster, config: EngineConfig) -> ServerDesk:
    """Return where the workers of a run come."""
    return ServerDesk(
        run=secrets.token_bytes(8),
        credentials=Credentials.new(encrypt=encrypts(cluster, config)),
        host=cluster.driver_host,
        listen_on=cluster.driver_bind_address,
        ports=config.port_range,
        num_workers=cluster.num_workers,
        timeout_s=config.peer_timeout_s,
    )
