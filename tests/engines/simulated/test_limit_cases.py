"""Each rule has a setting at which it is another one, or an independent loop: to the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from virtual_trainings import CONSTANT, net, trained, written
from watched_trainings import configured
from watched_trainings import trained as watched

from sparksgd.data.local_files import ParquetRows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("limits"))


def bits(rows: str, solver: dict[str, Any], cluster: dict[str, Any] | None = None, **keys: Any) -> str:
    return trained(rows, solver, cluster or {"spread": 0.5}, **keys)[0].flat.parameters_sha256()


def test_softsync_of_all_shards_that_wait_is_synchronous_sgd(rows: str) -> None:
    held = {"name": "softsync", "gradients_per_step": 4, "release": "step"}
    assert bits(rows, held) == bits(rows, {}, engine={"name": "inline"})


def test_softsync_of_one_gradient_that_ignores_staleness_is_asynchronous_sgd(rows: str) -> None:
    solver = {"name": "softsync", "gradients_per_step": 1, "staleness": "ignore"}
    assert bits(rows, solver) == bits(rows, {"name": "async_sgd"})


def test_a_large_bound_is_asynchronous_sgd(rows: str) -> None:
    assert bits(rows, {"name": "stale_synchronous", "bound": 99}) == bits(rows, {"name": "async_sgd"})


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_compensation_is_asynchronous_sgd(rows: str, adaptive: bool) -> None:
    solver = {"name": "delay_compensated", "compensation": 0.0, "adaptive": adaptive}
    assert bits(rows, solver) == bits(rows, {"name": "async_sgd"})


ONE = {"num_shards": 1, "engine": {"name": "simulated"}}


@pytest.mark.parametrize(
    "solver",
    [
        {"name": "async_sgd"},
        {"name": "softsync"},
        {"name": "stale_synchronous", "bound": 0},
        {"name": "delay_compensated", "compensation": 1.0},
        {"name": "gap_aware"},
    ],
    ids=str,
)
def test_with_one_shard_nothing_is_stale_and_every_rule_is_plain_sgd(rows: str, solver: Any) -> None:
    assert bits(rows, solver, num_shards=1) == bits(rows, {}, num_shards=1, engine={"name": "inline"})


def test_a_large_max_staleness_changes_nothing_and_0_takes_nothing_stale(rows: str) -> None:
    plain = {"name": "async_sgd"}
    assert bits(rows, plain | {"max_staleness": 99}) == bits(rows, plain)
    _, reports = trained(rows, plain | {"max_staleness": 0}, {"spread": 0.5}, steps=4)
    assert {report.staleness for report in reports} == {(0,)}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_spring_leaves_every_shard_alone(rows: str, momentum: float) -> None:
    from sparksgd.engines.shard_work import ShardWork

    sent: dict[int, list[bytes]] = {}
    turn = ShardWork.turn

    def watching(self: ShardWork, shard: int, number: int) -> Any:
        message = turn(self, shard, number)
        if message is not None:
            sent.setdefault(shard, []).append(message.vectors["model"].tobytes())
        return message

    solver = {"name": "elastic_averaging", "turns_per_exchange": 1, "beta": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWork, "turn", watching)
        training, _ = trained(rows, solver, {"spread": 0.5})
    start = np.concatenate([p.detach().numpy().ravel() for p in net().parameters()])
    assert training.flat.parameters.numpy().tobytes() == start.tobytes()  # the centre stays
    assert len(sent) == 4
    assert all(len(set(models)) == len(models) for models in sent.values())  # and every shard goes its way


def test_downpour_is_an_independent_loop_of_its_formula(rows: str) -> None:
    solver = {"name": "async_sgd", "push_every": 2, "pull_every": 4}
    training, reports = trained(rows, solver, CONSTANT, num_shards=1, rows_per_step=16, epochs=2)
    config = configured({}, {"name": "SGD", "lr": 0.0}, num_shards=1, rows_per_step=16, epochs=2)
    _, _, (plan, shards) = watched(config, ParquetRows(rows), make=net)
    module, lr = net(), np.float32(0.02)
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy().copy()
    own, centre, total = flat.copy(), flat.copy(), None
    for number in range(8):
        gradient = plain_gradient(module, own, plan, shards, number)
        total = gradient if total is None else total + gradient
        own = own - lr * gradient
        if number % 2:
            centre = centre - lr * total
            total = None
        if number % 4 == 3:
            own = centre.copy()
    assert np.allclose(training.flat.parameters.numpy(), centre, atol=1e-6)
    assert [report.version for report in reports] == [0, 1, 2, 3]


def plain_gradient(module: nn.Module, at: np.ndarray, plan: Any, shards: Any, turn: int) -> np.ndarray:
    """Return the mean gradient of a piece of the only shard, without dropout's chance."""
    from sparksgd.arithmetic.generators import seed_generators
    from sparksgd.arithmetic.seeds import seed32

    torch.nn.utils.vector_to_parameters(torch.from_numpy(at), module.parameters())
    start, end = plan.sampling.piece_bounds(0, turn)
    order = np.sort(plan.sampling.shuffled(0, plan.sampling.epoch_of(turn))[start:end])
    records = shards[0][order]
    seed_generators(seed32(plan.sampling.seed, "dropout", 0, turn))
    module.zero_grad()
    label = torch.from_numpy(plan.schema.label_array(records).copy())
    output = module(torch.from_numpy(records["x"].copy()))[:, 0]
    ((output - label) ** 2).sum().backward()
    return np.concatenate([p.grad.numpy().ravel() for p in module.parameters()]) / np.float32(len(order))
