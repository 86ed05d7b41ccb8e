"""Local SGD: held to an independent loop of its formula, bit by bit, and to its limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from watched_trainings import Watch, configured, net, trained

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ConfigError, NotFinite, UpdateNotFinite
from sparksgd.solvers.local_sgd import LocalSGD, LocalSGDSettings
from sparksgd.solvers.protocol import Message
from sparksgd.solvers.rules import Experiment
from sparksgd.training.loop import train


def norm_net() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def local(**keys: Any) -> dict[str, Any]:
    return {"name": "local_sgd"} | keys


def tree_sum(leaves: list[np.ndarray]) -> np.ndarray:
    """Add four leaves as the addition tree does."""
    (a, b, c, d) = leaves
    return (a + b) + (c + d)


def by_hand(
    given: tuple[Plan, Any],
    rounds: list[int],
    *,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    outer_lr: float = 1.0,
    beta: float = 0.0,
) -> list[np.ndarray]:
    """Local SGD in plain torch: the module's docstring, line by line."""
    plan, shards = given
    theta = nn.utils.parameters_to_vector(net().parameters()).detach().numpy()
    momentum, turn, found = np.zeros_like(theta), 0, []
    for turns in rounds:
        differences, counts = [], []
        for shard, records in enumerate(shards):
            module = net()
            nn.utils.vector_to_parameters(torch.from_numpy(theta.copy()), module.parameters())
            optimizer, count = make(module), 0
            for t in range(turn, turn + turns):
                order = plan.sampling.shuffled(shard, plan.sampling.epoch_of(t))
                piece = records[np.sort(order[slice(*plan.sampling.piece_bounds(shard, t))])]
                if len(piece):
                    optimizer.zero_grad()
                    output = module(torch.from_numpy(piece["x"].copy()))
                    (output[:, 0] - torch.from_numpy(piece["(label)"].copy())).square().sum().backward()
                    for parameter in module.parameters():
                        parameter.grad /= len(piece)
                    optimizer.step()
                    count += len(piece)
            x = nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
            differences.append((theta - x) * np.float32(count))
            counts.append(count)
        delta = tree_sum(differences) / np.float32(sum(counts))
        momentum = np.float32(beta) * momentum + delta
        theta = theta - np.float32(outer_lr) * (delta + np.float32(beta) * momentum if beta else delta)
        turn += turns
        found.append(theta)
    return found


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.03)


def momentum_sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.03, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


# The formula


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ({"name": "SGD", "lr": 0.03}, sgd),
        ({"name": "SGD", "lr": 0.03, "momentum": 0.9}, momentum_sgd),
        ({"name": "AdamW", "lr": 0.01}, adamw),
    ],
    ids=["SGD", "momentum", "AdamW"],
)
@pytest.mark.parametrize(
    ("turns", "rounds"), [(1, [1] * 16), (3, [3, 3, 2, 3, 3, 2]), (8, [8, 8]), (99, [8, 8])]
)
@pytest.mark.parametrize(("outer_lr", "beta"), [(1.0, 0.0), (0.7, 0.9)])
def test_every_round_is_the_independent_loop_s_bit_for_bit(
    rows: ParquetRows, optimizer: Any, make: Any, turns: int, rounds: list[int], outer_lr: float, beta: float
) -> None:
    solver = local(turns_per_round=turns, outer_lr=outer_lr, outer_momentum=beta)
    training, watch, given = trained(configured(solver, optimizer), rows)
    expected = by_hand(given, rounds, make=make, outer_lr=outer_lr, beta=beta)
    assert watch.turns == np.cumsum(rounds).tolist()
    assert [p.tobytes() for p in watch.parameters] == [p.tobytes() for p in expected]
    assert training.is_finished
    assert (training.version, training.turns) == (len(rounds), 16)


def test_one_turn_of_plain_sgd_is_the_step_of_the_mean_gradient_to_rounding(rows: ParquetRows) -> None:
    _, one_turn, _ = trained(configured(local(turns_per_round=1)), rows)
    _, synchronous, _ = trained(configured({}), rows)
    np.testing.assert_allclose(one_turn.parameters, synchronous.parameters, rtol=0, atol=1e-5)
    assert one_turn.turns == synchronous.turns


