"""Gathering of rounds where replies and jobs fail, and of steps that are given up and made again."""

from __future__ import annotations

import pytest
from round_events import ask, began, failed, finish, gathering, missing, reply, take

from sparksgd.engines.gathering.rounds import Ended, Fail, Note
from sparksgd.engines.trace import took_part_of
from sparksgd.errors import NotFinite, PeerLost, SparkSGDError, UpdateNotFinite, UserCodeError

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
