"""Gossip: the first turns, which a person works out; limits; what does not depend on times and workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrivals_in_turn import TARGETS, Two, configured, quadratic
from torch import nn
from virtual_trainings import CONSTANT, net, trained, written

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config, SolverConfig
from sparksgd.engines.gossip_turns import GossipTurns
from sparksgd.errors import ConfigError, ModelError, UpdateNotFinite
from sparksgd.solvers.rules import RULES, Experiment, completed, family_of, make_solver

RULES_OF_GOSSIP: dict[str, dict[str, Any]] = {
    "push": {"name": "gradient_push"},
    "push, overlapped": {"name": "gradient_push", "overlap": True},
    "ring": {"name": "decentralised"},
}
every_rule = pytest.mark.parametrize("rule", RULES_OF_GOSSIP)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("gossip"))


def turns_of(
    solver: dict[str, Any],
    shards: int,
    optimizer: dict[str, Any] | None = None,
    module: nn.Module | None = None,
) -> tuple[GossipTurns, Any]:
    """Return some shards of two parameters; shard s wants them to be TARGETS[s]."""
    keys = dict(solver)
    config = configured(keys.pop("name"), keys, optimizer or {"name": "SGD", "lr": 0.25})
    experiment = Experiment(
        optimizer=config.optimizer,
        schedule=config.schedule,
        num_shards=shards,
        turns_per_epoch=4,
        total_turns=12,
    )
    flat = FlatModule(module or Two())
    made = make_solver(config, flat, experiment)

    class Computes:
        """Stands in for a computer."""

        plan = type("Plan", (), {"halves": made.halves})
        flat = FlatModule(Two())

    def make(shard: int, turn: int, half: Any, answer: Any) -> Any:
        gradient = quadratic(shard, turn, half.point())
        half.turn(gradient, answer.settings[0])
        return gradient

    return GossipTurns(Computes, make, range(shards), made), made  # type: ignore[arg-type]


def models(turns: GossipTurns) -> list[list[float]]:
    return [half.share[0].tolist() for half in turns.halves.values()]


def test_every_rule_of_gossip_is_tested_here() -> None:
    of_gossip = {name for name in RULES if family_of(SolverConfig(name=name)) == "gossip"}
    assert {solver["name"] for solver in RULES_OF_GOSSIP.values()} == of_gossip


def test_gradient_push_sends_half_of_every_model_to_one_peer() -> None:
    turns, solver = turns_of(RULES_OF_GOSSIP["push"], 3)
    turns.next()  # steps of a quarter: (1/4, 1), (1/2, 3/4), (3/2, -1/4); each to the next one
    first = [[0.125 + 0.75, 0.5 - 0.125], [0.25 + 0.125, 0.375 + 0.5], [0.75 + 0.25, -0.125 + 0.375]]
    assert models(turns) == first
    assert solver.readout().parameters.tolist() == pytest.approx([0.75, 0.5])
    assert [solver.peers(turn, 0) for turn in range(4)] == [[1], [2], [1], [2]]


@pytest.mark.parametrize("shards", [2, 3, 4, 5, 8, 9, 17])
def test_the_exponential_graph_reaches_everybody_and_each_gets_one_message(shards: int) -> None:
    _, solver = turns_of(RULES_OF_GOSSIP["push"], shards)
    reached, turns = {0}, (shards - 1).bit_length()
    for turn in range(turns):
        receivers = [solver.peers(turn, shard)[0] for shard in range(shards)]
        assert sorted(receivers) == list(range(shards))
        reached |= {receivers[shard] for shard in reached}
    assert reached == set(range(shards))


def test_overlapped_push_lacks_the_gradient_of_its_turn() -> None:
    turns, _ = turns_of(RULES_OF_GOSSIP["push, overlapped"], 3)
    for _ in range(3):
        before = np.array(models(turns), np.float32)
        peers = [turns._solver.peers(turns._solver.turns, shard)[0] for shard in range(3)]
        turns.next()
        expected = before / 2 - 0.25 * (before - TARGETS)
        for shard, peer in enumerate(peers):
            expected[peer] += before[shard] / 2
        assert np.allclose(models(turns), expected, atol=1e-6)


def test_the_ring_averages_first_and_steps_along_the_gradient_before_it() -> None:
    turns, solver = turns_of(RULES_OF_GOSSIP["ring"], 3)
    for _ in range(3):
        before = np.array(models(turns), np.float32)
        turns.next()
        expected = before.mean(axis=0) - 0.25 * (before - TARGETS)  # three shards: all are neighbours
        assert np.allclose(models(turns), expected, atol=1e-6)
    assert solver.readout().parameters == pytest.approx(np.mean(models(turns), axis=0))
    assert [turns_of(RULES_OF_GOSSIP["ring"], n)[1].peers(0, 0) for n in (1, 2, 3, 5)] == [
        [], [1], [1, 2], [1, 4],
    ]  # fmt: skip


@every_rule
def test_the_readout_comes_near_the_best_place(rule: str) -> None:
    turns, solver = turns_of(RULES_OF_GOSSIP[rule], 3, {"name": "SGD", "lr": 0.1})
    for _ in range(60):
        turns.next()
    assert solver.readout().parameters.tolist() == pytest.approx([3.0, 2.0], abs=0.05)
    weights = [half.share[1] for half in turns.halves.values()]
    assert sum(weights) == pytest.approx(3.0)


@every_rule
def test_with_one_shard_it_is_plain_sgd(rows: str, rule: str) -> None:
    one, _ = trained(rows, RULES_OF_GOSSIP[rule], engine={"name": "inline"}, num_shards=1)
    plain, _ = trained(rows, {}, engine={"name": "inline"}, num_shards=1)
    assert one.flat.parameters_sha256() == plain.flat.parameters_sha256()


@every_rule
def test_bits_depend_neither_on_workers_nor_on_times(rows: str, rule: str) -> None:
    reference, _ = trained(rows, RULES_OF_GOSSIP[rule], engine={"name": "inline"}, test=rows)
    digests = {reference.flat.parameters_sha256()}
    times = set()
    for workers in (1, 3, 4):
        for cluster in ({"spread": 0.5}, CONSTANT):
            engine = {"name": "simulated", "num_workers": workers}
            run, reports = trained(rows, RULES_OF_GOSSIP[rule], cluster, engine=engine, test=rows)
            digests.add(run.flat.parameters_sha256())
            times.add(reports[-1].virtual_s)
            assert run.evaluations[-1].loss == reference.evaluations[-1].loss
    assert len(digests) == 1
    assert len(times) == 6


def test_a_slow_shard_delays_its_neighbours_first(rows: str) -> None:
    cluster = CONSTANT | {"slow_workers": 1, "slow_factor": 3.0}
    _, reports = trained(rows, RULES_OF_GOSSIP["ring"], cluster, num_shards=8, rows_per_step=16)
    ends = [report.virtual_s for report in reports]
    assert ends == pytest.approx(
        [3.0 * (turn + 1) for turn in range(len(ends))]
    )  # the slow one sets the pace
    _, reports = trained(rows, RULES_OF_GOSSIP["ring"], CONSTANT, num_shards=8, rows_per_step=16)
    assert reports[3].virtual_s == pytest.approx(4.0)


def test_messages_take_time_after_the_gradient_or_beside_it(rows: str) -> None:
    cluster = CONSTANT | {"latency_s": 0.25, "link_bytes_per_s": 4.0 * 21 / 0.5}
    _, push = trained(rows, RULES_OF_GOSSIP["push"], cluster, steps=2)
    assert [report.virtual_s for report in push] == pytest.approx([1.75, 3.5])
    _, beside = trained(rows, RULES_OF_GOSSIP["push, overlapped"], cluster, steps=2)
    assert [report.virtual_s for report in beside] == pytest.approx([1.0, 2.0])


def test_without_gradients_nothing_is_learnt(rows: str) -> None:
    run, reports = trained(rows, RULES_OF_GOSSIP["push"], CONSTANT | {"gradients": False})
    start = np.concatenate([p.detach().numpy().ravel() for p in net().parameters()])
    assert run.flat.parameters.numpy().tobytes() == start.tobytes()
    assert reports[-1].virtual_s == pytest.approx(8.0)


def test_any_optimiser_moves_the_models() -> None:
    for optimizer in ({"name": "Adam", "lr": 0.05}, {"name": "SGD", "lr": 0.05, "momentum": 0.5}):
        turns, solver = turns_of(RULES_OF_GOSSIP["ring"], 3, optimizer)
        for _ in range(200):
            turns.next()
        distance = np.abs(solver.readout().parameters - [3.0, 2.0])
        assert (distance < 1.5).all()  # Adam divides by its gradients, which differ from shard to shard


def test_what_cannot_be_is_refused(rows: str) -> None:
    with pytest.raises(ModelError, match="GroupNorm"):
        turns_of(RULES_OF_GOSSIP["ring"], 3, module=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(
        ConfigError, match=r"cluster.worker_life_s is 3.0, but with this solver a lost worker"
    ):
        trained(rows, RULES_OF_GOSSIP["ring"], CONSTANT | {"worker_life_s": 3.0})
    with pytest.raises(ConfigError, match=r"messages from shard to shard"):
        trained(rows, RULES_OF_GOSSIP["ring"], engine={"name": "tree"})
    with pytest.raises(ConfigError, match="did you mean overlap"):
        completed(Config.from_dict({"solver": {"name": "gradient_push", "overlaps": True}}))
    turns, _ = turns_of(RULES_OF_GOSSIP["push"], 3, {"name": "SGD", "lr": 1e38})
    with pytest.raises(UpdateNotFinite, match=r"optimizer\.lr"):
        turns.next()