def test_synchronous_steps_first_are_synchronous_sgd_bit_for_bit(rows: ParquetRows) -> None:
    momentum = {"name": "SGD", "lr": 0.03, "momentum": 0.9}
    schedule = {"name": "StepLR", "step_size": 3, "gamma": 0.5}
    post_local = replace(
        configured(local(turns_per_round=4, synchronous_steps=5), momentum),
        schedule=Config.from_dict({"schedule": schedule}).schedule,
    )
    plain = replace(configured({}, momentum), schedule=post_local.schedule)
    _, first, _ = trained(post_local, rows)
    _, synchronous, _ = trained(plain, rows)
    assert [p.tobytes() for p in first.parameters[:5]] == [p.tobytes() for p in synchronous.parameters[:5]]
    assert first.turns == [1, 2, 3, 4, 5, 8, 12, 16]
    assert first.lr == [0.03] * 3 + [0.015] * 2 + [0.015, 0.03 / 4, 0.03 / 16]


def test_optimisers_begin_with_a_copy_of_the_centre_s_state_after_the_synchronous_steps(
    rows: ParquetRows,
) -> None:
    # One shard: a round of local turns that begins with the centre's momentum is plain momentum SGD going on.
    momentum = {"name": "SGD", "lr": 0.03, "momentum": 0.9}
    solver = local(turns_per_round=4, synchronous_steps=4, inner_state="average")
    config = configured(solver, momentum, num_shards=1)
    ended, _, _ = trained(config, rows)
    plain, _, _ = trained(configured({}, momentum, num_shards=1), rows)
    np.testing.assert_allclose(ended.flat.parameters.numpy(), plain.flat.parameters.numpy(), atol=1e-6)
    dropped, _, _ = trained(configured(local(turns_per_round=4), momentum, num_shards=1), rows)
    assert np.abs(dropped.flat.parameters.numpy() - plain.flat.parameters.numpy()).max() > 1e-3


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_with_one_shard_averaged_and_kept_states_are_the_optimiser_that_never_stopped(
    rows: ParquetRows, name: str
) -> None:
    optimizer = {"name": name, "lr": 0.01} | ({"momentum": 0.9} if name != "Adam" else {})
    plain, _, _ = trained(configured({}, optimizer, num_shards=1), rows)
    for state in ("average", "keep"):
        solver = local(turns_per_round=5, inner_state=state)
        ended, _, _ = trained(configured(solver, optimizer, num_shards=1), rows)
        np.testing.assert_allclose(ended.flat.parameters.numpy(), plain.flat.parameters.numpy(), atol=2e-6)


def test_batch_norm_s_statistics_are_the_row_weighted_mean_of_what_rounds_ended_with(
    rows: ParquetRows,
) -> None:
    config = configured(local(turns_per_round=4), {"lr": 1e-12}, rows_per_step=16, epochs=1)
    training, _, (plan, shards) = trained(config, rows, norm_net)
    expected, count = np.zeros(4), 0
    for shard, records in enumerate(shards):
        norm, linear, seen = nn.BatchNorm1d(4), norm_net()[0], 0
        for t in range(4):
            order = plan.sampling.shuffled(shard, 0)
            piece = records[np.sort(order[slice(*plan.sampling.piece_bounds(shard, t))])]
            norm(linear(torch.from_numpy(piece["x"].copy())))
            seen += len(piece)
        expected += norm.running_mean.numpy() * seen
        count += seen
    np.testing.assert_allclose(training.module[1].running_mean.numpy(), expected / count, atol=1e-6)
    assert int(training.module[1].num_batches_tracked) == 4


# Turns, rounds and what waits for a round's end


def test_evaluations_wait_for_a_round_s_end_and_shape_nothing(rows: ParquetRows) -> None:
    silent, _, _ = trained(configured(local(turns_per_round=3)), rows)
    often, watch, _ = trained(configured(local(turns_per_round=3), eval_every=1), rows, test=rows)
    assert watch.evaluated_at == [3, 6, 8, 11, 14, 16]
    seldom, watch, _ = trained(configured(local(turns_per_round=3), eval_every=7), rows, test=rows)
    assert watch.evaluated_at == [8, 14, 16]
    digests = {training.flat.parameters_sha256() for training in (silent, often, seldom)}
    assert len(digests) == 1


