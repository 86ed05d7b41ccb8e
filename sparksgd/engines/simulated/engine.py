"""The simulated engine: it computes real gradients in this process, and lets virtual time pass.

Where the order of arrival shapes what is trained, that order follows from the section [cluster].  Equal keys
give equal bits and equal virtual times.  Rounds of all shards have the bits of every other engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, cast

from sparksgd.arithmetic.addition_tree import add_partial
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.config import ClusterConfig
from sparksgd.data.shard import Descriptor
from sparksgd.data.source import Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine, raise_failure
from sparksgd.engines.kinds import SIMULATED
from sparksgd.engines.protocol import (
    SegmentReport,
    StepReport,
    StepTiming,
    VirtualCost,
    arrival_reports,
    take_step,
)
from sparksgd.engines.replies import Reply
from sparksgd.engines.shard_work import ShardWork, zeros_of
from sparksgd.engines.simulated.arrivals import VirtualArrivals
from sparksgd.engines.simulated.costs import Costs
from sparksgd.engines.simulated.gossip import VirtualGossip
from sparksgd.engines.simulated.rounds import VirtualRounds
from sparksgd.errors import ConfigError
from sparksgd.solvers.arrivals import ArrivalSolver
from sparksgd.solvers.gossip import GossipSolver
from sparksgd.solvers.protocol import Answer, CentralSolver, Gradient, Need, RoundSolver, WorkerHalf

__all__ = ["SimulatedEngine"]


class SimulatedEngine(InlineEngine):
    """Computes in this process, and says what it would have taken on a cluster.

    Args:
        plan: what to compute.
        shards: rows to train on.
        test: rows to evaluate on.
        cluster: what things cost.
        num_workers: how many workers there are.
    """

    kinds = (SIMULATED,)
    name = SIMULATED.name
    mode = SIMULATED.mode

    def __init__(
        self, plan: Plan, shards: Shards, test: Shards | None, cluster: ClusterConfig, num_workers: int
    ) -> None:
        super().__init__(plan, shards, test)
        self._cluster, self._num_workers = cluster, num_workers
        self._arrivals: VirtualArrivals | None = None
        self._rounds: VirtualRounds | None = None
        self._virtual_gossip: VirtualGossip | None = None
        self._ended_s = 0.0
        self._told = 0, 0  # bytes, and lost workers

    def open(self) -> None:
        """Make the computer.

        Raises:
            ConfigError: there are more workers than shards, or more threads than cores.
        """
        count = len(self._shards.table)
        if self._num_workers > count:
            raise ConfigError(
                f"engine.num_workers is {self._num_workers}, but there are {count} shards, and each worker "
                f"needs one: set engine.num_workers to {count} or less, or raise train.num_shards"
            )
        if self._cluster.slow_workers > self._num_workers:
            raise ConfigError(
                f"cluster.slow_workers is {self._cluster.slow_workers}, but there are {self._num_workers} "
                f"workers: set it to {self._num_workers} or less"
            )
        super().open()
        self._begin_work()

    def contact(self) -> list[Numerics]:
        """Return this process's numerics, for each worker."""
        return super().contact() * self._num_workers

    def advance(self, solver: CentralSolver, steps: int) -> SegmentReport:
        """Make steps."""
        report = SegmentReport()
        while len(report.steps) < steps:
            if Need.ARRIVALS in solver.needs:
                report.steps += self._arrival_steps(cast(ArrivalSolver, solver))
            elif Need.GOSSIP in solver.needs:
                report.steps.append(self._gossip(cast(GossipSolver, solver)))
            else:
                report.steps.append(self._round(cast(RoundSolver, solver)))
        return report

    def deal_anew(self, deal: Callable[[], tuple[Plan, Shards]]) -> None:
        """Continue with the same rows in other shards."""
        super().deal_anew(deal)
        if self._rounds is not None:
            self._rounds.sampling = self._plan.sampling
        self._begin_work()

    def _begin_work(self) -> None:
        self._zeros = zeros_of(self._plan.sampling)
        self._work = ShardWork(self._computer, self._shards.table, self._turn)

    def _turn(self, shard: Descriptor, turn: int, half: WorkerHalf[Any], answer: Answer) -> Gradient | None:
        """Let a shard make a turn, with its gradient or with zeros."""
        if self._cluster.gradients:
            return super()._turn(shard, turn, half, answer)
        return self._zeros(shard, turn, half, answer)

    @cached_property
    def _owned(self) -> dict[int, tuple[int, ...]]:
        """Return the shards of each worker."""
        count = len(self._shards.table)
        return {w: tuple(balanced_range(w, self._num_workers, count)) for w in range(self._num_workers)}

    def _costs(self, solver: CentralSolver) -> Costs:
        return Costs(self._cluster, solver.readout().parameters.nbytes)

    def _arrival_steps(self, solver: ArrivalSolver) -> list[StepReport]:
        if self._arrivals is None:
            rows = self._plan.sampling.shard_rows
            worker_of = {s: worker for worker, shards in self._owned.items() for s in shards if rows[s]}
            self._arrivals = VirtualArrivals(
                solver, self._work, self._costs(solver), worker_of, self._plan.sampling.piece_rows
            )
        run, turns_before, ignored = self._arrivals, solver.turns, self._arrivals.ignored
        steps, trace = run.step()
        return arrival_reports(
            solver,
            self._plan,
            steps,
            turns_before=turns_before,
            timing=StepTiming(total=run.now_s - self._ended_s),
            trace=trace,
            ignored=run.ignored - ignored,
            virtual=self._cost(run.now_s, run.sent_bytes, run.losses),
        )

    def _gossip(self, solver: GossipSolver) -> StepReport:
        """Let all shards make a turn; return its report, at the time of the last one."""
        turns = self._turns_of(solver)
        if self._virtual_gossip is None:
            worker_of = {shard: worker for worker, shards in self._owned.items() for shard in shards}
            self._virtual_gossip = VirtualGossip(
                self._costs(solver), worker_of, self._plan.sampling.piece_rows, turns.lag
            )
        now_s = self._virtual_gossip.turn(solver, solver.turns)
        timing = StepTiming(total=now_s - self._ended_s)
        virtual = self._cost(now_s, self._virtual_gossip.sent_bytes, 0)
        return self._gossip_report(solver, turns.next(), timing, virtual)

    def _cost(self, now_s: float, sent_bytes: int, lost_workers: int) -> VirtualCost:
        """Return what a step took, of these sums since the run's start."""
        sent, lost = self._told
        self._ended_s, self._told = now_s, (sent_bytes, lost_workers)
        return VirtualCost(ends_s=now_s, sent_bytes=sent_bytes - sent, lost_workers=lost_workers - lost)

    def _round(self, solver: RoundSolver) -> StepReport:
        owned = self._owned
        if self._rounds is None:
            self._rounds = VirtualRounds(self._costs(solver), owned, self._plan.sampling)
        made = self._rounds.next(solver)
        reply = self._reply(solver, {worker: owned[worker] for worker in made.workers})
        virtual = self._cost(self._rounds.now_s, self._rounds.sent_bytes, self._rounds.losses)
        return take_step(
            solver, self._plan, reply, lambda: made.timing, late=made.late, arrivals=made.arrivals,
            trace=made.trace, virtual=virtual,
        )  # fmt: skip

    def _reply(self, solver: RoundSolver, shards_of: dict[int, tuple[int, ...]]) -> Reply:
        """Return the sum of what these workers send in a round."""
        asked, total = solver.quorum().shards, Reply(leaves=len(self._shards.table))
        for worker, shards in shards_of.items():
            if self._cluster.gradients:
                table = [self._shards.table[shard] for shard in shards]
                total += self._computer.round(worker, table, solver.answer(), asked)
            else:
                total += self._reply_of_zeros(asked.intersection(shards), solver.answer())
            raise_failure(total)
        missing = set(range(len(self._shards.table))).difference(*shards_of.values())
        for shard in sorted(missing):  # the tree needs to know that they are absent
            add_partial(total.partials, (shard, shard + 1), None, total.leaves)
        return total

    def _reply_of_zeros(self, shards: Iterable[int], answer: Answer) -> Reply:
        """Return what a worker sends if every gradient is 0."""
        reply = Reply(leaves=len(self._shards.table))
        for shard in shards:
            message = self._work.round(shard, answer)
            add_partial(reply.partials, (shard, shard + 1), message, reply.leaves)
            reply.shards.append(shard)
        return reply
