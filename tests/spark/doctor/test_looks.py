"""A look that breaks, hangs or hears a warning is a finding, and the others go on."""

from __future__ import annotations

import logging
import threading

from sparksgd.spark.doctor.findings import good
from sparksgd.spark.doctor.looks import Looks

log = logging.getLogger("sparksgd")
ENDLESS_S = 600.0


def no_jobs() -> None:
    """Cancel nothing."""


def test_what_was_found_before_an_error_is_kept():
    def look():
        yield good("a", "seen")
        raise KeyError("b")

    found = Looks(ENDLESS_S, no_jobs).make("c", look, ENDLESS_S)
    assert [(one.name, one.status) for one in found] == [("a", "pass"), ("c", "fail")]
    assert found[1].seen == "KeyError: 'b'"
    assert found[1].fix


def test_a_look_that_hangs_is_cut_off_its_jobs_cancelled_and_the_next_one_made():
    cancelled = threading.Event()

    def hangs():
        yield good("a", "seen")
        assert cancelled.wait(ENDLESS_S)

    looks = Looks(ENDLESS_S, cancelled.set)
    found = looks.make("b", hangs, 0.05)
    assert cancelled.is_set()
    assert [(one.name, one.status) for one in found] == [("a", "pass"), ("b", "fail")]
    assert "cut off" in found[1].seen
    assert looks.make("c", lambda: [good("c", "seen")], ENDLESS_S) == [good("c", "seen")]


def test_what_the_time_does_not_reach_is_skipped_and_never_passes():
    over = threading.Event()
    looks = Looks(0.05, over.set)
    (finding,) = looks.make("a", lambda: over.wait(ENDLESS_S) and [], ENDLESS_S)
    assert (finding.status, "not finished within" in finding.seen) == ("skip", True)
    (finding,) = looks.make("b", lambda: [good("b", "seen")], ENDLESS_S)
    assert (finding.status, "were over" in finding.seen) == ("skip", True)


def test_a_warning_of_the_library_is_a_finding_once_and_nothing_else_shows_it(caplog):
    def warns():
        log.warning("%s is slow", "it")
        log.info("not of interest")
        return [good("a", "seen")]

    looks = Looks(ENDLESS_S, no_jobs)
    found = looks.make("a", warns, ENDLESS_S)
    assert [(one.name, one.status, one.seen) for one in found] == [
        ("a", "pass", "seen"), ("a", "warn", "it is slow"),
    ]  # fmt: skip
    assert looks.make("b", warns, ENDLESS_S) == [good("a", "seen")]
    assert not caplog.records
    log.warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]


def test_a_warning_has_a_fix_its_own_or_that_of_all():
    def warns():
        log.warning("it is slow; submit with --conf fast=true")
        log.warning("it is odd")
        return []

    advised, odd = Looks(ENDLESS_S, no_jobs).make("a", warns, ENDLESS_S)
    assert (advised.seen, advised.fix) == ("it is slow", "submit with --conf fast=true")
    assert odd.seen == "it is odd"
    assert "change what the line names" in odd.fix


def test_warnings_that_a_look_has_told_itself_are_not_told_twice():
    def warns():
        log.warning("it is slow")
        return [good("a", "seen")]

    assert Looks(ENDLESS_S, no_jobs).make("a", warns, ENDLESS_S, is_told=True) == [good("a", "seen")]
