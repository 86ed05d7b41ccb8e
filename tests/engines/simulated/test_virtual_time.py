"""Virtual time: what things cost, in numbers that a person works out; and staleness, from the counts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from virtual_trainings import ARRIVALS, CONSTANT, net, trained, written

from sparksgd.config import ClusterConfig, Config
from sparksgd.data.sampling import Sampling
from sparksgd.engines.simulated.costs import Costs, Link, sums_at_driver
from sparksgd.engines.simulated.rounds import VirtualRounds
from sparksgd.errors import ConfigError, DataError
from sparksgd.solvers.protocol import Quorum

P = 21
"""Parameters of the net, of 4 bytes each."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("virtual"))


def ends(reports: list[Any]) -> list[float]:
    return [report.virtual_s for report in reports]


def test_a_round_of_the_tree_costs_a_job_the_weights_computing_and_the_sums(rows: str) -> None:
    cluster = {
        "turn_times": "constant", "turn_s": 1.0, "latency_s": 0.25, "link_bytes_per_s": 8.0 * P,
        "server_bytes_per_s": 16.0 * P, "job_s": 2.0,
    }  # fmt: skip
    training, reports = trained(rows, {}, cluster, engine={"name": "simulated", "num_workers": 2}, steps=3)
    # Job, latency, weights; two turns; latency; and two sums: at the server each takes half as long as on a
    # worker's link, one after the other.
    step_s = 2 + 0.25 + 0.5 + 2 + 0.25 + 2 * 0.25
    assert ends(reports) == pytest.approx([step_s, 2 * step_s, 3 * step_s])
    assert training.virtual_s == reports[-1].virtual_s
    assert [report.timing.total for report in reports] == pytest.approx([step_s] * 3)


def test_a_round_of_all_reduce_costs_computing_and_the_sum(rows: str) -> None:
    cluster = CONSTANT | {"rounds": "allreduce", "latency_s": 0.25, "link_bytes_per_s": 4.0 * P}
    _, reports = trained(rows, {}, cluster, steps=2)
    step_s = 1 + 2 * 0.25 + 2 * 3 / 4 * 1
    assert ends(reports) == pytest.approx([step_s, 2 * step_s])


def test_local_turns_are_computed_one_after_the_other(rows: str) -> None:
    _, reports = trained(rows, {"name": "local_sgd", "turns_per_round": 4}, CONSTANT)
    assert ends(reports) == pytest.approx([4, 8])


def test_an_exchange_costs_both_ways_and_the_server_takes_one_at_a_time(rows: str) -> None:
    cluster = CONSTANT | {"latency_s": 0.25, "link_bytes_per_s": 8.0 * P, "server_bytes_per_s": 4.0 * P}
    cluster |= {"server_s": 0.5}
    _, reports = trained(rows, {"name": "async_sgd"}, cluster, steps=1)
    # The n-th shard has its weights at n + 1/4, computes for 1, and sends: 1/4 later its message begins to
    # reach the server, for 1, and then 1/2 passes there.  Messages come one second apart.
    first = 1 + 0.25 + 1 + 0.25 + 1 + 0.5
    assert ends(reports) == pytest.approx([first + n for n in range(4)])
    vectors = 4 + 4 + 4 + 1  # down, up and down of each shard; and one has sent its second message
    assert sum(report.virtual.sent_bytes for report in reports) == vectors * 4 * P


def test_a_slow_worker_s_messages_are_stale_and_few(rows: str) -> None:
    cluster = CONSTANT | {"slow_workers": 1, "slow_factor": 3.5}
    _, reports = trained(rows, {"name": "async_sgd"}, cluster, steps=8)
    of_slow = [report for report in reports if report.took_part == (0,)]
    assert 0 < len(of_slow) < len(reports) / 4
    assert min(report.staleness[0] for report in of_slow) >= 9


def test_backup_workers_do_without_the_slow_one(rows: str) -> None:
    cluster = CONSTANT | {"slow_workers": 1, "slow_factor": 10.0}
    waits, with_it = trained(rows, {}, cluster, steps=4)
    goes_on, without = trained(rows, {"backup_workers": 1}, cluster, steps=4)
    assert ends(with_it) == pytest.approx([10, 20, 30, 40])
    assert ends(without) == pytest.approx([1, 2, 3, 4])
    assert all(report.took_part == (1, 2, 3) for report in without)
    assert without[0].late == (0,)
    assert waits.flat.parameters_sha256() != goes_on.flat.parameters_sha256()


