"""The parts of a start add up to all of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

import sparksgd
from sparksgd.training.start_up import StartUp, warn_of_start


def started(*ends: float) -> StartUp:
    """Return a start at 100 whose parts ended at these times."""
    times = iter(ends)
    start = StartUp(100.0, lambda: next(times))
    for part, _ in zip(("submit", "containers", "shards", "first_step"), ends, strict=False):
        start.reached(part)
    return start


def test_a_run_that_has_not_come_to_a_part_has_no_time_for_it() -> None:
    assert StartUp().seconds() == {}
    assert started(104.0, 110.0).seconds() == {"submit": 4.0, "containers": 6.0}


@pytest.mark.parametrize(
    ("spans", "environment", "submit", "containers"),
    [
        ([(105.0, 108.0)], 3.0, 4.0, 3.0),  # two executors' hosts, of which one was a little later
        ([(105.0, 108.0), (106.0, 109.0)], 4.0, 4.0, 2.0),
        ([(101.0, 103.0), (105.0, 108.0)], 5.0, 2.0, 3.0),  # the driver's own container first
        ([(20.0, 30.0)], None, 4.0, 6.0),  # it was there from a run before
    ],
)
def test_unpacking_an_environment_is_taken_out_of_the_parts_it_was_in(
    spans: list[tuple[float, float]], environment: float | None, submit: float, containers: float
) -> None:
    start = started(104.0, 110.0, 115.0, 116.0)
    start.unpacked(spans)
    found = start.seconds()
    assert (found["submit"], found["containers"], found.get("environment")) == (
        submit,
        containers,
        environment,
    )
    assert sum(found.values()) == 16.0


def test_only_the_first_time_counts() -> None:
    times = iter([101.0, 105.0])
    start = StartUp(100.0, lambda: next(times))
    start.reached("first_step")
    start.reached("first_step")
    assert start.seconds() == {"first_step": 1.0}


@pytest.mark.parametrize(("limit_s", "is_told"), [(19.0, True), (21.0, False)])
def test_a_start_that_took_more_than_half_of_the_time_is_told(
    limit_s: float, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sparksgd"):
        warn_of_start(started(104.0, 108.0, 110.0, 118.0), limit_s, 3)
    told = (
        "train.max_wall_s is 19, and counts from the submission: the start took 10.0 s (submit 4.0, "
        "containers 4.0, shards 2.0), so 3 steps were made. Raise train.max_wall_s"
    )
    assert caplog.messages == ([told] if is_told else [])


@pytest.mark.parametrize(("epochs", "is_told"), [(1, False), (2, True)])
def test_a_run_that_is_over_by_itself_needs_no_more_time(
    epochs: int, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": [[0.0, 1.0]] * 8, "y": [0, 1] * 4}), file)
    config = {
        "data": {"features": "x", "label": "y"},
        "engine": {"name": "inline"},
        "train": {"num_shards": 1, "rows_per_step": 8, "epochs": epochs, "max_wall_s": 0},
    }
    training = sparksgd.train(config, str(file), module=nn.Linear(2, 2))
    assert (training.version, training.is_out_of_time) == (1, is_told)
    assert ("Raise train.max_wall_s" in caplog.text) is is_told
