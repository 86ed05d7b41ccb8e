"""The page of faults keeps the rows that are not written again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from table import HEAD, Fault, Outcome, Row, updated, wanted


def row(engine: str, result: str, lost_s: float | None = None) -> Row:
    fault = Fault(name="executor", killed="its JVM", strike=lambda *_: Outcome(result="", is_right=True))
    outcome = Outcome(result=result, is_right=True, lost_s=lost_s)
    return Row(fault=fault, engine=engine, outcome=outcome, when="2026-01-02, v1")


def test_a_row_replaces_that_of_the_same_fault_and_engine():
    page = updated("", row("tree", "same bits", 1.26))
    page = updated(page, row("allreduce", "ClusterError: a | b"))
    page = updated(page, row("tree", "same bits; again", 0.1))
    lines = page.splitlines()
    assert lines[0] == "# What faults cost"
    assert lines[-3:] == [
        "|---|---|---|---|---|---|",
        "| executor | tree | its JVM | same bits; again | 0.1 | 2026-01-02, v1 |",
        "| executor | allreduce | its JVM | ClusterError: a   b | - | 2026-01-02, v1 |",
    ]
    assert page.endswith("|\n")


def test_the_page_begins_with_the_head_that_is_written_here():
    page = Path(__file__).resolve().parents[1] / "FAULTS.md"
    assert page.read_text().splitlines()[: len(HEAD)] == HEAD


def test_some_faults_strike_at_some_engines():
    faults = [row("tree", "").fault, replace(row("tree", "").fault, name="driver", engines=("server",))]
    assert wanted(faults, [""], [""]) == [replace(fault, engines=list(fault.engines)) for fault in faults]
    assert [fault.name for fault in wanted(faults, ["JVM"], ["server"])] == ["driver"]
    assert [fault.engines for fault in wanted(faults, ["executor"], ["tree"])] == [["tree"]]
