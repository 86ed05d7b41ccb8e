"""Edges of virtual time: few workers, lost workers, schedules that end, old messages, refused clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from virtual_trainings import CONSTANT, trained, written

from sparksgd.errors import ClusterError, ConfigError

P = 21


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("edges"))


def ends(reports: list[Any]) -> list[float]:
    return [report.virtual_s for report in reports]


@pytest.mark.parametrize(
    ("solver", "workers", "per_turn_s"),
    [
        ({"name": "decentralised"}, 1, 4.0),
        ({"name": "decentralised"}, 2, 2.0),
        ({"name": "gradient_push"}, 2, 2.0),
        ({"name": "gradient_push", "overlap": True}, 2, 2.0),
    ],
)
def test_a_worker_computes_one_shard_at_a_time(
    rows: str, solver: dict[str, Any], workers: int, per_turn_s: float
) -> None:
    _, reports = trained(
        rows, solver, CONSTANT, engine={"name": "simulated", "num_workers": workers}, steps=4
    )
    assert ends(reports) == pytest.approx([per_turn_s * turn for turn in (1, 2, 3, 4)])


def test_a_worker_s_link_carries_one_message_after_the_other_and_none_to_itself(rows: str) -> None:
    cluster = CONSTANT | {"turn_s": 1e-9, "link_bytes_per_s": 4.0 * P}
    engine = {"name": "simulated", "num_workers": 2}
    _, reports = trained(rows, {"name": "decentralised"}, cluster, engine=engine, steps=1)
    # On the ring 0 1 | 2 3 each worker sends two messages to the other; two stay inside.
    assert ends(reports) == pytest.approx([2.0])
    assert reports[0].virtual.sent_bytes == 4 * 4 * P


@pytest.mark.parametrize(
    "solver",
    [
        {"name": "elastic_averaging", "turns_per_exchange": 5},
        {"name": "elastic_averaging", "turns_per_exchange": 5, "order": "together"},
        {"name": "delayed_nesterov", "turns_per_push": 5},
        {"name": "async_sgd", "push_every": 5, "pull_every": 5},
        {"name": "softsync", "gradients_per_step": 7},
    ],
    ids=str,
)
def test_a_last_step_beyond_the_end_moves_no_schedule_beyond_its_own(rows: str, solver: Any) -> None:
    schedule = {"name": "OneCycleLR", "max_lr": 0.02, "total_steps": 8}
    for shards in (1, 4):
        training, _ = trained(rows, solver, CONSTANT, schedule=schedule, num_shards=shards)
        assert training.is_finished
        assert training.turns >= 8


def test_a_shard_trains_with_the_rate_of_now(rows: str) -> None:
    schedule = {"name": "StepLR", "step_size": 2, "gamma": 0.5}
    solver = {"name": "elastic_averaging", "turns_per_exchange": 2, "beta": 0.0}
    _, reports = trained(rows, solver, CONSTANT, schedule=schedule, num_shards=1)
    assert [report.lr for report in reports] == [0.02, 0.01, 0.005, 0.0025]
    assert [report.staleness for report in reports] == [(0,)] * 4


@pytest.mark.parametrize(
    ("turn_s", "overlap", "per_turn_s"), [(1.0, False, 5.0), (1.0, True, 4.0), (6.0, True, 6.0)]
)
def test_an_exchange_that_runs_beside_the_next_turn_costs_what_is_longer(
    rows: str, turn_s: float, overlap: bool, per_turn_s: float
) -> None:
    cluster = CONSTANT | {"turn_s": turn_s, "link_bytes_per_s": 4.0 * P / 2, "server_bytes_per_s": 1e18}
    solver = {"name": "elastic_averaging", "turns_per_exchange": 1, "overlap": overlap}
    _, reports = trained(rows, solver, cluster, num_shards=1, steps=6)  # two seconds up, two down
    made = ends(reports)
    assert np.diff(made)[1:] == pytest.approx(per_turn_s)


def test_downpour_counts_staleness_from_the_weights_that_a_shard_has(rows: str) -> None:
    solver = {"name": "async_sgd", "push_every": 1, "pull_every": 4}
    _, reports = trained(rows, solver, CONSTANT, num_shards=1)
    assert [report.staleness for report in reports] == [(0,), (1,), (2,), (3,)] * 2
    run, reports = trained(rows, solver | {"max_staleness": 2}, CONSTANT, num_shards=1)
    assert run.participation.ignored > 0
    assert max(report.staleness[0] for report in reports) == 2


def test_ignored_messages_and_lost_workers_are_told(rows: str, tmp_path: Path) -> None:
    cluster = CONSTANT | {"worker_life_s": 6.0, "worker_back_s": 2.0, "spread": 0.5}
    run, _ = trained(rows, {"name": "async_sgd", "max_staleness": 2}, cluster, out=tmp_path / "run", epochs=4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ignored_messages"] == run.participation.ignored > 0
    assert summary["lost_workers"] == run.participation.lost_workers > 0
    assert summary["sent_bytes"] == run.sent_bytes > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("ignored", 0) for line in lines) == summary["ignored_messages"]
    assert sum(line["sent_bytes"] for line in lines) == summary["sent_bytes"]


@pytest.mark.parametrize(
    "solver", [{"name": "async_sgd"}, {}, {"name": "delayed_nesterov", "turns_per_push": 16}], ids=str
)
def test_workers_that_are_lost_before_they_do_anything_end_the_run(rows: str, solver: Any) -> None:
    cluster = CONSTANT | {"worker_life_s": 0.001, "worker_back_s": 0.0}
    with pytest.raises(ClusterError, match=r"without a step: cluster.worker_life_s is 0.001"):
        trained(rows, solver, cluster, engine={"name": "simulated", "num_workers": 1})


def test_rounds_without_gradients_may_end_with_an_empty_piece(tmp_path: Path) -> None:
    rows = written(tmp_path, 7)
    solver = {"name": "local_sgd", "turns_per_round": 2}
    for gradients in (True, False):
        training, _ = trained(
            rows, solver, CONSTANT | {"gradients": gradients}, num_shards=3, rows_per_step=3, epochs=1
        )
        assert training.is_finished


@pytest.mark.parametrize(
    ("solver", "cluster", "words"),
    [
        ({"name": "decentralised"}, {"worker_life_s": 3.0}, "no rule says how they begin anew"),
        ({"name": "local_sgd", "inner_state": "keep"}, {"worker_life_s": 3.0}, "takes the models"),
        ({"backup_workers": 1}, {"rounds": "allreduce"}, 'use cluster.rounds = "tree"'),
        ({}, {"slow_workers": 9}, "cluster.slow_workers is 9, but there are 4 workers"),
        ({}, {"spread": 1000.0}, "cluster.spread is 1000.0, but must be between 0 and 10"),
        ({"name": "softsync", "staleness": "average", "gradients_per_step": 9}, {}, "is above 1"),
        ({"name": "elastic_averaging", "rho": 99.0}, {}, "set rho to 50 or less"),
    ],
)
def test_what_no_cluster_does_is_refused(rows: str, solver: Any, cluster: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trained(rows, solver, CONSTANT | cluster)
    assert words in str(refused.value)


def test_two_steps_of_one_moment_of_which_the_second_fails_are_told_both(rows: str) -> None:
    solver = {"name": "elastic_averaging", "turns_per_exchange": 1, "order": "shard"}
    cluster = CONSTANT | {"slow_workers": 1, "slow_factor": 3.0}
    _, reports = trained(rows, solver, cluster)
    assert [report.version for report in reports] == list(range(len(reports)))
    assert [report.took_part[0] for report in reports[:4]] == [0, 1, 2, 3]
    assert [report.virtual_s for report in reports[:4]] == [3.0] * 4
