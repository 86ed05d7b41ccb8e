"""Gathering of rounds: who is asked, whose replies a step takes, and when it ends."""

from __future__ import annotations

from round_events import ask, began, failed, finish, gathering, kinds, missing, reply, take

from sparksgd.engines.gathering.rounds import Began, Fail
from sparksgd.engines.trace import took_part_of
from sparksgd.solvers.protocol import Quorum

# Steps of all workers


def test_all_are_asked_and_the_step_ends_when_all_have_replied() -> None:
    machine = gathering()
    assert machine.handle(began(0)) == [ask(1, 0, 1, 2, 3)]
    assert machine.running == {1: {0, 1, 2, 3}}
    assert machine.handle(reply(1, 2)) == [take(2)]
    assert machine.handle(reply(1, 0)) == [take(0)]
    assert machine.running == {1: {1, 3}}
    assert machine.handle(reply(1, 1)) == [take(1)]
    assert machine.handle(reply(1, 3)) == [take(3), finish()]
    assert machine.running == {}
    assert machine.handle(began(1)) == [ask(2, 0, 1, 2, 3)]


def test_what_was_asked_and_taken_is_in_the_trace_once() -> None:
    machine = gathering(2)
    machine.handle(began(7, range(2)))
    machine.handle(reply(1, 1))
    assert kinds(machine.trace.take()) == [("start", 0, 7), ("start", 1, 7)]
    machine.handle(reply(1, 0))
    events = machine.trace.take()
    assert kinds(events) == [("push", 1, 7), ("push", 0, 7)]
    assert {(event.turn, event.worker == event.shard) for event in events} == {(7, True)}
    assert machine.trace.take() == ()


def test_the_turn_of_the_trace_is_the_first_of_the_round() -> None:
    machine = gathering(1)
    machine.handle(Began(version=3, turn=48, quorum=Quorum(shards=frozenset({0}), enough=1)))
    machine.handle(reply(1, 0))
    assert [(event.kind, event.turn, event.version) for event in machine.trace.take()] == [
        ("start", 48, 3),
        ("push", 48, 3),
    ]


def test_the_versions_that_somebody_may_compute_are_known() -> None:
    machine = gathering(2)
    assert machine.versions == set()
    machine.handle(began(0, range(2), backups=1))
    assert machine.versions == {0}
    machine.handle(reply(1, 0))
    assert machine.versions == {0}  # worker 1 still computes
    machine.handle(began(1, range(2), backups=1))
    assert machine.versions == {0, 1}
    machine.handle(reply(1, 1))
    assert machine.versions == {1}
    assert (machine.version_of(1), machine.version_of(2)) == (None, 1)


# Steps of the first workers


def test_with_a_backup_the_first_three_end_the_step_and_the_fourth_is_late() -> None:
    machine = gathering()
    assert machine.handle(began(0, backups=1)) == [ask(1, 0, 1, 2, 3)]
    machine.handle(reply(1, 3))
    machine.handle(reply(1, 0))
    assert machine.handle(reply(1, 1)) == [take(1), finish(2)]


def test_a_straggler_is_not_asked_before_it_has_replied_and_its_late_reply_is_dropped() -> None:
    machine = gathering()
    machine.handle(began(0, backups=1))
    for worker in (0, 1):
        machine.handle(reply(1, worker))
    assert machine.handle(reply(1, 3)) == [take(3), finish(2)]
    assert machine.handle(began(1, backups=1)) == [ask(2, 0, 1, 3)]
    assert machine.handle(reply(1, 2)) == []  # of the step before
    machine.handle(reply(2, 0))
    machine.handle(reply(2, 1))
    assert machine.handle(reply(2, 3)) == [take(3), finish(2)]
    assert machine.handle(began(2, backups=1)) == [ask(3, 0, 1, 2, 3)]
    pushes = [event for event in machine.trace.take() if event.kind == "push"]
    assert kinds(pushes) == [("push", shard, version) for version in (0, 1) for shard in (0, 1, 3)]


def test_a_late_reply_between_two_steps_is_dropped() -> None:
    machine = gathering(2)
    machine.handle(began(0, range(2), backups=1))
    assert machine.handle(reply(1, 0)) == [take(0), finish(1)]
    assert machine.handle(reply(1, 1)) == []
    assert machine.handle(began(1, range(2), backups=1)) == [ask(2, 0, 1)]


def test_a_straggler_is_asked_again_in_the_same_step_where_the_step_needs_it() -> None:
    machine = gathering(3, slots=3)
    machine.handle(began(0, range(3), backups=2))
    assert machine.handle(reply(1, 0)) == [take(0), finish(1, 2)]
    assert machine.handle(began(1, range(3), backups=1)) == [ask(2, 0)]  # 1 and 2 are busy
    assert machine.handle(reply(2, 0)) == [take(0)]
    assert machine.handle(reply(1, 2)) == [ask(3, 2)]
    assert machine.handle(reply(1, 1)) == []  # worker 2 is enough
    assert machine.handle(reply(3, 2)) == [take(2), finish(1)]


def test_the_same_reply_again_counts_once() -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3)))
    assert machine.handle(reply(1, 0, rows=0)) == [take(0)]
    assert machine.handle(reply(1, 0, rows=0)) == []
    assert machine.handle(reply(1, 1, rows=0)) == [take(1)]
    assert machine.handle(reply(1, 2)) == [take(2), finish()]


# Empty shards


def test_empty_shards_count_as_shards_but_do_not_end_a_step_by_themselves() -> None:
    machine = gathering()
    machine.handle(began(0, backups=2))
    assert machine.handle(reply(1, 0, rows=0)) == [take(0)]
    assert machine.handle(reply(1, 1, rows=0)) == [take(1)]  # two would be enough, but have no row
    assert machine.handle(reply(1, 2)) == [take(2), finish(3)]
    pushes = [event.shard for event in machine.trace.take() if event.kind == "push"]
    assert pushes == [0, 1, 2]


# Several shards, and some of them


def test_a_worker_s_shards_come_together() -> None:
    machine = gathering({0: (0, 1, 2), 1: (3, 4)})
    assert machine.handle(began(0, range(5))) == [ask(1, 0, 1)]
    assert machine.handle(reply(1, 0, shards=(0, 1, 2))) == [take(0)]
    assert machine.handle(reply(1, 1, shards=(3, 4))) == [take(1), finish()]
    assert took_part_of(machine.trace.take()) == ([frozenset(range(5))], [0])


def test_a_replay_asks_only_for_the_shards_of_its_step() -> None:
    machine = gathering({0: (0, 1), 1: (2, 3), 2: (4,)})
    assert machine.handle(began(0, (1, 2))) == [ask(1, 0, 1)]
    assert kinds(machine.trace.take()) == [("start", 1, 0), ("start", 2, 0)]
    assert machine.handle(reply(1, 1, shards=(2,))) == [take(1)]
    assert machine.handle(reply(1, 0, shards=(1,))) == [take(0), finish()]  # worker 2 is not late
    assert took_part_of(machine.trace.take()) == ([frozenset({1, 2})], [0])
    assert machine.handle(began(1, (4,))) == [ask(2, 2)]


def test_a_replay_does_without_nobody() -> None:
    machine = gathering(3)
    machine.handle(began(0, (0, 2)))
    assert machine.handle(reply(1, 0)) == [take(0)]
    (fail,) = machine.handle(failed(1, 2, missing(2)))
    assert isinstance(fail, Fail)
