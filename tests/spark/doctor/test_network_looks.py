"""Which connections a run needs, and which the doctor looks at: of each engine its own.  Needs no JVM."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from sparksgd.config import EngineConfig
from sparksgd.engines.kinds import ALLREDUCE, SERVER, STAGES, TREE, EngineKind
from sparksgd.errors import ClusterError, PeerLost
from sparksgd.spark.doctor import examination
from sparksgd.spark.doctor.examination import Examination
from sparksgd.spark.doctor.network import Network
from sparksgd.spark.engines.allreduce import AllReduceEngine
from sparksgd.spark.engines.server import ServerEngine
from sparksgd.spark.tasks.link_tasks import Measured

LOST = PeerLost("cannot reach worker 1 at 10.0.0.1:4: no")


def network(failure: PeerLost | None = None) -> Network:
    measured = [Measured(worker=worker, host=f"node{worker}") for worker in (0, 1)]
    measured.append(Measured(worker=2, host="node2", failure=failure))
    return Network(executors=2, with_driver=True, encrypted=False, measured=measured)


class Refuses:
    """An engine whose own check refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
        self.asked = 0
        monkeypatch.setattr(engine, "check", self)

    def __call__(self, *_: Any) -> None:
        self.asked += 1
        raise ClusterError("no port is free: set engine.ports")


@pytest.fixture
def looked(monkeypatch):
    """Return a function that looks at the links of engines, where executors are blocked from each other."""

    def look(*kinds: EngineKind, workers: int = 2, star: Network | None = None):
        monkeypatch.setattr(examination, "no_locality_wait", lambda _: nullcontext())
        monkeypatch.setattr(examination, "measured_network", lambda *_: network(LOST))
        monkeypatch.setattr(examination, "measured_with_driver", lambda *_: star or network())
        own = SimpleNamespace(
            _workers=workers, _refused_by=[], _config=SimpleNamespace(engine=EngineConfig()), _kinds=kinds,
            _within_s=60.0, _cluster=None, _context=SimpleNamespace(_jsc=SimpleNamespace(sc=str)),
            _model=None, _network=None, _reaches_driver=False,
        )  # fmt: skip
        found = list(Examination._links(own))
        engines = (ALLREDUCE, SERVER)
        return found, {kind.name for kind in engines if Examination._connects(own, kind)}

    return look


@pytest.fixture
def all_ports(monkeypatch):
    """Let the driver have every port."""
    for engine in (AllReduceEngine, ServerEngine):
        monkeypatch.setattr(engine, "check", lambda *_: None)


@pytest.mark.usefixtures("all_ports")
def test_executors_blocked_from_each_other_do_for_the_server_and_not_for_all_reduce(looked):
    found, connecting = looked(SERVER)
    assert [one.status for one in found if one.name == "between executors"] == ["skip"]
    assert "fail" not in {one.status for one in found}
    assert connecting == {"server"}
    (finding,), connecting = looked(ALLREDUCE)
    assert (finding.status, connecting) == ("fail", {"server"})
    (finding,), _ = looked(ALLREDUCE, TREE, STAGES)
    assert finding.status == "warn"
    found, connecting = looked(SERVER, star=network(LOST))
    assert [one.status for one in found] == ["skip", "fail"]
    assert connecting == set()


@pytest.mark.parametrize("workers", [1, 2])
def test_each_engine_is_asked_by_its_own_check(looked, monkeypatch, workers):
    monkeypatch.setattr(AllReduceEngine, "check", lambda *_: None)
    refuses = Refuses(monkeypatch, ServerEngine)
    (finding,), _ = looked(SERVER, workers=workers)
    assert (finding.status, finding.seen, refuses.asked) == ("fail", "no port is free", 1)
    looked(ALLREDUCE)
    assert refuses.asked == 1


def test_a_port_that_another_engine_does_without_is_a_warning(looked, monkeypatch):
    Refuses(monkeypatch, AllReduceEngine)
    (finding,), _ = looked(ALLREDUCE, TREE)
    assert finding.status == "warn"
