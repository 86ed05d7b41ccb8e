"""Gathering of rounds: events in, instructions out.

Unless a test says otherwise: four workers, worker w with shard w, a slot for each on any executor; requests
count from 1, and the step of version v is the one that makes version v + 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.engines.gathering.rounds import (
    Arrived,
    Ask,
    Began,
    Ended,
    Fail,
    Finish,
    Note,
    Placed,
    RoundEvent,
    RoundGathering,
    RoundInstruction,
    Slots,
    Take,
)
from sparksgd.engines.trace import TraceEvent, took_part_of
from sparksgd.errors import NotFinite, PeerLost, ShardMissing, SparkSGDError, UpdateNotFinite, UserCodeError
from sparksgd.solvers.protocol import Quorum


def gathering(
    owned: Mapping[int, Iterable[int]] | int = 4,
    *,
    slots: int | None = None,
    places: Mapping[int, str | None] | None = None,
    executors: Iterable[str] = (),
) -> RoundGathering:
    """Return a machine that knows its slots and who has which shards; of so many workers, one shard each."""
    found = RoundGathering()
    workers = {w: (w,) for w in range(owned)} if isinstance(owned, int) else owned
    count = len(workers) if slots is None else slots
    assert found.handle(Slots(count=count, executors=frozenset(executors))) == []
    assert found.handle(placed(workers, places)) == []
    return found


def placed(owned: Mapping[int, Iterable[int]], places: Mapping[int, str | None] | None = None) -> Placed:
    return Placed(
        owned={worker: tuple(shards) for worker, shards in owned.items()},
        place_of=places or dict.fromkeys(owned),
    )


def began(version: int, shards: Iterable[int] = range(4), *, backups: int = 0) -> Began:
    asked = frozenset(shards)
    return Began(version=version, turn=version, quorum=Quorum(shards=asked, enough=len(asked) - backups))


def reply(request: int, worker: int, *, shards: tuple[int, ...] | None = None, rows: int = 5) -> Arrived:
    """Return a worker's reply, of its one shard unless some are named."""
    return Arrived(request=request, worker=worker, shards=(worker,) if shards is None else shards, rows=rows)


def failed(request: int, worker: int, failure: SparkSGDError) -> Arrived:
    return Arrived(request=request, worker=worker, shards=(worker,), rows=0, failure=failure)


def missing(worker: int) -> ShardMissing:
    return ShardMissing(f"shard {worker} is gone", (worker,))


def ask(request: int, *workers: int) -> Ask:
    return Ask(request=request, workers=workers)


def take(worker: int) -> Take:
    return Take(worker=worker)


def finish(*late: int) -> Finish:
    return Finish(late=late)


def kinds(events: Iterable[TraceEvent]) -> list[tuple[str, int | None, int]]:
    return [(event.kind, event.shard, event.version) for event in events]


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


# Lost shards


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


# Empty shards


def test_empty_shards_count_as_shards_but_do_not_end_a_step_by_themselves() -> None:
    machine = gathering()
    machine.handle(began(0, backups=2))
    assert machine.handle(reply(1, 0, rows=0)) == [take(0)]
    assert machine.handle(reply(1, 1, rows=0)) == [take(1)]  # two would be enough, but have no row
    assert machine.handle(reply(1, 2)) == [take(2), finish(3)]
    pushes = [event.shard for event in machine.trace.take() if event.kind == "push"]
    assert pushes == [0, 1, 2]


# Failures


@pytest.mark.parametrize("failure", [NotFinite("the loss is NaN"), UpdateNotFinite("so is the update")])
def test_nan_is_a_failure_in_a_fresh_reply_only(failure: SparkSGDError) -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3), backups=2))
    assert machine.handle(reply(1, 0)) == [take(0), finish(1, 2)]
    assert machine.handle(failed(1, 1, failure)) == []  # between two steps
    machine.handle(began(1, range(3), backups=2))
    assert machine.handle(failed(1, 2, failure)) == []
    assert machine.handle(failed(2, 0, failure)) == [Fail(error=failure)]