@pytest.mark.parametrize("solver", [{}, {"name": "local_sgd", "turns_per_round": 3, "inner_state": "keep"}])
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_rounds_have_the_bits_of_the_reference(rows: str, solver: dict[str, Any], workers: int) -> None:
    reference, _ = trained(rows, solver, engine={"name": "inline"}, test=rows)
    simulated, _ = trained(rows, solver, engine={"name": "simulated", "num_workers": workers}, test=rows)
    assert simulated.flat.parameters_sha256() == reference.flat.parameters_sha256()
    assert simulated.evaluations[-1].loss == reference.evaluations[-1].loss
    assert len(simulated.numerics) == 1 + workers


@pytest.mark.parametrize("rule", [*ARRIVALS, "synchronous"])
def test_equal_keys_give_equal_bits_and_times_and_another_seed_others(rows: str, rule: str) -> None:
    solver = {"name": rule} | ARRIVALS.get(rule, {})
    noisy = {"spread": 0.5, "tail_share": 0.1, "seed": 1}
    one, first = trained(rows, solver, noisy)
    same, second = trained(rows, solver, noisy)
    other, third = trained(rows, solver, noisy | {"seed": 2})
    assert one.flat.parameters_sha256() == same.flat.parameters_sha256()
    assert ends(first) == ends(second)
    assert ends(first) != ends(third)
    if rule != "synchronous":
        assert one.flat.parameters_sha256() != other.flat.parameters_sha256()


@pytest.mark.parametrize("rule", [*ARRIVALS, "synchronous", "local_sgd"])
def test_without_gradients_times_and_staleness_are_the_same(rows: str, rule: str) -> None:
    solver = {"name": rule} | ARRIVALS.get(rule, {})
    _, real = trained(rows, solver, {"spread": 0.4})
    nothing_learnt, bare = trained(rows, solver, {"spread": 0.4, "gradients": False})
    assert ends(real) == ends(bare)
    assert [(r.took_part, r.staleness, r.rows) for r in real] == [
        (r.took_part, r.staleness, r.rows) for r in bare
    ]
    start = np.concatenate([p.detach().numpy().ravel() for p in net().parameters()])
    assert nothing_learnt.flat.parameters.numpy().tobytes() == start.tobytes()


@pytest.mark.parametrize("c", [1, 2, 4])
def test_the_sum_of_all_staleness_follows_from_the_counts(rows: str, c: int) -> None:
    solver = {"name": "softsync", "gradients_per_step": c}
    training, reports = trained(rows, solver, {"spread": 0.6, "tail_share": 0.1}, epochs=4)
    shards, steps = 4, training.version
    staleness = [one for report in reports for one in report.staleness]
    # A step makes every message older by one that is on its way: of all shards but the one that completed it.
    read = dict.fromkeys(range(shards), 0)
    for report in reports:
        for event in report.trace:
            if event.kind == "pull":
                read[event.shard] = event.version
    on_their_way = sum(steps - version for version in read.values())
    assert sum(staleness) + on_their_way == steps * (shards - 1)
    assert len(staleness) == c * steps
    assert sum(training.participation.staleness.values()) == len(staleness)


def test_workers_that_are_lost_come_again_and_their_shards_begin_anew(rows: str) -> None:
    cluster = CONSTANT | {"worker_life_s": 6.0, "worker_back_s": 2.0}
    for rule, keys in ARRIVALS.items():
        training, reports = trained(rows, {"name": rule} | keys, cluster, epochs=6)
        events = [event for report in reports for event in report.trace]
        assert sum(event.kind == "lost" for event in events) > 0, rule
        assert training.is_finished
        after = {shard: [e.kind for e in events if e.shard == shard] for shard in range(4)}
        for kinds in after.values():
            for one, following in pairwise(kinds):
                assert one != "lost" or following == "pull"


def test_a_round_waits_for_a_worker_that_is_lost(rows: str) -> None:
    cluster = CONSTANT | {"worker_life_s": 3.0, "worker_back_s": 2.0}
    undisturbed, calm = trained(rows, {}, CONSTANT)
    disturbed, reports = trained(rows, {}, cluster)
    assert reports[-1].virtual_s > calm[-1].virtual_s
    assert disturbed.flat.parameters_sha256() == undisturbed.flat.parameters_sha256()


