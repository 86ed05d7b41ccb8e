"""Gathering of arrivals: events in, instructions out; the test is the centre, and says who may go on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.engines.gathering.arrivals import ArrivalGathering
from sparksgd.engines.gathering.shards import Back, Begin, Decided, Deliver, Drop, Lost, Pushed, Start
from sparksgd.engines.trace import TraceEvent


def begun(worker_of: Mapping[int, int] | int) -> ArrivalGathering:
    """Return a machine all of whose shards have version 0; of so many workers, one shard each."""
    machine = ArrivalGathering({w: w for w in range(worker_of)} if isinstance(worker_of, int) else worker_of)
    for begin in machine.begin():
        assert isinstance(begin, Begin)
        machine.handle(answer({begin.shard: 0}))
    machine.trace.take()
    return machine


def answer(versions: Mapping[int, int], to: int | None = None) -> Decided:
    return Decided(answers=versions, sender=to)


def pushed(shard: int) -> Pushed:
    return Pushed(shard=shard)


def start(shard: int, *, turn: int, version: int) -> Start:
    return Start(shard=shard, turn=turn, version=version)


def deliver(shard: int, *, version: int) -> Deliver:
    return Deliver(shard=shard, version=version)


def traced(events: Iterable[TraceEvent]) -> list[tuple[str, int | None, int, int]]:
    return [(event.kind, event.shard, event.turn, event.version) for event in events]


# At their own pace


def test_every_shard_begins_with_what_the_centre_says() -> None:
    machine = ArrivalGathering({0: 0, 1: 1})
    assert machine.begin() == [Begin(shard=0), Begin(shard=1)]
    assert machine.handle(answer({0: 0})) == [start(0, turn=0, version=0)]
    assert machine.handle(answer({1: 3})) == [start(1, turn=0, version=3)]
    assert traced(machine.trace.take()) == [
        ("pull", 0, 0, 0),
        ("start", 0, 0, 0),
        ("pull", 1, 0, 3),
        ("start", 1, 0, 3),
    ]


def test_a_message_goes_to_the_centre_and_its_shard_goes_on_from_the_answer() -> None:
    machine = begun(2)
    assert machine.handle(pushed(1)) == [deliver(1, version=0)]
    assert machine.handle(answer({1: 1}, to=1)) == [start(1, turn=1, version=1)]
    assert machine.handle(pushed(1)) == [deliver(1, version=1)]
    assert machine.handle(answer({1: 2}, to=1)) == [start(1, turn=2, version=2)]
    assert machine.handle(pushed(0)) == [deliver(0, version=0)]  # two versions old
    assert traced(machine.trace.take()) == [
        ("push", 1, 0, 0),
        ("pull", 1, 1, 1),
        ("start", 1, 1, 1),
        ("push", 1, 1, 1),
        ("pull", 1, 2, 2),
        ("start", 1, 2, 2),
        ("push", 0, 0, 0),
    ]


def test_a_shard_that_is_held_back_is_released_by_another_s_message() -> None:
    machine = begun(3)
    machine.handle(pushed(2))
    assert machine.handle(answer({}, to=2)) == []
    machine.handle(pushed(0))
    assert machine.handle(answer({}, to=0)) == []
    assert machine.handle(pushed(1)) == [deliver(1, version=0)]
    assert machine.handle(answer({2: 3, 0: 3, 1: 3}, to=1)) == [
        start(0, turn=1, version=3),
        start(1, turn=1, version=3),
        start(2, turn=1, version=3),
    ]
    assert [found[:2] for found in traced(machine.trace.take())] == [
        ("push", 2), ("hold", 2), ("push", 0), ("hold", 0), ("push", 1),
        ("pull", 0), ("pull", 1), ("pull", 2), ("start", 0), ("start", 1), ("start", 2),
    ]  # fmt: skip


def test_an_answer_to_the_sender_alone_leaves_the_others_held() -> None:
    machine = begun(2)
    machine.handle(pushed(0))
    machine.handle(answer({}, to=0))
    machine.handle(pushed(1))
    assert machine.handle(answer({1: 2}, to=1)) == [start(1, turn=1, version=2)]
    machine.handle(pushed(1))
    assert machine.handle(answer({0: 3}, to=1)) == [start(0, turn=1, version=3)]  # now 1 is held


# Several shards on one worker


def test_a_worker_makes_one_turn_at_a_time_in_the_order_of_release() -> None:
    machine = begun({0: 0, 1: 0, 2: 0, 3: 1})
    assert machine.handle(pushed(0)) == [deliver(0, version=0), start(1, turn=0, version=0)]
    assert machine.handle(answer({0: 1}, to=0)) == []  # after 2, which was released before
    assert machine.handle(pushed(1)) == [deliver(1, version=0), start(2, turn=0, version=0)]
    assert machine.handle(answer({1: 2}, to=1)) == []
    assert machine.handle(pushed(2)) == [deliver(2, version=0), start(0, turn=1, version=1)]
    assert machine.handle(answer({2: 3}, to=2)) == []
    assert machine.handle(pushed(0)) == [deliver(0, version=1), start(1, turn=1, version=2)]


def test_shards_that_are_released_together_start_one_on_each_worker() -> None:
    machine = begun({0: 0, 1: 0, 2: 1, 3: 1})
    for shard in (0, 2, 1, 3):
        machine.handle(pushed(shard))
        machine.handle(answer({}, to=shard))
    machine.trace.take()
    assert machine.handle(answer({3: 4, 2: 4, 1: 4, 0: 4})) == [
        start(0, turn=1, version=4),
        start(2, turn=1, version=4),
    ]
    assert [found[:2] for found in traced(machine.trace.take())] == [
        ("pull", 0), ("pull", 1), ("pull", 2), ("pull", 3), ("start", 0), ("start", 2),
    ]  # fmt: skip


# Lost, and back again


def test_who_is_lost_while_computing_is_dropped_and_its_message_is_nobody_s() -> None:
    machine = begun(2)
    assert machine.handle(Lost(shard=1)) == [Drop(shard=1)]
    assert machine.handle(pushed(1)) == []
    assert machine.handle(pushed(0)) == [deliver(0, version=0)]  # the others go on
    assert machine.handle(answer({0: 1}, to=0)) == [start(0, turn=1, version=1)]
    assert machine.handle(Back(shard=1)) == [Begin(shard=1)]
    assert machine.handle(pushed(1)) == []  # still of the turn before
    assert machine.handle(answer({1: 1})) == [start(1, turn=0, version=1)]  # the same turn, newer weights
    assert machine.handle(pushed(1)) == [deliver(1, version=1)]
    assert traced(machine.trace.take()) == [
        ("lost", 1, 0, 0),
        ("push", 0, 0, 0),
        ("pull", 0, 1, 1),
        ("start", 0, 1, 1),
        ("pull", 1, 0, 1),
        ("start", 1, 0, 1),
        ("push", 1, 0, 1),
    ]


def test_who_is_lost_while_held_is_not_released_and_begins_anew() -> None:
    machine = begun(2)
    machine.handle(pushed(0))
    machine.handle(answer({}, to=0))
    assert machine.handle(Lost(shard=0)) == [Drop(shard=0)]
    machine.handle(pushed(1))
    assert machine.handle(answer({0: 2, 1: 2}, to=1)) == [start(1, turn=1, version=2)]
    assert machine.handle(Back(shard=0)) == [Begin(shard=0)]
    assert machine.handle(answer({0: 2})) == [start(0, turn=1, version=2)]  # its first turn had been taken


def test_the_loss_of_one_may_release_another() -> None:
    machine = begun(2)
    machine.handle(pushed(0))
    machine.handle(answer({}, to=0))
    assert machine.handle(Lost(shard=1)) == [Drop(shard=1)]
    assert machine.handle(answer({0: 1})) == [start(0, turn=1, version=1)]


def test_who_is_lost_while_it_waits_for_its_worker_is_not_started() -> None:
    machine = begun({0: 0, 1: 0, 2: 0})
    assert machine.handle(Lost(shard=1)) == [Drop(shard=1)]
    assert machine.handle(pushed(0)) == [deliver(0, version=0), start(2, turn=0, version=0)]
    assert machine.handle(Back(shard=1)) == [Begin(shard=1)]
    assert machine.handle(answer({1: 1})) == []
    assert machine.handle(pushed(2)) == [deliver(2, version=0), start(1, turn=0, version=1)]


def test_when_one_is_lost_its_worker_makes_the_next_one_s_turn() -> None:
    machine = begun({0: 0, 1: 0})
    assert machine.handle(Lost(shard=0)) == [Drop(shard=0), start(1, turn=0, version=0)]


def test_a_message_whose_sender_is_lost_before_the_centre_decides_holds_nobody() -> None:
    machine = begun(2)
    machine.handle(pushed(0))
    machine.handle(Lost(shard=0))
    assert machine.handle(answer({}, to=0)) == []
    assert machine.handle(answer({0: 1}, to=0)) == []
    assert [found[:2] for found in traced(machine.trace.take())] == [("push", 0), ("lost", 0)]


def test_what_is_known_already_changes_nothing() -> None:
    machine = begun(2)
    assert machine.handle(Back(shard=0)) == []
    machine.handle(Lost(shard=0))
    assert machine.handle(Lost(shard=0)) == []
    machine.handle(Back(shard=0))
    assert machine.handle(Back(shard=0)) == []
    assert [found[:2] for found in traced(machine.trace.take())] == [("lost", 0)]


@pytest.mark.parametrize("shard", [0, 1], ids=["while it computes", "while it waits for its worker"])
def test_a_centre_that_answers_a_shard_twice_is_at_fault(shard: int) -> None:
    machine = begun({0: 0, 1: 0})
    with pytest.raises(AssertionError, match=f"shard {shard} is answered twice"):
        machine.handle(answer({shard: 1}))


# Whatever happens


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), workers=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_whatever_is_late_held_or_lost_each_worker_makes_one_turn_at_a_time(
    seed: int, workers: list[int]
) -> None:
    chance = random.Random(seed)
    machine = ArrivalGathering(dict(enumerate(workers)))
    running: dict[int, Start] = {}
    version = 0
    held: set[int] = set()
    lost: set[int] = set()
    next_turn = dict.fromkeys(range(len(workers)), 0)
    pushes: list[tuple[int, int, int]] = []

    def do(instructions: Iterable[Start | Deliver | Drop | Begin]) -> None:
        nonlocal version
        for told in instructions:
            assert told.shard not in lost or isinstance(told, Drop)
            if isinstance(told, Start):
                assert workers[told.shard] not in {workers[shard] for shard in running}
                assert told.turn == next_turn[told.shard]
                running[told.shard] = told
            elif isinstance(told, Deliver):
                version += 1
                next_turn[told.shard] += 1
                held.add(told.shard)
                free = {s for s in held if chance.random() < 0.5 or len(held) + len(lost) == len(workers)}
                held.difference_update(free)
                do(machine.handle(answer(dict.fromkeys(free, version), to=told.shard)))
            elif isinstance(told, Drop):
                held.discard(told.shard)
                free, _ = set(held), held.clear()
                do(machine.handle(answer(dict.fromkeys(free, version))))
            else:
                do(machine.handle(answer({told.shard: version})))

    do(machine.begin())
    for _ in range(40):
        choice = chance.random()
        if choice < 0.7 and running:
            shard = chance.choice(sorted(running))
            made = running.pop(shard)
            pushes.append((shard, made.turn, made.version))
            told = machine.handle(pushed(shard))
            assert told[0] == deliver(shard, version=made.version)
            do(told)
        elif choice < 0.85 and len(lost) < len(workers) - 1:
            shard = chance.choice([s for s in range(len(workers)) if s not in lost])
            lost.add(shard)
            running.pop(shard, None)
            do(machine.handle(Lost(shard=shard)))
        elif lost:
            shard = chance.choice(sorted(lost))
            lost.discard(shard)
            do(machine.handle(Back(shard=shard)))
        assert running, "nobody computes, and nobody ever will"
    events = machine.trace.take()
    assert [(e.shard, e.turn, e.version) for e in events if e.kind == "push"] == pushes
    last: dict[int | None, str] = {}
    before = {"start": {"pull"}, "push": {"start"}, "hold": {"push"}, "pull": {None, "push", "hold", "lost"}}
    for event in events:
        assert last.get(event.shard) in before.get(event.kind, {"start", "push", "hold", "pull"})
        last[event.shard] = event.kind
