"""Gathering of rounds with few slots: who is asked first, and who waits for whose slot."""

from __future__ import annotations

from round_events import ask, began, finish, gathering, reply, take

from sparksgd.engines.gathering.rounds import Ask, Slots


def test_with_fewer_slots_than_workers_the_next_is_asked_when_one_is_free() -> None:
    machine = gathering(3, slots=2)
    assert machine.handle(began(0, range(3))) == [ask(1, 0, 1)]
    assert machine.handle(reply(1, 1)) == [take(1), ask(2, 2)]
    assert machine.handle(reply(2, 2)) == [take(2)]
    assert machine.handle(reply(1, 0)) == [take(0), finish()]


def test_nobody_more_is_asked_while_enough_are_on_their_way() -> None:
    machine = gathering(4, slots=2)
    assert machine.handle(began(0, backups=2)) == [ask(1, 0, 1)]
    assert machine.handle(reply(1, 0)) == [take(0)]  # worker 1 will be the second
    assert machine.handle(reply(1, 1)) == [take(1), finish(2, 3)]


def test_those_who_made_the_fewest_steps_are_asked_first() -> None:
    machine = gathering(3, slots=1)
    asked = []
    for version in range(6):
        (told,) = machine.handle(began(version, range(3), backups=2))
        assert isinstance(told, Ask)
        asked += told.workers
        machine.handle(reply(told.request, *told.workers))
    assert asked == [0, 1, 2, 0, 1, 2]


def test_a_new_slot_is_used_at_once_where_the_step_needs_it() -> None:
    machine = gathering(3, slots=1)
    assert machine.handle(began(0, range(3))) == [ask(1, 0)]
    assert machine.handle(Slots(count=2, executors=frozenset())) == [ask(2, 1)]
    assert machine.handle(Slots(count=1, executors=frozenset())) == []
    assert machine.handle(reply(1, 0)) == [take(0)]  # the only slot is taken
    assert machine.handle(reply(2, 1)) == [take(1), ask(3, 2)]


def test_each_executor_has_its_share_of_the_slots() -> None:
    places = {0: "a", 1: "a", 2: "a", 3: "b"}
    machine = gathering(4, slots=4, places=places, executors=["a", "b"])
    assert machine.handle(began(0)) == [ask(1, 0, 1, 3)]  # two of a's three fit
    assert machine.handle(reply(1, 3)) == [take(3)]  # b's slots are of no use to a's shards
    assert machine.handle(reply(1, 0)) == [take(0), ask(2, 2)]


def test_shards_of_an_executor_that_is_gone_or_of_none_may_go_anywhere() -> None:
    places = {0: "gone", 1: None, 2: "a", 3: "a"}
    machine = gathering(4, slots=3, places=places, executors=["a"])
    assert machine.handle(began(0)) == [ask(1, 0, 1, 2)]


def test_a_straggler_keeps_the_slot_of_its_executor() -> None:
    places = {0: "a", 1: "a", 2: "b", 3: "b"}
    machine = gathering(4, slots=2, places=places, executors=["a", "b"])
    assert machine.handle(began(0, backups=3)) == [ask(1, 0, 2)]
    assert machine.handle(reply(1, 0)) == [take(0), finish(1, 2, 3)]
    assert machine.handle(began(1, backups=3)) == [ask(2, 1)]  # 3 waits for the slot of 2
    assert machine.handle(reply(2, 1)) == [take(1), finish(0, 2, 3)]