def test_an_epoch_is_as_many_rows_as_there_are_whoever_took_them(rows: str) -> None:
    cluster = CONSTANT | {"slow_workers": 1, "slow_factor": 5.0}
    training, reports = trained(rows, {"name": "async_sgd"}, cluster, test=rows)
    assert sum(report.rows for report in reports) == 2 * 64
    assert [evaluation.turn for evaluation in training.evaluations] == [4, 8]
    assert [evaluation.epoch for evaluation in training.evaluations] == [1, 2]
    assert {report.epoch for report in reports} == {1, 2}


def test_a_thousand_shards_make_turns(tmp_path: Path) -> None:
    rows = written(tmp_path, 2000)
    cluster = CONSTANT | {"gradients": False}
    training, reports = trained(
        rows, {"name": "async_sgd"}, cluster, num_shards=1000, rows_per_step=1000, epochs=1
    )
    assert training.turns == 2
    with_rows = {shard for shard, of in enumerate(training.plan.sampling.shard_rows) if of}
    assert {shard for report in reports for shard in report.took_part} == with_rows
    assert len(with_rows) > 800


# Costs


def test_a_link_carries_one_message_after_the_other() -> None:
    link = Link()
    assert [link.carry(0.0, 1.0), link.carry(0.5, 1.0), link.carry(5.0, 1.0)] == [1.0, 2.0, 6.0]


@pytest.mark.parametrize(
    ("keys", "median_s", "mean_s"),
    [
        ({"turn_times": "constant"}, 0.02, 0.02),
        ({"turn_times": "lognormal", "spread": 0.5}, 0.02, 0.02 * float(np.exp(0.125))),
        ({"turn_times": "exponential"}, 0.02 * float(np.log(2)), 0.02),
        ({"turn_times": "constant", "tail_share": 0.25, "tail_s": 0.1, "tail_shape": 3.0}, 0.02, 0.0575),
    ],
)
def test_times_of_turns_have_the_distribution_that_is_said(
    keys: dict[str, Any], median_s: float, mean_s: float
) -> None:
    costs = Costs(ClusterConfig(**keys), 4)
    seconds = [costs.turn_s(0, shard, turn, 3) for shard in range(40) for turn in range(250)]
    assert np.median(seconds) == pytest.approx(median_s, rel=0.04)
    assert np.mean(seconds) == pytest.approx(mean_s, rel=0.06)
    assert seconds[:9] == [costs.turn_s(1, 0, turn, 3) for turn in range(9)]  # whoever computes it


def written_run(folder: Path, steps: list[dict[str, Any]]) -> str:
    """Write the metrics of a run; of one turn in each step, if they do not say it."""
    steps = [{"step": n, "turn": n} | one if isinstance(one, dict) else one for n, one in enumerate(steps, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return str(folder)


def step_of(seconds: dict[int, float], **more: Any) -> dict[str, Any]:
    workers = [{"worker": worker, "compute": compute} for worker, compute in seconds.items()]
    return {"kind": "step", "took_part": [0], "timing": {"workers": workers}} | more


def test_turns_take_as_long_as_those_of_the_same_worker_in_a_run(tmp_path: Path) -> None:
    steps = [step_of({n % 2: 1.0 + n % 2 + n / 1000}, staleness=[0]) for n in range(100)]
    costs = Costs(ClusterConfig(recorded=written_run(tmp_path, steps)), 4)
    drawn = {worker: {costs.turn_s(worker, 0, turn, 3) for turn in range(400)} for worker in range(3)}
    assert drawn[0] == {1.0 + n / 1000 for n in range(0, 100, 2)}
    assert drawn[1] == {2.0 + n / 1000 for n in range(1, 100, 2)}
    assert drawn[2] == drawn[0]


def test_workers_of_rounds_computed_several_turns_in_a_step(tmp_path: Path) -> None:
    steps = [step_of({0: 4.0, 1: 2.0}, took_part=[0, 1, 2, 3])] * 20
    costs = Costs(ClusterConfig(recorded=written_run(tmp_path, steps)), 4)
    assert (costs.turn_s(0, 0, 0, 3), costs.turn_s(1, 0, 0, 3)) == (2.0, 1.0)


def test_rounds_of_local_turns_are_divided_by_these(tmp_path: Path) -> None:
    turns = [*range(5, 101, 5), 103]  # the last one is cut short
    steps = [step_of({0: 10.0}, took_part=[0, 1], turn=turn) for turn in turns[:-1]]
    steps.append(step_of({0: 6.0}, took_part=[0, 1], turn=turns[-1]))
    costs = Costs(ClusterConfig(recorded=written_run(tmp_path, steps)), 4)
    assert {costs.turn_s(0, 0, turn, 3) for turn in range(200)} == {1.0}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "tells of 0 turns of a worker"),
        ([step_of({0: 1.0})] * 30 + [step_of({1: 1.0})] * 19, "tells of 19 turns of a worker"),
        ([step_of({0: float("nan")})] * 30, "nan is no time"),
        ([step_of({0: -1.0})] * 30, "-1.0 is no time"),
        ([step_of({0: 1.0}, step=3)] * 20, "tells of 19 turns of a worker"),
        ([step_of({0: 1.0}, turn=3)] * 20, "tells of 1 turns of a worker"),
        ([{"kind": "step"}], "holds no steps of a run: KeyError"),
        ([7], "holds no steps of a run: ValueError: metrics.jsonl has lines that are no objects"),
    ],
)
def test_what_is_no_run_is_refused(rows: str, tmp_path: Path, steps: list[Any], words: str) -> None:
    with pytest.raises(DataError) as refused:
        trained(rows, {"name": "async_sgd"}, {"recorded": written_run(tmp_path, steps)})
    assert words in str(refused.value)


