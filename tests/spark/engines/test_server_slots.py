"""What the server engine does so that its jobs never wait for each other for ever; without Spark."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from told_jobs import Job, jobs_of

from sparksgd.arithmetic.numerics import Numerics
from sparksgd.config import EngineConfig
from sparksgd.errors import ConfigError
from sparksgd.peers.frames import Frame
from sparksgd.peers.server_desk import Came, Joined
from sparksgd.peers.server_frames import HERE, Here, here_frame
from sparksgd.spark.engines import server
from sparksgd.spark.engines.base import SparkEngine
from sparksgd.spark.engines.server import ServerEngine


@pytest.mark.parametrize(
    ("asked", "running", "leave"),
    [(4, (3, 0), True), (3, (3, 0), False), (3, (2, 1), True), (0, (0, 3), False)],
)
def test_workers_leave_for_an_evaluation_if_all_slots_are_taken_or_will_be(
    monkeypatch: pytest.MonkeyPatch, asked: int, running: tuple[int, int], leave: bool
) -> None:
    left: list[bool] = []
    engine = object.__new__(ServerEngine)
    engine._test = SimpleNamespace(table=[])  # type: ignore[assignment]
    engine._desk = engine._orders = engine._step_timeout_s = None  # type: ignore[assignment]
    engine._here, engine._held = {}, deque()
    engine._jobs = jobs_of([])
    engine._jobs.ask(range(asked))
    watch = SimpleNamespace(over=lambda *_: nullcontext())
    engine._cluster = SimpleNamespace(  # type: ignore[assignment]
        slots=lambda: 4, running_tasks=lambda: running, job_watch=watch
    )
    monkeypatch.setattr(server, "evaluated_by_workers", lambda *_, **__: None)
    monkeypatch.setattr(SparkEngine, "evaluate", lambda *_: "by Spark")
    monkeypatch.setattr(ServerEngine, "_release", lambda _: left.append(True))
    assert engine.evaluate(SimpleNamespace(readout=lambda: None)) == "by Spark"  # type: ignore[arg-type]
    assert bool(left) == leave


def test_who_came_back_during_the_evaluation_before_is_here() -> None:
    numerics = Numerics.here(1)
    engine = object.__new__(ServerEngine)
    engine._here = {0: Here(seat=1, host="a", numerics=numerics)}
    engine._held = deque(
        [
            Joined(worker=1, seat=5),
            Came(worker=1, seat=5, frame=here_frame("b", numerics)),
            Came(worker=2, seat=6, frame=Frame(kind=HERE)),  # it will be cut off for this
        ]
    )
    assert engine._known() == engine._here | {1: Here(seat=5, host="b", numerics=numerics)}


def test_workers_that_made_room_are_asked_again_and_nothing_is_counted() -> None:
    submitted: list[Job] = []
    jobs = jobs_of(submitted)
    jobs.ask([0, 1])
    jobs.make_room()
    assert all(job.is_cancelled for job in submitted)
    jobs.look()
    assert [job.worker for job in submitted] == [0, 1, 0, 1]
    assert jobs._recovery.retries == 0
    jobs.close()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"spark.speculation": "true", "spark.speculation.task.duration.threshold": "30s"}, True),
        ({"spark.speculation": "true"}, False),  # it looks at tasks beside others of their stage alone
        ({"spark.speculation.task.duration.threshold": "30s"}, False),
        ({}, False),
    ],
)
def test_tasks_that_spark_would_start_twice_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], refused: bool
) -> None:
    started: list[int] = []
    desk = SimpleNamespace(start=lambda most_bytes: started.append(most_bytes), close=lambda: None)
    monkeypatch.setattr(server, "_desk_of", lambda *_: desk)
    cluster: Any = SimpleNamespace(context=SimpleNamespace(getConf=lambda: settings))
    if refused:
        with pytest.raises(ConfigError, match=r"is 30s.*Start with --conf spark\.speculation=false"):
            ServerEngine.check(cluster, EngineConfig())
    else:
        ServerEngine.check(cluster, EngineConfig())
    assert len(started) == (not refused)


def test_to_ask_a_worker_one_place_is_looked_up() -> None:
    looked: list[int] = []
    placed: list[Any] = []
    engine = object.__new__(ServerEngine)
    engine._workers, engine._shipped = [2, 0, 1], None  # type: ignore[assignment]
    engine._shards = SimpleNamespace(  # type: ignore[assignment]
        partition_of={4: 0, 5: 1, 6: 2, 7: 1}, table=[SimpleNamespace(shard=shard) for shard in (4, 5, 6, 7)],
        place_of=lambda partition: looked.append(partition) or f"place {partition}",
    )  # fmt: skip
    engine._desk = SimpleNamespace(address="here", expect=lambda *_: None)  # type: ignore[assignment]
    job = SimpleNamespace(collectAsync=lambda: "a job")
    rdd = SimpleNamespace(mapPartitions=lambda _: SimpleNamespace(_jrdd=job))
    engine._cluster = SimpleNamespace(  # type: ignore[assignment]
        at_place=lambda task, place: placed.append((task, place)), placed_rdd=lambda _: rdd
    )
    assert engine._submit(0, 3) == "a job"
    ((task, place),) = placed
    assert (looked, place) == ([1], "place 1")
    assert ([one.shard for one in task.shards], task.worker, task.request) == ([5, 7], 0, 3)
