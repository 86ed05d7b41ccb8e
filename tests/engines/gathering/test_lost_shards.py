"""Gathering of rounds where shards are lost: a step does without them while backups last, and fails then."""

from __future__ import annotations

from round_events import ask, began, failed, finish, gathering, kinds, missing, placed, reply, take

from sparksgd.engines.gathering.rounds import Fail, Note
from sparksgd.errors import ShardMissing


def test_a_worker_whose_shards_are_gone_is_told_of_and_done_without_while_backups_last() -> None:
    machine = gathering()
    machine.handle(began(0, backups=1))
    (note,) = machine.handle(failed(1, 2, missing(2)))
    assert note == Note(text="worker 2 is lost, and training goes on without it: shard 2 is gone")
    assert machine.lost.keys() == {2}
    machine.handle(reply(1, 0))
    machine.handle(reply(1, 1))
    assert machine.handle(reply(1, 3)) == [take(3), finish(2)]
    assert machine.handle(began(1, backups=1)) == [ask(2, 0, 1, 3)]


def test_one_lost_worker_more_than_backups_fails_the_step_with_all_that_is_missing() -> None:
    machine = gathering()
    machine.handle(began(0, backups=1))
    machine.handle(failed(1, 3, missing(3)))
    (fail,) = machine.handle(failed(1, 1, missing(1)))
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, ShardMissing)
    assert (fail.error.shards, str(fail.error)) == ((3, 1), "shard 3 is gone; shard 1 is gone")


def test_without_backups_the_first_lost_worker_fails_the_step() -> None:
    machine = gathering(2)
    machine.handle(began(0, range(2)))
    (fail,) = machine.handle(failed(1, 0, missing(0)))
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, ShardMissing)
    assert fail.error.shards == (0,)


def test_a_loss_that_a_late_reply_tells_counts_for_the_step_that_goes_on() -> None:
    machine = gathering()
    machine.handle(began(0, backups=2))
    machine.handle(reply(1, 0))
    assert machine.handle(reply(1, 1)) == [take(1), finish(2, 3)]
    machine.trace.take()
    machine.handle(began(1, backups=1))
    (note,) = machine.handle(failed(1, 2, missing(2)))
    assert isinstance(note, Note)
    assert kinds(machine.trace.take())[-1] == ("lost", 2, 0)  # it was lost in the turn of step 1
    (fail,) = machine.handle(failed(1, 3, missing(3)))
    assert isinstance(fail, Fail)


def test_losses_between_two_steps_are_kept_for_the_next_one() -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3), backups=1))
    machine.handle(reply(1, 0))
    assert machine.handle(reply(1, 1)) == [take(1), finish(2)]
    (note,) = machine.handle(failed(1, 2, missing(2)))
    assert isinstance(note, Note)
    (fail,) = machine.handle(began(1, range(3)))  # a step without backups
    assert isinstance(fail, Fail)
    assert machine.running == {}


def test_nobody_says_that_training_goes_on_where_it_will_not() -> None:
    machine = gathering()
    machine.handle(began(0, backups=2))
    machine.handle(reply(1, 0))
    assert machine.handle(reply(1, 1)) == [take(1), finish(2, 3)]
    machine.handle(began(1, (0, 1)))
    machine.handle(reply(2, 0))
    assert machine.handle(reply(2, 1)) == [take(1), finish()]
    assert machine.handle(failed(1, 2, missing(2))) == []  # the last step had no backup
    assert machine.lost.keys() == {2}


def test_lost_shards_that_were_written_again_are_asked_again() -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3), backups=1))
    machine.handle(failed(1, 2, missing(2)))
    machine.handle(reply(1, 0))
    machine.handle(reply(1, 1))
    assert machine.handle(placed({0: (0,), 1: (1,), 2: (2,)})) == []
    assert machine.lost == {}
    assert machine.handle(began(1, range(3), backups=1)) == [ask(2, 0, 1, 2)]


def test_a_reply_of_before_a_recovery_loses_nobody_again() -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3), backups=2))
    assert machine.handle(reply(1, 0)) == [take(0), finish(1, 2)]
    machine.handle(placed({0: (0,), 1: (1,), 2: (2,)}))  # while 1 and 2 still read what was there before
    machine.handle(began(1, range(3)))
    assert machine.handle(failed(1, 1, missing(1))) == [ask(3, 1)]  # it is free, and its shard is there
    assert machine.lost == {}
    (fail,) = machine.handle(failed(3, 1, missing(1)))  # lost once more
    assert isinstance(fail, Fail)


def test_a_step_whose_only_rows_are_lost_fails_so_that_they_are_written_again() -> None:
    machine = gathering(2)
    machine.handle(began(0, range(2), backups=1))
    machine.handle(failed(1, 1, missing(1)))
    (taken, fail) = machine.handle(reply(1, 0, rows=0))  # an empty shard is no step
    assert taken == take(0)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, ShardMissing)
    assert fail.error.shards == (1,)


def test_a_step_that_begins_with_nobody_to_ask_waits_for_those_who_are_late() -> None:
    machine = gathering(2)
    machine.handle(began(0, range(2), backups=1))
    assert machine.handle(reply(1, 0)) == [take(0), finish(1)]
    machine.handle(began(1, range(2), backups=1))
    (note,) = machine.handle(failed(2, 0, missing(0)))
    assert isinstance(note, Note)  # worker 1 is busy with the step before, and comes back
    assert machine.handle(reply(1, 1)) == [ask(3, 1)]
    assert machine.handle(reply(3, 1)) == [take(1), finish(0)]