def test_recorded_times_beside_other_times_are_refused(rows: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster.turn_s is set, but so is cluster.recorded"):
        trained(rows, {"name": "async_sgd"}, {"recorded": "runs/a", "turn_s": 1.0})
    with pytest.raises(DataError, match=r"cluster.recorded is 'runs/a', but .* FileNotFoundError"):
        trained(rows, {"name": "async_sgd"}, {"recorded": "runs/a"})


def test_a_turn_takes_longer_with_its_rows() -> None:
    costs = Costs(ClusterConfig(turn_times="constant", turn_s=1.0, row_s=0.25), 4)
    assert [costs.turn_s(0, 0, 0, rows) for rows in (0, 1, 8)] == [1.0, 1.25, 3.0]


def test_a_worker_that_was_lost_while_it_had_nothing_to_do_is_back_in_time(rows: str) -> None:
    costs = Costs(ClusterConfig(**CONSTANT, worker_life_s=1.0, worker_back_s=0.5, seed=4), 4)
    lost_s = costs.until_loss_s(0, 0)
    sampling = Sampling(shard_rows=(8,), rows_per_step=8, seed=0)
    rounds = VirtualRounds(costs, {0: (0,)}, sampling)
    rounds.now_s = lost_s + 10.0
    assert rounds.computed_s(0, rounds.now_s, Quorum.of_all(frozenset({0})), range(1)) >= rounds.now_s + 1.0
    assert rounds.losses >= 1


@pytest.mark.parametrize(("workers", "sums"), [(1, 1), (4, 4), (5, 5), (6, 2), (8, 2), (30, 5), (100, 10)])
def test_spark_adds_sums_on_executors_before_they_reach_the_driver(workers: int, sums: int) -> None:
    assert sums_at_driver(workers) == sums  # as treeAggregate of depth 2 divides them


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("turn_s", 0.0, "cluster.turn_s is 0.0, but must be above 0"),
        ("spread", -1.0, "cluster.spread is -1.0, but must be at least 0"),
        ("tail_share", 1.5, "cluster.tail_share is 1.5, but is a part"),
        ("turn_times", "gaussian", "cluster.turn_times is 'gaussian'"),
        ("link_bytes_per_s", 0, "cluster.link_bytes_per_s is 0"),
        ("worker_life_s", 0.0, "cluster.worker_life_s is 0.0, but must be above 0"),
        ("latency", 1.0, "did you mean latency_s?"),
        ("turn_s", float("nan"), "cluster.turn_s is nan"),
        ("job_s", float("inf"), "cluster.job_s is inf"),
        ("seed", 2**64, "cluster.seed is"),
    ],
)
def test_keys_of_the_cluster_that_cannot_be_are_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_dict({"cluster": {key: value}})
    assert words in str(refused.value)


def test_more_workers_than_shards_are_refused(rows: str) -> None:
    with pytest.raises(ConfigError, match=r"engine.num_workers is 9, but there are 4 shards"):
        trained(rows, {}, engine={"name": "simulated", "num_workers": 9})