def test_train_steps_counts_turns_and_cuts_the_last_round_short(rows: ParquetRows) -> None:
    training, watch, _ = trained(configured(local(turns_per_round=3), steps=13), rows)
    assert watch.turns == [3, 6, 8, 11, 13]
    assert (training.version, training.turns, training.is_finished) == (5, 13, True)


def test_a_schedule_counts_turns(rows: ParquetRows) -> None:
    schedule = Config.from_dict({"schedule": {"name": "LinearLR", "total_iters": 16, "start_factor": 0.5}})
    config = replace(configured(local(turns_per_round=3)), schedule=schedule.schedule)
    _, watch, _ = trained(config, rows)
    assert watch.lr == pytest.approx([0.03 * (0.5 + 0.5 * turn / 16) for turn in (0, 3, 6, 8, 11, 14)])


# What goes wrong


class Jumps(torch.optim.SGD):
    """An optimiser whose third step makes everything infinite."""

    steps = 0

    def step(self, closure: None = None) -> None:
        self.steps += 1
        super().step()
        if self.steps == 3:
            self.param_groups[0]["params"][0].data.fill_(float("inf"))


@pytest.mark.parametrize("turns", [1, 2, 3, 8])
def test_an_update_that_is_not_finite_leaves_the_weights_of_the_round_before(
    rows: ParquetRows, turns: int
) -> None:
    steep = {"name": "SGD", "lr": 1e30}
    watch = Watch()
    with pytest.raises(NotFinite):
        train(
            configured(local(turns_per_round=turns), steep), rows=rows, test=None, make_engine=InlineEngine,
            module=net(), observers=[watch],
        )  # fmt: skip
    module = net()
    config = configured(local(turns_per_round=turns), {"name": f"{__name__}:Jumps", "lr": 0.01})
    if turns > 2:
        with pytest.raises(
            UpdateNotFinite,
            match=r"turn 3 of shard \d: the shard's own step made a parameter infinite or NaN",
        ):
            train(config, rows=rows, test=None, make_engine=InlineEngine, module=module)
        start = nn.utils.parameters_to_vector(net().parameters())
        assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), start)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"turns_per_round": 0}, "solver.turns_per_round is 0, but must be at least 1"),
        ({"outer_lr": 0.0}, "solver.outer_lr is 0.0, but must be above 0"),
        ({"outer_momentum": 1.0}, "solver.outer_momentum is 1.0, but must be below 1"),
        ({"outer_momentum": float("nan")}, "solver.outer_momentum is nan"),
        ({"synchronous_steps": -1}, "solver.synchronous_steps is -1, but must be at least 0"),
        ({"clip_norm": 0.0}, "solver.clip_norm is 0.0, but must be above 0"),
        ({"inner_state": "mix"}, "solver.inner_state is 'mix', but must be 'drop' or 'average' or 'keep'"),
        ({"turns": 3}, "unknown key solver.turns (did you mean turns_per_round?)"),
        ({"backup_workers": 1}, "unknown key solver.backup_workers"),
    ],
    ids=str,
)
def test_wrong_keys_are_refused_before_a_row_is_read(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        train(configured(local(**keys)), rows=None, test=None, make_engine=InlineEngine, module=net())
    assert words in str(refused.value)


def test_a_schedule_that_evaluations_move_is_refused(rows: ParquetRows) -> None:
    plateau = Config.from_dict({"schedule": {"name": "ReduceLROnPlateau"}}).schedule
    config = replace(configured(local(turns_per_round=3)), schedule=plateau)
    with pytest.raises(ConfigError, match="the rate must follow from the turn alone"):
        train(config, rows=rows, test=rows, make_engine=InlineEngine, module=net())


def test_a_state_that_is_not_one_value_for_each_parameter_cannot_be_averaged(rows: ParquetRows) -> None:
    config = configured(local(inner_state="average"), {"name": "Adafactor", "lr": 0.01})
    with pytest.raises(ConfigError, match="Adafactor', whose state is not one value for each parameter"):
        train(config, rows=rows, test=None, make_engine=InlineEngine, module=net())
    dropped = configured(local(turns_per_round=3), {"name": "Adafactor", "lr": 0.01})
    assert trained(dropped, rows)[0].is_finished


def test_clipping_bounds_what_each_optimiser_takes(rows: ParquetRows) -> None:
    loose, _, _ = trained(configured(local(turns_per_round=2, clip_norm=1e9)), rows)
    plain, _, _ = trained(configured(local(turns_per_round=2)), rows)
    tight, watch, _ = trained(configured(local(turns_per_round=2, clip_norm=1e-3), steps=2), rows)
    assert loose.flat.parameters_sha256() == plain.flat.parameters_sha256()
    start = nn.utils.parameters_to_vector(net().parameters()).detach().numpy()
    assert 0 < np.linalg.norm(watch.parameters[0] - start) <= 2 * 0.03 * 1e-3 * 1.001
    assert copy.copy(tight).is_finished


class Counting(torch.optim.Optimizer):
    """An optimiser that keeps its state in its parameter group, as schedule-free ones do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                parameter -= group["lr"] / group["k"] * parameter.grad


def test_what_an_optimiser_keeps_in_its_group_is_its_own(rows: ParquetRows) -> None:
    counting = {"name": f"{__name__}:Counting", "lr": 0.03}
    _, watch, given = trained(configured(local(turns_per_round=8), counting), rows)
    expected = by_hand(given, [8, 8], make=lambda module: Counting(module.parameters(), 0.03))
    assert [p.tobytes() for p in watch.parameters] == [p.tobytes() for p in expected]
    _, first, _ = trained(configured(local(synchronous_steps=16), counting), rows)
    _, plain, _ = trained(configured({}, counting), rows)
    assert [p.tobytes() for p in first.parameters] == [p.tobytes() for p in plain.parameters]


def test_momentum_that_a_schedule_switches_on_is_averaged(rows: ParquetRows) -> None:
    cycle = Config.from_dict({"schedule": {"name": "OneCycleLR", "max_lr": 0.05, "total_steps": 16}}).schedule
    plain = replace(configured({}, num_shards=1), schedule=cycle)
    averaged = replace(
        configured(local(turns_per_round=5, inner_state="average"), num_shards=1), schedule=cycle
    )
    ended, _, _ = trained(averaged, rows)
    expected, _, _ = trained(plain, rows)
    np.testing.assert_allclose(ended.flat.parameters.numpy(), expected.flat.parameters.numpy(), atol=2e-6)


def test_an_optimiser_of_matrices_alone_is_taken(rows: ParquetRows) -> None:
    def matrices() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))

    training, _, _ = trained(
        configured(local(turns_per_round=3), {"name": "Muon", "lr": 0.01}), rows, matrices
    )
    assert training.is_finished


def test_a_state_that_was_taken_does_not_change_with_later_steps(rows: ParquetRows) -> None:
    experiment = Experiment(
        optimizer=Config.from_dict({"optimizer": {"lr": 0.1}}).optimizer, schedule=Config().schedule,
        num_shards=1, turns_per_epoch=8, total_turns=16,
    )  # fmt: skip
    settings = LocalSGDSettings(turns_per_round=2, outer_momentum=0.9)
    solver, other = (LocalSGD(FlatModule(net()), settings, experiment) for _ in range(2))
    size = solver.flat.parameters.numel()
    message = Message(
        vectors={"difference": np.ones(size, np.float32)}, statistics=np.empty(0, np.float32),
        counters=np.empty(0, np.int64), loss=1.0, rows=1,
    )  # fmt: skip
    solver.receive(message)
    kept = solver.state()
    before = {name: vector.tobytes() for name, vector in kept.vectors.items()}
    other.load_state(kept)
    other.receive(message)
    solver.load_state(other.state())
    assert {name: vector.tobytes() for name, vector in kept.vectors.items()} == before
