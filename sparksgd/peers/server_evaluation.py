"""An evaluation by the workers of the server: each takes test shards of its host, when it has nothing to do.

A worker that makes a turn gets none before that has ended, and one that is late with an earlier evaluation
none before it has answered: orders would pile up before it, and their weights at the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from sparksgd.arithmetic.flat import Weights
from sparksgd.data.shard import Descriptor
from sparksgd.engines.gathering.evaluations import EvaluationGathering
from sparksgd.engines.replies import Evaluation
from sparksgd.errors import PeerLost
from sparksgd.models.metrics import can_be_added
from sparksgd.peers.server_desk import Came, Joined, Left, ServerDesk
from sparksgd.peers.server_frames import (
    HERE,
    MISSING,
    Here,
    evaluate_frame,
    evaluation_in,
    here_in,
)
from sparksgd.peers.server_orders import ANSWERS_OF_EVALUATIONS, EvaluationOrder, Orders, TurnOrder

__all__ = ["evaluated_by_workers"]

_LOOK_S = 0.5


def evaluated_by_workers(
    desk: ServerDesk,
    orders: Orders,
    here: Mapping[int, Here],
    table: Sequence[Descriptor],
    weights: Weights,
    *,
    hold: Callable[[Joined | Left | Came], object],
    meanwhile: Callable[[], object],
    timeout_s: float,
) -> dict[int, Evaluation | None] | None:
    """Let workers evaluate, and return the sums of each test shard; None if they cannot.

    Args:
        desk: reaches the workers.
        orders: which of them are busy.
        here: who is known to be here.
        table: the test shards.
        weights: what to evaluate.
        hold: called with what else happens, in its order; the run goes on with that.
        meanwhile: called now and then.
        timeout_s: how long may pass without an answer.
    """
    evaluation = _Evaluation(desk, orders, here, table, weights)
    answered_s = time.monotonic()
    while not evaluation.is_complete:
        if evaluation.cannot_go_on:
            return None
        if time.monotonic() - answered_s > timeout_s:
            evaluation.drop_the_busy(f"it answered nothing for {timeout_s:g} s (engine.step_timeout_s)")
            return None
        meanwhile()
        event = desk.next(_LOOK_S)
        order = orders.note(event)
        if event is None:
            continue
        if not (isinstance(event, Came) and event.frame.kind in ANSWERS_OF_EVALUATIONS):
            hold(event)
        try:
            evaluation.happens(event, order)
        except PeerLost as error:
            desk.cut_off(event.worker, event.seat, error)
            continue
        if order is not None:  # a turn's, too: the evaluation waits for those that were going on
            answered_s = time.monotonic()
    return evaluation.found


class _Evaluation:
    """One evaluation."""

    def __init__(
        self,
        desk: ServerDesk,
        orders: Orders,
        here: Mapping[int, Here],
        table: Sequence[Descriptor],
        weights: Weights,
    ) -> None:
        self._desk, self._orders, self._weights = desk, orders, weights
        self._number = orders.next_evaluation()
        self._gathering = EvaluationGathering({shard.shard: shard.host for shard in table})
        self._of_shard = {shard.shard: shard for shard in table}
        self._has_weights: set[int] = set()
        self._is_missing = False
        seats = desk.seats
        self._known = {worker: one for worker, one in here.items() if seats.get(worker) == one.seat}
        for worker in sorted(self._known):
            self._give(worker)

    @property
    def is_complete(self) -> bool:
        """Return whether all shards are answered."""
        return self._gathering.is_complete

    @property
    def cannot_go_on(self) -> bool:
        """Return whether the workers that are here do not have all shards."""
        hosts = {one.host for one in self._known.values()}
        return self._is_missing or not self._gathering.can_go_on(hosts)

    @property
    def found(self) -> dict[int, Evaluation | None]:
        """The sums of the shards."""
        return self._gathering.found

    def happens(self, event: Joined | Left | Came, order: TurnOrder | EvaluationOrder | None) -> None:
        """Take note of an event, and of the order that it answers.

        Raises:
            PeerLost: it is none that was due.
        """
        worker = event.worker
        if isinstance(event, Left):
            self._gathering.left(worker)
            self._has_weights.discard(worker)
            self._known.pop(worker, None)
        elif isinstance(event, Came):
            if event.frame.kind == HERE:
                self._known[worker] = here_in(event.seat, event.frame)
            elif event.frame.kind in ANSWERS_OF_EVALUATIONS:
                self._answered(event, order)
            self._give(worker)

    def drop_the_busy(self, why: str) -> None:
        """Cut those off who have an order that they do not answer."""
        for worker, one in self._known.items():
            if not self._orders.is_free(worker, one.seat):
                self._desk.cut_off(worker, one.seat, why)

    def _answered(self, event: Came, order: TurnOrder | EvaluationOrder | None) -> None:
        if not isinstance(order, EvaluationOrder):
            raise PeerLost(f'it sent a frame of kind "{event.frame.kind}", which was not asked for')
        if order.evaluation != self._number:
            return  # late, of an earlier one
        if event.frame.kind == MISSING:
            self._is_missing = True
            return
        sums = evaluation_in(event.frame)
        like = next((one for one in self.found.values() if one is not None), None)
        if sums is not None and like is not None and not can_be_added(like.sums, sums.sums):
            raise PeerLost(f"the sums of test shard {order.shard} are others than those of the other shards")
        self._gathering.answered(order.shard, sums)

    def _give(self, worker: int) -> None:
        """Give a worker that has nothing to do the next shard."""
        one = self._known.get(worker)
        if one is None or not self._orders.is_free(worker, one.seat):
            return
        number = self._gathering.give(worker, one.host)
        if number is None:
            return
        version = self._weights.version
        given = None if worker in self._has_weights else self._weights
        self._has_weights.add(worker)
        order = EvaluationOrder(evaluation=self._number, shard=number, version=version)
        self._orders.give(worker, one.seat, order)
        self._desk.send(worker, one.seat, evaluate_frame(self._of_shard[number], version, given))
