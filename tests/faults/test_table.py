"""The page of faults keeps the rows that are not written again."""

from __future__ import annotations

from table import Fault, Outcome, Row, updated


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