def test_any_other_failure_ends_the_run_whichever_step_it_is_of() -> None:
    failure = UserCodeError("forward raised")
    machine = gathering(2)
    machine.handle(began(0, range(2), backups=1))
    machine.handle(reply(1, 0))
    machine.handle(began(1, range(2), backups=1))
    assert machine.handle(failed(1, 1, failure)) == [Fail(error=failure)]


def test_a_job_that_ends_without_all_replies_of_the_current_step_is_a_lost_peer() -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3), backups=1))
    machine.handle(reply(1, 1))
    (fail,) = machine.handle(Ended(request=1))
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, PeerLost)
    assert str(fail.error) == "a job ended, but the answers of workers [0, 2] never came"


def test_a_job_of_the_current_step_that_failed_fails_the_step_with_its_error() -> None:
    machine, error = gathering(2), OSError("a stage failed")
    machine.handle(began(0, range(2)))
    assert machine.handle(Ended(request=1, error=error)) == [Fail(error=error)]


def test_a_job_of_an_earlier_step_that_failed_is_a_note_and_frees_its_workers() -> None:
    machine, error = gathering(2), OSError("a stage failed")
    machine.handle(began(0, range(2), backups=1))
    machine.handle(reply(1, 0))
    machine.handle(began(1, range(2)))
    assert machine.handle(Ended(request=1, error=error)) == [
        Note(text="a late task of step 1 failed", error=error),
        ask(3, 1),
    ]


def test_a_job_of_an_earlier_step_that_ends_in_silence_frees_its_workers() -> None:
    machine = gathering(2)
    machine.handle(began(0, range(2), backups=1))
    machine.handle(reply(1, 0))
    machine.handle(began(1, range(2), backups=1))
    assert machine.handle(Ended(request=1)) == []
    machine.handle(reply(2, 0))
    assert machine.handle(began(2, range(2), backups=1)) == [ask(3, 0, 1)]


def test_an_error_that_ends_the_run_is_one_whichever_step_it_is_of() -> None:
    machine, error = gathering(2), OSError("the session was stopped")
    machine.handle(began(0, range(2), backups=1))
    machine.handle(reply(1, 0))
    assert machine.handle(Ended(request=1, error=error, is_final=True)) == [Fail(error=error)]


def test_the_end_of_a_job_whose_replies_are_all_there_is_no_news() -> None:
    machine = gathering(2)
    machine.handle(began(0, range(2)))
    machine.handle(reply(1, 0))
    machine.handle(reply(1, 1))
    assert machine.handle(Ended(request=1, error=OSError("too late to matter"))) == []


# Slots


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


# Giving up


def test_what_arrives_of_a_step_that_was_given_up_is_nobody_s() -> None:
    machine = gathering(2)
    machine.handle(began(0, range(2)))
    machine.handle(reply(1, 0))
    machine.forget()
    assert (machine.running, machine.versions, machine.version_of(1)) == ({}, set(), None)
    assert machine.handle(reply(1, 1)) == []
    assert machine.handle(Ended(request=1, error=OSError("cancelled"), is_final=True)) == []
    assert machine.handle(began(0, range(2))) == [ask(2, 0, 1)]  # the same step, tried again
    assert machine.handle(reply(1, 1)) == []
    assert machine.handle(reply(2, 1)) == [take(1)]
    assert machine.handle(reply(2, 0)) == [take(0), finish()]
    assert took_part_of(machine.trace.take()) == ([{0, 1}], [0])


def test_a_step_that_ended_and_is_made_again_all_the_same_stands_once_in_the_trace() -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3), backups=1))
    machine.handle(reply(1, 0))
    assert machine.handle(reply(1, 1)) == [take(1), finish(2)]
    machine.forget()  # something else failed before the step was made
    machine.handle(began(0, range(3), backups=1))
    machine.handle(reply(2, 1))
    assert machine.handle(reply(2, 2)) == [take(2), finish(0)]
    assert took_part_of(machine.trace.take()) == ([{1, 2}], [0])


def test_who_is_lost_stays_lost_when_a_step_is_given_up() -> None:
    machine = gathering(3)
    machine.handle(began(0, range(3), backups=1))
    machine.handle(failed(1, 0, missing(0)))
    machine.forget()
    assert machine.lost.keys() == {0}
    assert machine.handle(began(0, range(3), backups=1)) == [ask(2, 1, 2)]


