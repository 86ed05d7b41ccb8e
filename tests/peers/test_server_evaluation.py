"""An evaluation by the server's workers: who is given test shards when, and which answers count."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from sparksgd.arithmetic.flat import Weights
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.data.shard import Descriptor
from sparksgd.engines.replies import Evaluation
from sparksgd.peers import server_evaluation, server_frames
from sparksgd.peers.frames import Frame
from sparksgd.peers.server_desk import Came, Joined, Left
from sparksgd.peers.server_evaluation import evaluated_by_workers
from sparksgd.peers.server_frames import EVALUATE, HERE, SENT, Here
from sparksgd.peers.server_orders import Orders, TurnOrder

NUMERICS = Numerics.here(1)


class Desk:
    """A desk whose workers are told what happens, one thing each time that it is looked."""

    def __init__(self, *events: Any) -> None:
        self.events, self.seats = deque(events), {0: 10, 1: 11}
        self.sent: list[tuple[int, int, bool]] = []
        self.dropped: list[tuple[int, str]] = []

    def send(self, worker: int, seat: int, frame: Frame) -> None:
        assert frame.kind == EVALUATE
        self.sent.append((worker, frame.fields["shard"]["shard"], bool(frame.arrays)))

    def cut_off(self, worker: int, seat: int, why: object) -> None:
        self.dropped.append((worker, str(why)))
        self.events.appendleft(Left(worker=worker, seat=seat, request=1, why=str(why)))

    def next(self, _: float) -> Any:
        return self.events.popleft() if self.events else None


class Ending(Desk):
    """A desk that nobody may wait at, once all has happened."""

    def next(self, _: float) -> Any:
        return self.events.popleft()


def came(worker: int, frame: Frame, seat: int | None = None) -> Came:
    return Came(worker=worker, seat=10 + worker if seat is None else seat, frame=frame)


def answer(worker: int, shard: int, version: int = 7, **sums: Any) -> Came:
    found = Evaluation(loss=0.5, correct=None, rows=4, sums=sums)
    return came(worker, server_frames.evaluated_frame(shard, version, found))


def missing(worker: int, shard: int, version: int = 7) -> Came:
    return came(worker, server_frames.missing_frame(shard, version))


def sent(worker: int, shard: int, turn: int) -> Came:
    return came(worker, Frame(kind=SENT, fields={"shard": shard, "turn": turn}))


def evaluated(
    desk: Desk, orders: Orders, version: int = 7, held: list[Any] | None = None, shards: int = 2
) -> dict[int, Evaluation | None] | None:
    here = {worker: Here(seat=seat, host="a", numerics=NUMERICS) for worker, seat in desk.seats.items()}
    table = [
        Descriptor(shard=number, host="a", path="/b", rows=4, repeats=0, row_digest=(1, 7), digest="c")
        for number in range(shards)
    ]
    none, three = np.zeros(0), np.zeros(3, np.float32)
    weights = Weights(version=version, parameters=three, statistics=none, counters=none)
    return evaluated_by_workers(
        desk, orders, here, table, weights,  # type: ignore[arg-type]
        hold=(held if held is not None else []).append, meanwhile=lambda: None, timeout_s=60,
    )  # fmt: skip


def test_a_worker_in_a_turn_is_given_a_shard_when_that_has_ended() -> None:
    orders, held = Orders(), []
    orders.give(1, 11, TurnOrder(shard=3, turn=5))
    desk = Desk(sent(1, 3, 5), answer(1, 1), answer(0, 0))
    assert desk.sent == []
    assert (evaluated(desk, orders, held=held) or {}).keys() == {0, 1}
    assert desk.sent == [(0, 0, True), (1, 1, True), (1, 0, False)]
    assert [event.frame.kind for event in held] == [SENT]


def test_who_is_late_with_an_earlier_evaluation_gets_nothing_before_it_has_answered() -> None:
    orders = Orders()
    late = Desk(answer(0, 0), answer(0, 1))
    assert evaluated(late, orders, version=7) is not None
    assert late.sent == [(0, 0, True), (1, 1, True), (0, 1, False)]
    for version in (8, 9, 10):
        desk = Desk(answer(0, 0, version), answer(0, 1, version))
        assert evaluated(desk, orders, version) is not None
        assert desk.sent == [(0, 0, True), (0, 1, False)]
    desk = Desk(answer(1, 1, 7), answer(0, 0, 11), answer(1, 1, 11))  # now it is here
    assert evaluated(desk, orders, version=11) is not None
    assert desk.sent == [(0, 0, True), (1, 1, True), (0, 1, False)]


def test_a_shard_that_is_missing_counts_for_its_own_evaluation_alone() -> None:
    orders = Orders()
    assert evaluated(Desk(answer(0, 0), answer(0, 1)), orders) is not None
    desk = Desk(missing(1, 1, 7), answer(0, 0, 8), answer(0, 1, 8))
    assert evaluated(desk, orders, version=8) is not None
    assert evaluated(Ending(missing(0, 0, 9)), Orders(), version=9) is None


@pytest.mark.parametrize("event", [answer(0, 1), answer(0, 0, 6), answer(0, 5), missing(0, 1)])
def test_an_answer_that_was_not_asked_for_cuts_its_worker_off(event: Came) -> None:
    desk = Desk(event, answer(1, 1), answer(1, 0))
    found = evaluated(desk, Orders())
    assert found is not None
    assert [worker for worker, _ in desk.dropped] == [0]
    assert "which was not asked for" in desk.dropped[0][1]


def test_sums_of_other_metrics_cut_their_worker_off() -> None:
    counts, scores = np.ones((3, 2)), np.ones((3, 9))
    desk = Desk(
        answer(0, 0, counts=counts, ranked=scores),
        answer(1, 1, counts=np.ones((3, 4)), ranked=scores),
        answer(0, 1, counts=counts, ranked=np.ones((3, 8))),
    )
    found = evaluated(desk, Orders())
    assert found is not None
    assert [worker for worker, _ in desk.dropped] == [1]
    assert found[1] is not None
    assert found[1].sums["counts"].tolist() == counts.tolist()


def test_who_comes_meanwhile_is_given_shards_and_who_is_gone_has_no_orders_any_more() -> None:
    orders = Orders()
    orders.give(1, 11, TurnOrder(shard=3, turn=5))
    here = server_frames.here_frame("a", NUMERICS)
    desk = Desk(
        Left(worker=1, seat=11, request=1, why="it broke"), Joined(worker=1, seat=12),
        came(1, here, seat=12), came(1, answer(1, 1).frame, seat=12), answer(0, 0),
    )  # fmt: skip
    assert here.kind == HERE
    assert evaluated(desk, orders) is not None
    assert desk.sent[:2] == [(0, 0, True), (1, 1, True)]


def test_a_wait_ends_also_if_something_else_happens_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(server_evaluation.time, "monotonic", lambda: now_s[0])

    class Restless(Desk):
        def next(self, _: float) -> Any:
            now_s[0] += 1.0
            return sent(1, 3, int(now_s[0]))

    orders = Orders()
    orders.give(0, 10, TurnOrder(shard=3, turn=5))  # it hangs
    desk = Restless()
    assert evaluated(desk, orders) is None
    assert now_s[0] == 61.0
    assert dict(desk.dropped)[0] == "it answered nothing for 60 s (engine.step_timeout_s)"
