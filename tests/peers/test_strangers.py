"""A flood of strangers is counted to the last one, and takes one line of the log a minute."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from sparksgd.peers.strangers import StrangersLog


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparksgd")


def test_the_first_strangers_are_told_at_once_by_door_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    strangers = StrangersLog(Clock())
    strangers.note("the driver", Counter({"wrong secret": 2, "no proof in time": 1}))
    strangers.note("worker 1", Counter({"wrong secret": 1200}))
    strangers.note("worker 0", Counter())
    strangers.say()
    assert caplog.messages == [
        "1,203 connections of strangers were dropped: 1,200 to worker 1 (wrong secret: 1,200), "
        "3 to the driver (no proof in time: 1, wrong secret: 2)"
    ]


def test_a_flood_of_an_hour_takes_one_line_a_minute_and_none_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    strangers = StrangersLog(clock)
    for _ in range(36_000):
        strangers.note("the driver", Counter({"wrong secret": 1}))
        strangers.say()
        clock.now_s += 0.1
    strangers.note("worker 0", Counter({"left before its proof": 5}))
    strangers.say()
    strangers.say(is_last=True)
    assert len(caplog.messages) <= 61
    told = [int(message.split()[0].replace(",", "")) for message in caplog.messages]
    assert told[0] == 1
    assert sum(told) == 36_005


def test_what_is_unsaid_is_said_at_the_end_and_only_once(caplog: pytest.LogCaptureFixture) -> None:
    strangers = StrangersLog(Clock())
    strangers.say(is_last=True)
    assert caplog.messages == []
    strangers.note("the driver", Counter({"wrong secret": 1}))
    strangers.say()
    strangers.note("the driver", Counter({"wrong secret": 7}))
    strangers.say()
    assert len(caplog.messages) == 1
    strangers.say(is_last=True)
    strangers.say(is_last=True)
    assert caplog.messages[1:] == [
        "7 connections of strangers were dropped: 7 to the driver (wrong secret: 7)"
    ]


def test_of_many_doors_those_with_the_most_strangers_are_named(caplog: pytest.LogCaptureFixture) -> None:
    strangers = StrangersLog(Clock())
    for worker in range(1000):
        strangers.note(f"worker {worker}", Counter({"wrong secret": worker + 1}))
    strangers.say()
    (line,) = caplog.messages
    assert line.startswith("500,500 connections of strangers were dropped: 1,000 to worker 999 (")
    assert line.endswith("the others to 992 more workers")
    assert len(line) < 500