# Whatever happens


@dataclass(kw_only=True)
class Cluster:
    """Workers in virtual time, and the engine that does what the machine says; it checks each instruction."""

    chance: random.Random
    shards_of: dict[int, tuple[int, ...]]
    rows_of: dict[int, int]
    executors: list[str]
    slots: int

    machine: RoundGathering = field(default_factory=RoundGathering)
    now: float = 0.0
    queue: list[tuple[float, int, Any]] = field(default_factory=list)
    events: int = 0
    place_of: dict[int, str] = field(default_factory=dict)
    asked: dict[int, tuple[int, set[int]]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    """Workers whose files are gone, as nobody knows yet."""

    asked_for: dict[int, tuple[int, int]] = field(default_factory=dict)
    """What each request was for: the version, and which attempt."""

    quorum: Quorum | None = None
    version: int = 0
    attempts: int = 0
    taken: dict[int, Arrived] = field(default_factory=dict)
    steps: list[frozenset[int]] = field(default_factory=list)
    trace: list[TraceEvent] = field(default_factory=list)

    def place(self) -> None:
        """Write lost shards again; they may lie elsewhere then."""
        self.gone.clear()
        for worker in self.shards_of:
            if self.place_of.get(worker) not in self.executors:
                self.place_of[worker] = self.chance.choice(self.executors)
        self.feed(Slots(count=self.slots, executors=frozenset(self.executors)))
        self.feed(Placed(owned=self.shards_of, place_of=dict(self.place_of)))

    def later(self, event: Any, at_most: float = 5.0) -> None:
        self.events += 1
        heappush(self.queue, (self.now + self.chance.uniform(0.1, at_most), self.events, event))

    @property
    def busy(self) -> set[int]:
        return {worker for _, workers in self.asked.values() for worker in workers}

    def step(self, quorum: Quorum) -> None:
        """Make a step, again where it failed."""
        self.quorum = quorum
        if self.machine.lost and self.chance.random() < 0.3:
            self.place()
        while True:
            self.taken, before = {}, len(self.steps)
            try:
                self.feed(Began(version=self.version, turn=self.version, quorum=quorum))
                while len(self.steps) == before:
                    assert self.queue, "nothing is on its way, and the step waits for ever"
                    self.now, _, event = heappop(self.queue)
                    self.happens(event)
                if self.chance.random() < 0.1:
                    raise PeerLost("what has nothing to do with the machine")
                break
            except (ShardMissing, PeerLost):
                del self.steps[before:]
                self.attempts += 1
                self.machine.forget()
                self.asked.clear()
                self.place()
        self.version += 1
        self.trace += self.machine.trace.take()

    def happens(self, event: Any) -> None:
        """Let a reply, the end of a job or a change of the cluster reach the machine."""
        if isinstance(event, Slots):
            self.slots = event.count
            self.executors = sorted(event.executors)
            self.feed(event)
            return
        version, workers = self.asked.get(event.request, (None, set()))
        if isinstance(event, Ended):
            self.asked.pop(event.request, None)
            self.feed(event)
            return
        if event.worker in self.gone:
            event = failed(event.request, event.worker, missing(event.worker))
        elif version not in (None, self.version) and self.chance.random() < 0.2:
            event = failed(event.request, event.worker, NotFinite("late, and NaN"))
        workers.discard(event.worker)
        if version is not None and not workers:
            del self.asked[event.request]
        self.feed(event)
        if self.chance.random() < 0.1:
            self.feed(event)  # the same reply again

    def feed(self, event: RoundEvent) -> None:
        for told in self.machine.handle(event):
            self.do(told, event)

    def do(self, told: RoundInstruction, event: RoundEvent) -> None:
        quorum = self.quorum
        if isinstance(told, Ask):
            assert quorum is not None
            self.check_asked(told)
            self.asked[told.request] = (self.version, set(told.workers))
            for worker in told.workers:
                shards = tuple(shard for shard in self.shards_of[worker] if shard in quorum.shards)
                rows = sum(self.rows_of[shard] for shard in shards)
                self.later(Arrived(request=told.request, worker=worker, shards=shards, rows=rows))
                if self.chance.random() < 0.05:
                    self.gone.add(self.chance.choice(list(self.shards_of)))
            if self.chance.random() < 0.1:
                self.later(Ended(request=told.request, error=self.chance.choice([None, PeerLost("killed")])))
            if self.chance.random() < 0.2:
                executors = self.chance.sample("abc", self.chance.randint(1, 3))
                slots = self.chance.randint(1, len(self.shards_of))
                self.later(Slots(count=slots, executors=frozenset(executors)))
        elif isinstance(told, Take):
            assert isinstance(event, Arrived)
            assert event.failure is None
            assert told.worker == event.worker
            assert told.worker not in self.taken, "a worker counts twice"
            assert self.asked_for[event.request] == (self.version, self.attempts), "asked for another version"
            self.taken[told.worker] = event
        elif isinstance(told, Finish):
            assert quorum is not None
            shards = [shard for reply in self.taken.values() for shard in reply.shards]
            assert len(shards) == len(set(shards)), "a shard counts twice"
            assert quorum.enough <= len(shards)
            assert quorum.shards.issuperset(shards)
            assert sum(reply.rows for reply in self.taken.values()) > 0
            wanted = {worker for worker, own in self.shards_of.items() if quorum.shards.intersection(own)}
            assert told.late == tuple(sorted(wanted - self.taken.keys()))
            self.steps.append(frozenset(shards))
        elif isinstance(told, Fail):
            raise told.error

    def check_asked(self, told: Ask) -> None:
        workers = set(told.workers)
        assert workers
        assert len(workers) == len(told.workers)
        assert not workers & self.busy, "a worker is asked that has not replied"
        assert not workers & self.taken.keys(), "a worker is asked that is in the step"
        assert not workers & self.machine.lost.keys(), "a worker is asked whose shards are gone"
        now_busy = self.busy | workers
        assert len(now_busy) <= self.slots, "more workers are busy than there are slots"
        for executor in self.executors:
            there = [worker for worker in now_busy if self.place_of[worker] == executor]
            if any(worker in workers for worker in there):
                assert len(there) <= max(1, self.slots // len(self.executors))
        self.asked_for[told.request] = (self.version, self.attempts)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    steps=st.integers(1, 12),
    one_each=st.booleans(),
)
def test_whatever_is_late_or_lost_the_steps_are_whole_and_the_trace_tells_them(
    seed: int, sizes: list[int], steps: int, one_each: bool
) -> None:
    chance = random.Random(seed)
    sizes = [1] * len(sizes) if one_each else sizes
    firsts = [sum(sizes[:worker]) for worker in range(len(sizes))]
    shards = range(sum(sizes))
    cluster = Cluster(
        chance=chance,
        shards_of={
            worker: tuple(range(first, first + size))
            for worker, (first, size) in enumerate(zip(firsts, sizes, strict=True))
        },
        rows_of={shard: chance.choice([0, 1, 4]) for shard in shards} | {chance.choice(shards): 3},
        executors=["a", "b"][: chance.randint(1, 2)],
        slots=chance.randint(1, len(sizes)),
    )
    cluster.place()
    with_rows = frozenset(shard for shard, rows in cluster.rows_of.items() if rows)
    backups = chance.randint(0, len(sizes) - 1) if one_each else 0
    first = Quorum(shards=frozenset(shards), enough=len(shards) - backups)
    for _ in range(steps):
        quorum = first
        if not backups and chance.random() < 0.5:  # as a replay asks
            some = frozenset(chance.sample(shards, chance.randint(1, len(shards)))) | {min(with_rows)}
            quorum = Quorum(shards=some, enough=len(some))
        cluster.step(quorum)
    took_part, deals = took_part_of(cluster.trace)
    assert took_part == cluster.steps
    assert deals == [0] * steps
    lost: set[int | None] = set()
    for event in cluster.trace:
        assert event.kind in ("start", "push", "lost")
        assert event.kind != "push" or event.shard not in lost, "a lost shard pushes before it starts again"
        if event.kind == "lost":
            lost.add(event.shard)
        elif event.kind == "start":
            lost.discard(event.shard)
