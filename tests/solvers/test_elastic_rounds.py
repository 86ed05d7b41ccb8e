"""Synchronous elastic averaging against a plain loop of its formula, and on every engine that carries it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from virtual_trainings import CONSTANT, net, trained, written
from watched_trainings import configured
from watched_trainings import trained as watched

from sparksgd.arithmetic.generators import seed_generators
from sparksgd.arithmetic.seeds import seed32
from sparksgd.data.local_files import ParquetRows

SHARDS, TAU, TURNS, LR = 4, 3, 8, 0.02


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("elastic"))


def together(**keys: Any) -> dict[str, Any]:
    return {"name": "elastic_averaging", "order": "together", "turns_per_exchange": TAU} | keys


@pytest.mark.parametrize(("keys", "alpha"), [({"beta": 0.8}, 0.8 / SHARDS), ({"rho": 5.0}, LR * 5.0)])
def test_it_is_a_plain_loop_of_its_formula(rows: str, keys: dict[str, Any], alpha: float) -> None:
    training, reports = trained(rows, together(**keys), engine={"name": "inline"})
    _, _, (plan, shards) = watched(configured({}, rows_per_step=16), ParquetRows(rows), make=net)
    module = net()
    centre = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    models = [centre.clone() for _ in range(SHARDS)]
    since = 0
    for turn in range(TURNS):
        for shard, model in enumerate(models):
            model -= LR * plain_gradient(module, model, plan, shards, shard, turn)
        since += 1
        if since == TAU or turn % 4 == 3:  # a round ends with its epoch
            before, since = centre.clone(), 0
            centre = centre + alpha * (sum(models) - SHARDS * before)
            models = [model - alpha * (model - before) for model in models]
    assert torch.allclose(training.flat.parameters, centre, atol=1e-6)
    assert [report.turn for report in reports] == [3, 4, 7, 8]


def plain_gradient(
    module: torch.nn.Module, at: torch.Tensor, plan: Any, shards: Any, shard: int, turn: int
) -> torch.Tensor:
    torch.nn.utils.vector_to_parameters(at, module.parameters())
    start, end = plan.sampling.piece_bounds(shard, turn)
    order = np.sort(plan.sampling.shuffled(shard, plan.sampling.epoch_of(turn))[start:end])
    records = shards[shard][order]
    seed_generators(seed32(plan.sampling.seed, "dropout", shard, turn))
    module.zero_grad()
    output = module(torch.from_numpy(records["x"].copy()))[:, 0]
    ((output - torch.from_numpy(plan.schema.label_array(records).copy())) ** 2).mean().backward()
    return torch.cat([p.grad.ravel() for p in module.parameters()])


@pytest.mark.parametrize("workers", [1, 3])
def test_bits_do_not_depend_on_the_engine(rows: str, workers: int) -> None:
    reference, _ = trained(rows, together(), engine={"name": "inline"})
    simulated, reports = trained(
        rows, together(), CONSTANT, engine={"name": "simulated", "num_workers": workers}
    )
    assert simulated.flat.parameters_sha256() == reference.flat.parameters_sha256()
    assert len(reports) == 4


def test_no_spring_leaves_the_centre_where_it_is(rows: str) -> None:
    training, _ = trained(rows, together(beta=0.0), engine={"name": "inline"})
    start = np.concatenate([p.detach().numpy().ravel() for p in net().parameters()])
    assert training.flat.parameters.numpy().tobytes() == start.tobytes()
