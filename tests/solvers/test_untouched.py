"""A parameter that no row of a step touched is skipped, as plain torch skips one whose gradient is None."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from watched_trainings import configured, steps_of_torch, trained

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.data.local_files import ParquetRows
from sparksgd.solvers.flat_optimizer import ELEMENTWISE
from sparksgd.solvers.protocol import Message, SolverState, either
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.synchronous import SynchronousSettings, SynchronousSolver

ROWS, STEPS = 7, 7
NEVER, SOMETIMES, ALWAYS = range(3)
SHAPES = [(3, 4), (5, 2), (2, 6)]
TOUCHED_AT = [0, 1, 1, 1, 0, 0, 1]  # whether SOMETIMES is touched in a step
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind.__name__, {"lr": 0.05}) for kind in ELEMENTWISE),
    *((name, {"lr": 0.05, "weight_decay": 0.1}) for name in ("SGD", "AdamW", "NAdam", "RAdam", "Adamax")),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.05, "amsgrad": True}),
    ("RMSprop", {"lr": 0.05, "momentum": 0.9, "centered": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "foreach": True}),
    ("Adafactor", {"lr": 0.05, "weight_decay": 0.1}),
    ("Muon", {"lr": 0.05, "weight_decay": 0.1}),
]  # fmt: skip
ON_STRIPS = [(name, arguments) for name, arguments in CASES if name not in ("Adafactor", "Muon")]


def module() -> nn.Module:
    torch.manual_seed(3)
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])


def solver_over(flat: FlatModule | FlatStrip, name: str, arguments: dict[str, Any]) -> SynchronousSolver:
    experiment = Experiment(
        optimizer=OptimizerConfig(name=name, arguments=arguments),
        schedule=ScheduleConfig(name="CosineAnnealingLR", arguments={"T_max": STEPS}),
        num_shards=1,
        turns_per_epoch=1,
        total_turns=STEPS,
    )
    return SynchronousSolver(flat, SynchronousSettings(), experiment)


def mask(step: int, first_is_whole: bool) -> np.ndarray | None:
    """Which parameters are touched in a step; in the first one perhaps all: then what is kept is divided."""
    return None if first_is_whole and step == 0 else np.array([False, bool(TOUCHED_AT[step]), True])


def arrived(step: int, size: int, touched: np.ndarray | None) -> Message:
    gradient = np.random.default_rng(step).standard_normal(size, np.float32)
    ends = np.cumsum([0, *(torch.Size(shape).numel() for shape in SHAPES)])
    for number in range(len(SHAPES)):
        if touched is not None and not touched[number]:
            gradient[ends[number] : ends[number + 1]] = 0
    return Message(
        vectors={"gradient": gradient}, statistics=np.empty(0, np.float32), counters=np.empty(0, np.int64),
        loss=1.0, rows=ROWS, touched=touched,
    )  # fmt: skip


def by_torch(name: str, arguments: dict[str, Any], first_is_whole: bool) -> list[torch.Tensor]:
    plain = list(module().parameters())
    optimizer = getattr(torch.optim, name)(plain, **arguments)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    found = []
    for step in range(STEPS):
        touched = mask(step, first_is_whole)
        whole = arrived(step, sum(p.numel() for p in plain), touched)
        mean, start = torch.from_numpy(whole.vectors["gradient"]) / ROWS, 0
        for number, parameter in enumerate(plain):
            part = mean[start : start + parameter.numel()].view(parameter.shape).clone()
            parameter.grad = part if touched is None or touched[number] else None
            start += parameter.numel()
        optimizer.step()
        schedule.step()
        found.append(torch.cat([parameter.detach().reshape(-1) for parameter in plain]))
    return found


@pytest.mark.parametrize(
    ("name", "arguments", "first_is_whole"),
    [
        pytest.param(
            name,
            arguments,
            first_is_whole,
            id=f"{name}-{number}-{'once' if first_is_whole else 'never'}",
            marks=pytest.mark.soak if name == "Muon" and not first_is_whole else (),  # it is compiled first
        )
        for number, (name, arguments) in enumerate(CASES)
        for first_is_whole in (False, True)
    ],
)
def test_every_step_is_torch_s_own(name: str, arguments: dict[str, Any], first_is_whole: bool) -> None:
    flat = FlatModule(module())
    start = flat.parameters.clone()
    solver = solver_over(flat, name, arguments)
    for step, expected in enumerate(by_torch(name, arguments, first_is_whole)):
        solver.receive(arrived(step, len(flat.parameters), mask(step, first_is_whole)))
        if name in ("Adafactor", "Muon"):  # matrix products depend on where a tensor begins
            torch.testing.assert_close(flat.parameters, expected)
        else:
            assert flat.parameters.numpy().tobytes() == expected.numpy().tobytes(), step
    assert first_is_whole or torch.equal(flat.parameters[:12], start[:12])


@pytest.mark.parametrize("first_is_whole", [False, True], ids=["never", "once"])
@pytest.mark.parametrize(("name", "arguments"), ON_STRIPS)
def test_strips_that_change_hands_after_every_step_are_torch_s_own(
    name: str, arguments: dict[str, Any], first_is_whole: bool
) -> None:
    moving = solver_over(FlatModule(module()), name, arguments)
    size = len(moving.flat.parameters)
    for step, expected in enumerate(by_torch(name, arguments, first_is_whole)):
        whole = arrived(step, size, mask(step, first_is_whole))
        sent: SolverState = pickle.loads(pickle.dumps(moving.state()))
        states = []
        for rank in range(1 + step):
            strip = balanced_range(rank, 1 + step, size)
            flat = FlatModule(module())
            flat.load(sent.weights)
            worker = moving.make_replica()(FlatStrip(flat, strip))
            worker.load_state(sent.strip(strip))
            part = whole.vectors["gradient"][strip.start : strip.stop]
            worker.receive(Message(**{**vars(whole), "vectors": {"gradient": part}}))
            states.append(pickle.loads(pickle.dumps(worker.state())))
        assert all(state.rest == states[0].rest for state in states)
        moving.load_state(SolverState.joined(states))
        assert moving.flat.parameters.numpy().tobytes() == expected.numpy().tobytes(), step


def test_an_optimiser_over_all_elements_stays_one_tensor_while_every_parameter_is_touched() -> None:
    solver = solver_over(FlatModule(module()), "Adam", {"lr": 0.1})
    group = solver._optimizer.group
    solver.receive(arrived(0, 34, None))
    assert [tuple(tensor.shape) for tensor in group["params"]] == [(34,)]
    solver.receive(arrived(1, 34, np.array([True, False, True])))
    assert [tuple(tensor.shape) for tensor in group["params"]] == [(12,), (10,), (12,)]


# From the backward pass to the sum


def test_what_the_backward_passes_did_not_reach_is_told() -> None:
    flat = FlatModule(nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1, bias=False), nn.Linear(2, 1)]))
    one, two, three = flat.module
    rows = torch.ones(3, 2)
    with flat.new_gradient():
        one(rows).sum().backward()
    assert flat.touched.tolist() == [True, True, False, False, False]
    with flat.new_gradient():
        one(rows).sum().backward()
        (0 * three(rows)).sum().backward()  # a gradient of zeros is one
    assert flat.touched.tolist() == [True, True, False, True, True]
    with flat.new_gradient():
        (one(rows) + two(rows) + three(rows)).sum().backward()
    assert flat.touched is None
    with flat.new_gradient(lambda vector, parameter: None) as gradient:
        two(rows).sum().backward()
    assert flat.touched.tolist() == [False, False, True, False, False]
    assert gradient.tolist() == [0, 0, 0, 3, 3, 0, 0, 0]


def test_a_sum_has_touched_what_any_of_its_messages_touched() -> None:
    some, others = np.array([True, False, False]), np.array([False, False, True])
    assert either(some, others).tolist() == [True, False, True]
    assert either(some, None) is either(None, some) is None
    assert either(some, ~some) is None
    total = arrived(0, 34, some)
    total += arrived(1, 34, others)
    assert total.touched.tolist() == [True, False, True]


# From rows to weights


class Heads(nn.Module):
    """Rows whose `which` is positive use the second head; nobody uses the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[:, :1] > 1.2
        found: torch.Tensor = self.heads[0](x)
        if chosen.any():
            found = torch.where(chosen, self.heads[1](x), found)
        return found


