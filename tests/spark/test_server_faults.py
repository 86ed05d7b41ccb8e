"""What strikes a run on the server engine: executors that die, workers that stop, strangers, TLS."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from served_runs import Flags, events, flagged, rule, served
from spark_helpers import LOCAL_CLUSTER, AtStep, python_workers
from stragglers import HeldUntil  # tests/modules

from sparksgd.engines.protocol import StepReport
from sparksgd.training.state import Observer, Probe, Training

pytestmark = pytest.mark.session("local[5]")

TWO = ("engine.num_workers=2",)


def until_back(folder: Path, processes: int, turn: int) -> Probe:
    seen = folder / "processes"
    seen.mkdir()
    return Probe(before_gradients=HeldUntil(folder=str(seen), processes=processes, turn=turn))


@pytest.mark.soak
@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.parametrize("name", ["async_sgd", "elastic_averaging"])
def test_an_executor_dies_and_its_shards_begin_anew_behind_the_others(
    spark: Any, small: str, flags: Path, tmp_path: Path, name: str
) -> None:
    settings = (*TWO, *rule(name), *flagged(flags), "train.epochs=8")
    strikes = Flags(flags, {5: "kill-executor"})
    probe = until_back(tmp_path, 3, 100)
    run, _ = served(spark, small, tmp_path / "run", *settings, observers=(strikes,), probe=probe)
    assert run.participation.lost_workers >= 1
    assert {event["shard"] for event in events(tmp_path / "run") if event["kind"] == "lost"} != set()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("flag", "kills", "more"),
    [
        pytest.param("kill-executor", 10, TWO, marks=pytest.mark.session(LOCAL_CLUSTER)),
        ("kill-worker", 40, ()),
    ],
)
def test_fifty_kills(
    spark: Any, small: str, flags: Path, tmp_path: Path, flag: str, kills: int, more: tuple[str, ...]
) -> None:
    settings = (*more, *rule("async_sgd"), *flagged(flags), "train.epochs=40", "engine.max_attempts=20")
    strikes = Flags(flags, {20 * (number + 1): flag for number in range(kills)})
    run, reports = served(spark, small, tmp_path / "run", *settings, observers=(strikes,))
    assert run.participation.lost_workers >= kills
    assert len(reports) > 1000


class Stopped(Observer):
    """Stops one Python worker between two steps, and lets it go on."""

    def __init__(self, stops: int, goes_on: int) -> None:
        self.stops, self.goes_on = stops, goes_on
        self.reports: list[StepReport] = []

    def stepped(self, training: Training, report: StepReport) -> None:
        self.reports.append(report)
        if report.step == self.stops:
            busy = sorted(python_workers())[-2:]  # the last ones that were forked
            self.pid = busy[0]
            os.kill(self.pid, signal.SIGSTOP)
        elif report.step == self.goes_on:
            os.kill(self.pid, signal.SIGCONT)


@pytest.mark.soak
def test_a_worker_that_stops_holds_up_nobody_and_goes_on(spark: Any, small: str, tmp_path: Path) -> None:
    stopped = Stopped(50, 400)
    run, reports = served(
        spark, small, tmp_path / "run", *rule("async_sgd"), "train.epochs=20", observers=(stopped,)
    )
    assert run.recovery.retries == 0
    assert len(reports) > 400
    assert (
        max(run.participation.staleness) > 50
        or len({shard for report in reports[60:390] for shard in report.took_part}) == 4
    )  # a process that was idle had been stopped


class Knocks(Observer):
    """Strangers at the port of the server, after some steps."""

    def __init__(self, port: int, steps: set[int]) -> None:
        self.port, self.steps = port, steps

    def stepped(self, training: Training, report: StepReport) -> None:
        if report.step in self.steps:
            for said in (b"", b"garbage" * 100, bytes(160)):
                with socket.create_connection(("127.0.0.1", self.port)) as knocking:
                    knocking.sendall(said)


@pytest.mark.parametrize("encrypt", ["false", pytest.param("true", marks=pytest.mark.soak)])
def test_strangers_at_the_port_are_counted_and_change_nothing(
    spark: Any, small: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, encrypt: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = (*rule("async_sgd"), f"engine.ports={port}-{port}", f"engine.encrypt={encrypt}")
    knocks = Knocks(port, {10, 20, 30})
    run, _ = served(spark, small, tmp_path / "run", *settings, observers=(knocks,))
    assert run.recovery.strangers >= 1  # those that had been dropped when the run ended
    assert run.recovery.retries == 0
    assert re.search(r"connections of strangers were dropped: \d+ to the driver \(", caplog.text)


@pytest.mark.soak
def test_executors_may_come_and_go(session_for: Any, small: str, tmp_path: Path) -> None:
    dynamic = {
        "spark__dynamicAllocation__enabled": "true",
        "spark__dynamicAllocation__shuffleTracking__enabled": "true",
        "spark__dynamicAllocation__minExecutors": "1",
        "spark__dynamicAllocation__maxExecutors": "2",
        "spark__dynamicAllocation__executorIdleTimeout": "2s",
        "spark__dynamicAllocation__cachedExecutorIdleTimeout": "2s",
    }
    spark = session_for(LOCAL_CLUSTER, **dynamic)
    run, _ = served(spark, small, tmp_path / "run", *TWO, *rule("async_sgd"), "train.epochs=6")
    assert run.is_finished


@pytest.mark.soak
def test_the_driver_s_memory_is_flat(spark: Any, small: str, tmp_path: Path) -> None:
    def resident(_: Training) -> None:
        status = Path("/proc/self/status").read_text()
        seen.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))  # type: ignore[index]  # Linux has it

    seen: list[int] = []
    settings = (*rule("async_sgd"), "train.epochs=320")  # of some 64 messages
    looks = tuple(AtStep(step, resident) for step in (2_000, 20_000))
    served(spark, small, tmp_path / "run", *settings, observers=looks)
    early, late = seen
    assert late < 1.1 * early
