"""What the server engine concludes from silence: what waits to be read counts as said; without Spark."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.errors import ClusterError
from sparksgd.peers.server_desk import Joined
from sparksgd.peers.server_frames import Here
from sparksgd.peers.server_orders import Orders
from sparksgd.spark.engines.server import ServerEngine
from sparksgd.spark.engines.server_use import UseSinceStep


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ServerEngine, "_look_at_jobs", lambda _: True)
    engine: Any = object.__new__(ServerEngine)
    engine._begins_at_s, engine._held, engine._wanted, engine._worker_of = 0.0, deque(), {0}, {3: 0}
    engine._here = {0: Here(seat=1, host="a", numerics=Numerics.here(1))}
    engine._seen_s, engine._started, engine._step_timeout_s, engine._orders = {}, {}, 60.0, Orders()
    return engine


def test_a_worker_whose_message_waits_to_be_read_is_not_given_up(engine: Any) -> None:
    given_up: list[int] = []
    news = [True, False]
    engine._started = {3: (5, time.monotonic() - 61)}
    engine._desk = SimpleNamespace(has_news=lambda _: news.pop(0), drop=lambda *_: None)
    engine._jobs = SimpleNamespace(give_up=lambda worker, why: given_up.append(worker))
    engine._look()
    assert given_up == []
    engine._look()
    assert given_up == [0]


def test_all_are_held_only_if_nothing_waits_to_be_read(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []
    events = [Joined(worker=0, seat=1), None]
    engine._desk = SimpleNamespace(next=lambda _: events.pop(0), idle_s=0.0)
    engine._use = UseSinceStep(engine._desk)
    engine._jobs = SimpleNamespace(are_out=True)
    engine._exchange = SimpleNamespace(has_steps=False, ignored=0)
    monkeypatch.setattr(ServerEngine, "_happens", lambda _, event: happened.append(event))
    with pytest.raises(ClusterError, match="after step 40 every shard waits"):
        engine._next_steps(SimpleNamespace(turns=0, version=40))
    assert happened == [Joined(worker=0, seat=1)]


def test_waits_of_an_evaluation_between_are_not_those_of_a_step() -> None:
    desk: Any = SimpleNamespace(idle_s=3.0)
    use = UseSinceStep(desk)
    desk.idle_s += 10.0  # of the evaluation
    use.begin()
    desk.idle_s += 0.25
    assert use.told(1.0).busy_s == 0.75


def test_who_comes_while_all_leave_is_sent_off_too(engine: Any) -> None:
    sent: list[tuple[int, int, str]] = []
    events: list[Any] = [Joined(worker=1, seat=7), None]
    engine._desk = SimpleNamespace(
        seats={0: 1}, next=lambda _: events.pop(0) if events else None, drop=lambda *_: None,
        send=lambda worker, seat, frame: sent.append((worker, seat, frame.kind)),
    )  # fmt: skip
    engine._jobs = SimpleNamespace(end=lambda _, meanwhile: meanwhile())
    engine._release()
    assert sent == [(0, 1, "leave"), (1, 7, "leave")]
    assert list(engine._held) == [Joined(worker=1, seat=7)]
