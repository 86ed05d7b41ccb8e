"""The doctor's screen: every word of every finding is on it, at any width."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
from rich.console import Console

from sparksgd.cli.doctor import examine, screen
from sparksgd.config import Config
from sparksgd.spark import session
from sparksgd.spark.doctor.examination import Group
from sparksgd.spark.doctor.findings import bad, good, poor, unseen
from sparksgd.spark.session import refuse_threads

GROUPS = [
    Group(
        title="Slots", findings=[good("slots", "2, for 2 workers"), unseen("threads", "there are no workers")]
    ),
    Group(
        title="Executors",
        findings=[
            bad("their Python", "the executors' Python on node1 lacks torch " * 3, "`make dist` " * 12),
            poor("cores", "[bold]8 threads[/bold] on 4 cores", "fewer"),
            poor("disk", "/a/very/long/" + "path/" * 40, "another"),
        ],
    ),
]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_for_each_finding_and_its_fix_below(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(screen(GROUPS))
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    begins = [line.split()[0] for line in lines if line[:4].strip()]
    assert begins == ["pass", "skip", "fail", "warn", "warn"]
    words = "".join(console.file.getvalue().split())
    for group in GROUPS:
        for finding in group.findings:
            assert "".join(finding.seen.split()) in words
            assert "".join(finding.fix.split()) in words
    assert words.count("fix") == 3


PRINTS = """
import os, subprocess, sys
from rich.console import Console
from sparksgd.cli import doctor
from sparksgd.config import Config

def examined(*_):
    print("of a module")
    os.write(1, b"of C code\\n")
    subprocess.run(["echo", "of a child"])
    print("a warning", file=sys.stderr)
    if sys.argv[1:]:
        raise ValueError("ended")
    return [], {}

doctor._examined = examined
console = Console(file=sys.stderr)
doctor.examine(Config(), None, within_s=1, as_json=True, console=console, progress=console)
"""


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_json_is_one_document_whatever_the_users_code_prints(stderr):
    done = subprocess.run([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=stderr, check=True)
    document = json.loads(done.stdout)
    printed = {"of a module", "of C code", "of a child"}
    if stderr == subprocess.STDOUT:  # as below spark-submit
        printed.add("a warning")
    else:
        assert b"a warning" in done.stderr
    assert set(document["printed"].splitlines()) == printed


def test_what_was_printed_before_an_error_is_shown():
    done = subprocess.run(
        [sys.executable, "-c", PRINTS, "raise"], capture_output=True, check=False, text=True
    )
    assert done.stdout == ""
    assert "of a module" in done.stderr
    assert "ValueError: ended" in done.stderr


def test_more_threads_than_cores_are_a_line_of_the_screen(monkeypatch):
    @contextmanager
    def refused(name, train, timeout_s):
        refuse_threads({"spark.master": "local[2]"}.get, train.threads)
        yield

    monkeypatch.setattr(session, "job_session", refused)
    said = io.StringIO()
    config = Config.from_dict({"train": {"threads": 3}})
    console = Console(file=said, width=300)
    assert not examine(config, None, within_s=1, as_json=False, console=console, progress=console)
    assert "train.threads is 3, but an executor has 2 cores (local[2])" in said.getvalue()
    assert "set train.threads=2 or less" in said.getvalue()