class Skips(nn.Module):
    """Its second layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers[2](self.layers[0](x).tanh())
        return found


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_a_training_is_a_plain_loop_on_the_union(
    rows: ParquetRows, name: str, clip_norm: float | None, num_shards: int
) -> None:
    arguments = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    solver = {} if clip_norm is None else {"clip_norm": clip_norm}
    config = configured(solver, {"name": name} | arguments, num_shards=num_shards, epochs=3)
    _, watch, given = trained(config, rows, Heads)
    plain = Heads()
    optimizer = getattr(torch.optim, name)(plain.parameters(), **arguments)
    expected, touched, _ = steps_of_torch(given, plain, optimizer, range(num_shards), range(24), clip_norm)
    assert {who[2:] for who in touched} == {(True, True, False, False), (False,) * 4}
    np.testing.assert_allclose(watch.parameters, expected, atol=2e-5)
    assert np.array_equal(watch.parameters[-1][8:], watch.parameters[0][8:])  # nobody uses the third head


def test_what_nobody_uses_does_not_decay(rows: ParquetRows) -> None:
    config = configured({}, {"name": "AdamW", "lr": 0.05, "weight_decay": 0.1}, steps=10)
    training, _, _ = trained(config, rows, Skips)
    unused, used = (Skips().layers[k].weight for k in (1, 0))
    assert torch.equal(training.module.layers[1].weight, unused)
    assert not torch.equal(training.module.layers[0].weight, used)


@pytest.mark.parametrize("turns", [1, 3, 8])
@pytest.mark.parametrize("state", ["drop", "keep", "average"])
def test_a_shard_s_own_turns_are_a_plain_loop(rows: ParquetRows, state: str, turns: int) -> None:
    # One shard: its model is the mean.  Where the state is kept, it is an optimiser that never stops.
    arguments = {"lr": 0.05, "weight_decay": 0.1}
    solver = {"name": "local_sgd", "turns_per_round": turns, "inner_state": state}
    config = configured(solver, {"name": "AdamW"} | arguments, num_shards=1)
    _, watch, given = trained(config, rows, Heads)
    plain = Heads()
    optimizer, expected, first = torch.optim.AdamW(plain.parameters(), **arguments), [], 0
    for last in watch.turns:
        if state == "drop":
            optimizer = torch.optim.AdamW(plain.parameters(), **arguments)
        expected.append(steps_of_torch(given, plain, optimizer, range(1), range(first, last))[0][-1])
        first = last
    np.testing.assert_allclose(watch.parameters, expected, atol=2e-5)


def test_shards_that_keep_nothing_for_a_parameter_do_not_count_in_its_mean(rows: ParquetRows) -> None:
    arguments = {"lr": 0.05, "weight_decay": 0.1}
    solver = {"name": "local_sgd", "turns_per_round": 2, "inner_state": "average"}
    _, watch, given = trained(configured(solver, {"name": "AdamW"} | arguments), rows, Heads)
    theta, kept, expected = Heads(), {}, []
    for first in range(0, 16, 2):
        models, counts = [], []
        for shard in range(4):
            model = copy.deepcopy(theta)
            optimizer = torch.optim.AdamW(model.parameters(), **arguments)
            for number, parameter in enumerate(model.parameters()):
                if number in kept:
                    optimizer.state[parameter] = {name: v.clone() for name, v in kept[number].items()}
            _, _, count = steps_of_torch(
                given, model, optimizer, range(shard, shard + 1), range(first, first + 2)
            )
            models.append((model, optimizer))
            counts.append(count)
        for number, parameter in enumerate(theta.parameters()):
            own = [list(model.parameters())[number] for model, _ in models]
            mean = sum(p.detach() * count for p, count in zip(own, counts, strict=True)) / sum(counts)
            parameter.data.copy_(mean)
            having = [
                (optimizer.state[p], count)
                for p, (_, optimizer), count in zip(own, models, counts, strict=True)
                if p in optimizer.state
            ]
            if having:
                rows_having = sum(count for _, count in having)
                kept[number] = {
                    name: sum(state[name] * count for state, count in having) / rows_having
                    for name in having[0][0]
                }
        expected.append(nn.utils.parameters_to_vector(theta.parameters()).detach().numpy())
    np.testing.assert_allclose(watch.parameters, expected, atol=2e-5)
    assert any(0 < float(state["step"]) < 14 for state in kept.values())  # one was touched now and then


def test_optimisers_begin_with_what_the_centre_s_keeps_for_each_parameter(rows: ParquetRows) -> None:
    arguments = {"lr": 0.05, "weight_decay": 0.1}
    solver = {"name": "local_sgd", "turns_per_round": 4, "synchronous_steps": 8, "inner_state": "average"}
    _, watch, given = trained(configured(solver, {"name": "AdamW"} | arguments, num_shards=1), rows, Heads)
    plain = Heads()
    optimizer = torch.optim.AdamW(plain.parameters(), **arguments)
    expected, _, _ = steps_of_torch(given, plain, optimizer, range(1), range(16))
    np.testing.assert_allclose(watch.parameters[-1], expected[-1], atol=2e-5)
