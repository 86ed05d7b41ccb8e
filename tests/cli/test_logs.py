"""Log lines name their run, and can be JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from sparksgd.cli.logs import are_json, log_to, open_console

log = logging.getLogger("sparksgd")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def test_a_line_in_a_file_has_time_level_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    log_to(Console(file=io.StringIO()), "run7")
    log.warning("%d slots", 3)
    assert not are_json()
    assert capsys.readouterr().err.split()[2:] == ["WARNING", "run7", "3", "slots"]


def test_a_long_line_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    log_to(Console(file=io.StringIO()), "run7")
    log.warning("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_json_is_one_object_a_line_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    log_to(Console(file=io.StringIO(), force_terminal=True), "run7", "json")
    assert are_json()
    log.warning('two\nlines and a "quote"')
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["run_id"], first["message"]) == (
        "WARNING",
        "run7",
        'two\nlines and a "quote"',
    )
    assert second["traceback"].endswith("ValueError: no")


def test_what_forces_colours_makes_no_file_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not open_console().is_terminal  # else a progress bar would be drawn into it
