"""Files of a run that are far too large are refused by name and size, or read as far as they belong to it."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_trace_file
from resumed_jobs import SHORT, Jobs, without_digests

from sparksgd.engines.simulated.recorded_times import recorded_turns_s
from sparksgd.errors import DataError
from sparksgd.runs.replay import read_replay
from sparksgd.runs.stragglers import read_arrivals

TERABYTE = 1 << 40  # of which nothing is on the disk
MIB = 1 << 20


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has a trace."""
    out = test_trace_file.run(tmp_path_factory.mktemp("traced"))
    without_digests(out)
    return out


@pytest.fixture
def enlarged(request: pytest.FixtureRequest, traced: Path) -> Iterator[Path]:
    """Return a run of which one file has a terabyte."""
    file, before = traced / request.param, (traced / request.param).read_bytes()
    os.truncate(file, TERABYTE)
    yield traced
    file.write_bytes(before)


def most_bytes(deed: Callable[[], object]) -> int:
    """Return the peak of Python's memory during a deed."""
    tracemalloc.start()
    try:
        deed()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("enlarged", "read"),
    [
        ("metrics.jsonl", read_replay),
        ("metrics.jsonl", read_arrivals),
        ("metrics.jsonl", lambda folder: recorded_turns_s(str(folder))),
        ("trace.jsonl", read_replay),
    ],
    indirect=["enlarged"],
)
def test_it_is_refused_with_its_name_and_size(enlarged: Path, read: Callable[[Path], object]) -> None:
    def refused() -> None:
        with pytest.raises(DataError, match=r"its line \d+ has more than .* and all of it 1,099,511,627,776"):
            read(enlarged)

    assert most_bytes(refused) < 64 * MIB


def test_a_run_goes_on_from_the_part_that_belongs_to_its_checkpoint(
    jobs: Jobs, every_checkpoint: None, whole: dict[str, Any]
) -> None:
    jobs.stopped_at("enlarged", 2, SHORT)
    os.truncate(jobs.folder / "enlarged" / "metrics.jsonl", TERABYTE)
    again = jobs.run("enlarged", SHORT)  # a terabyte would be a MemoryError
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    assert (jobs.folder / "enlarged" / "metrics.jsonl").stat().st_size < MIB
