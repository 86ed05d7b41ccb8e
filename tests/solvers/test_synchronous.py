"""The solver is torch's own optimiser, fed with the mean of what arrived."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from math import cos, pi, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparksgd.arithmetic.changes import PARAMETERS, ChangedElements, Changes
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.errors import ConfigError, ModelError, NotFinite
from sparksgd.solvers.protocol import Answer, Gradient, Message
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.synchronous import SynchronousSettings, SynchronousSolver


def arrived(
    gradient: Sequence[float] | np.ndarray,
    rows: int = 1,
    statistics: Sequence[float] = (),
    counters: Sequence[int] = (),
) -> Message:
    return Message(
        vectors={"gradient": np.array(gradient, np.float32)},
        statistics=np.array(statistics, np.float32),
        counters=np.array(counters, np.int64),
        loss=0.0,
        rows=rows,
    )


def solver_of(
    module: nn.Module,
    name: str = "SGD",
    *,
    schedule: ScheduleConfig | None = None,
    clip_norm: float | None = None,
    turns_per_epoch: int = 1,
    **arguments: Any,
) -> SynchronousSolver:
    experiment = Experiment(
        optimizer=OptimizerConfig(name=name, arguments=arguments),
        schedule=schedule or ScheduleConfig(),
        num_shards=1,
        turns_per_epoch=turns_per_epoch,
        total_turns=3,
    )
    return SynchronousSolver(FlatModule(module), SynchronousSettings(clip_norm=clip_norm), experiment)


def at(*parameters: float) -> nn.Linear:
    """A module whose flat vector is these numbers."""
    module = nn.Linear(len(parameters), 1, bias=False)
    module.weight.data.copy_(torch.tensor([parameters]))
    return module


def rates(solver: SynchronousSolver, steps: int) -> list[float]:
    width = solver.flat.parameters.numel()
    return [solver.receive(arrived([0.0] * width)).lr for _ in range(steps)]


class AgainstTheSign(torch.optim.Optimizer):
    """An optimiser of the user's own."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


# The update


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    ],
)
def test_every_step_is_torch_s_own_bit_for_bit(kind: Any, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    solver = solver_of(copy.deepcopy(plain), kind.__name__, **arguments)
    optimizer = kind(plain.parameters(), **arguments)
    drawn = np.random.default_rng(0)
    for _ in range(6):
        gradient = drawn.standard_normal(26).astype(np.float32)
        solver.receive(arrived(gradient, rows=7))
        mean, start = torch.from_numpy(gradient / np.float32(7)), 0
        for parameter in plain.parameters():
            parameter.grad = mean[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()
        optimizer.step()
        expected = torch.cat([parameter.detach().reshape(-1) for parameter in plain.parameters()])
        assert torch.equal(solver.flat.parameters, expected)


def test_the_mean_is_a_division_by_the_rows() -> None:
    five, three = np.float32(5), np.float32(3)
    assert five / three != five * (1 / three)  # the last bit tells them apart
    solver = solver_of(at(0.0), lr=1.0)
    solver.receive(arrived([5.0], rows=3))
    assert solver.flat.parameters.item() == -(five / three)


def test_plain_descent_is_what_a_person_works_out() -> None:
    solver = solver_of(at(1.0, 2.0), lr=0.5)
    solver.receive(arrived([4.0, -8.0], rows=4))  # means 1 and -2
    assert solver.flat.parameters.tolist() == [0.5, 3.0]
    assert solver.version == 1


def test_an_optimiser_of_the_user_s_goes_by_import_path() -> None:
    solver = solver_of(at(1.0, 2.0), f"{__name__}:AgainstTheSign", lr=0.25)
    solver.receive(arrived([3.0, -5.0]))
    assert solver.flat.parameters.tolist() == [0.75, 2.25]


def test_frozen_parameters_are_out_of_the_optimiser_s_reach() -> None:
    module = nn.Linear(1, 1)
    module.weight.requires_grad_(False).fill_(3.0)
    module.bias.data.fill_(1.0)
    solver = solver_of(module, lr=0.5, weight_decay=1.0)
    solver.receive(arrived([0.0]))
    assert (module.weight.item(), module.bias.item()) == (3.0, 0.5)


def test_a_tied_parameter_moves_once() -> None:
    tied = nn.Sequential(at(1.0), at(1.0))
    tied[1].weight = tied[0].weight
    solver = solver_of(tied, lr=0.5)
    solver.receive(arrived([1.0]))
    assert tied[0].weight.item() == tied[1].weight.item() == 0.5


def test_running_statistics_become_their_mean_over_the_rows() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    solver = solver_of(module, lr=0.0)
    # two rows that left mean 1 and variance 4 behind, six that left 3 and 8
    left = arrived([0.0] * 4, rows=2, statistics=[2 * 1, 2 * 4], counters=[1])
    left += arrived([0.0] * 4, rows=6, statistics=[6 * 3, 6 * 8], counters=[1])
    solver.receive(left)
    assert module[1].running_mean.item() == (2 * 1 + 6 * 3) / 8
    assert module[1].running_var.item() == (2 * 4 + 6 * 8) / 8
    assert module[1].num_batches_tracked.item() == 1


def test_the_solver_draws_no_random_number() -> None:
    solver, state = solver_of(at(1.0), "Adam"), torch.get_rng_state()
    solver.receive(arrived([1.0]))
    assert torch.equal(torch.get_rng_state(), state)


# What is sent


def test_the_worker_half_sends_its_gradient_as_it_is_and_can_be_shipped() -> None:
    solver = solver_of(at(1.0, 2.0))
    halves = pickle.loads(pickle.dumps(solver.halves))
    half = halves.make(solver.flat, 3)
    half.take(Answer(weights=solver.readout(), turn=0))
    assert half.point().tolist() == [1.0, 2.0]
    assert half.send() is None  # it has made no turn
    gradient = Gradient(
        vector=np.array([3.0, 4.0], np.float32), statistics=np.array([0.5], np.float32),
        counters=np.array([7]), loss=2.0, rows=5,
    )  # fmt: skip
    half.turn(gradient, {})
    message = half.send()
    assert message.vectors["gradient"] is gradient.vector
    assert (message.statistics.tolist(), message.counters.tolist()) == ([2.5], [7])
    assert (message.loss, message.rows, message.shards) == (2.0, 5, 1)
    assert half.send() is None  # it was sent


def test_gradient_sums_add_up_part_by_part() -> None:
    left = arrived([1, 2], rows=3, statistics=[10], counters=[4, 9])
    left.loss = 0.5
    right = arrived([10, 20], rows=4, statistics=[5], counters=[6, 2])
    right.loss = 0.25
    left += right
    assert (left.vectors["gradient"].tolist(), left.statistics.tolist()) == ([11, 22], [15])
    assert (left.counters.tolist(), left.loss, left.rows, left.shards) == ([6, 9], 0.75, 7, 2)


# Weights


def test_weights_are_one_object_until_the_next_step() -> None:
    solver = solver_of(at(1.0), lr=0.5)
    first = solver.readout()
    assert solver.readout() is first
    solver.receive(arrived([1.0]))
    second = solver.readout()
    assert (first.version, first.parameters.tolist()) == (0, [1.0])
    assert (second.version, second.parameters.tolist()) == (1, [0.5])


def test_stepping_back_gives_the_weights_of_the_step_before_once() -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    module[0].weight.data.fill_(8.0)
    solver = solver_of(module, lr=1.0)
    for step in (1, 2, 3):
        solver.receive(arrived([1.0], statistics=[10 * step, 100 * step], counters=[step]))
    assert solver.flat.parameters.tolist() == [5.0]
    for _ in range(2):  # there is no step further back
        solver.step_back()
        weights = solver.readout()
        assert (solver.version, weights.version) == (2, 2)
        assert weights.parameters.tolist() == [6.0]
        assert weights.statistics.tolist() == [20.0, 200.0]
        assert weights.counters.tolist() == [2]


def test_stepping_back_before_the_first_step_changes_nothing() -> None:
    solver = solver_of(at(1.0))
    solver.step_back()
    assert (solver.version, solver.flat.parameters.tolist()) == (0, [1.0])


@pytest.mark.parametrize("gradient", [3e38, float("inf"), float("nan")])
def test_a_step_that_would_make_a_parameter_infinite_is_not_made(gradient: float) -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    module[0].weight.data.fill_(1.0)
    solver = solver_of(module, lr=4.0)
    solver.receive(arrived([0.5], statistics=[1, 2], counters=[1]))
    with pytest.raises(
        NotFinite, match=r"step 2 made a parameter infinite or NaN.*optimizer.lr \(it was 4\)"
    ):
        solver.receive(arrived([gradient], statistics=[3, 4], counters=[2]))
    solver.step_back()  # those weights were good: nothing to take back
    assert (solver.version, solver.readout().version) == (1, 1)
    assert solver.flat.parameters.tolist() == [-1.0]
    assert solver.flat.statistics().tolist() == [1.0, 2.0]
    assert solver.flat.counters().tolist() == [1]


def changing(step: int, gradient: float = 1.0) -> Message:
    """A gradient of two weights, of which forward has set the first to 5, and a buffer to the step."""
    message = arrived([gradient, gradient])
    five, number = (np.array([value], np.float32).view(np.int32) for value in (5, step))
    message.changes = Changes(
        parts={
            PARAMETERS: ChangedElements(positions=np.array([0]), values=five),
            "t": ChangedElements(positions=None, values=number),
        }
    )
    return message


def test_what_forward_changed_comes_before_the_optimiser_and_goes_with_the_step() -> None:
    module = at(1.0, 2.0)
    module.register_buffer("t", torch.zeros(1))
    solver = solver_of(module, lr=0.5)
    for step in (1, 2):
        solver.receive(changing(step))
        assert (solver.flat.parameters.tolist(), module.t.item()) == ([4.5, 2.0 - 0.5 * step], step)
    with pytest.raises(NotFinite):
        solver.receive(changing(3, float("inf")))
    assert (solver.flat.parameters.tolist(), module.t.item()) == ([4.5, 1.0], 2)
    solver.receive(changing(3))
    solver.step_back()
    assert (solver.version, solver.flat.parameters.tolist(), module.t.item()) == (2, [4.5, 1.0], 2)


def test_two_values_of_an_element_make_no_step() -> None:
    module = at(1.0, 2.0)
    module.register_buffer("t", torch.zeros(1))
    solver, total = solver_of(module, lr=0.5), changing(1)
    total += changing(2)
    with pytest.raises(ModelError, match=r"forward changes t, .* element 0 becomes 1\.0 and 2\.0"):
        solver.receive(total)
    assert (solver.version, solver.flat.parameters.tolist(), module.t.item()) == (0, [1.0, 2.0], 0)


# Clipping


def test_a_long_gradient_is_cut_to_the_norm_and_its_own_norm_is_told() -> None:
    solver = solver_of(at(0.0, 0.0), lr=1.0, clip_norm=1.0)
    outcome = solver.receive(arrived([6.0, -8.0], rows=2))  # mean (3, -4), of norm 5
    assert outcome.gradient_norm == 5.0
    assert solver.flat.parameters.tolist() == pytest.approx([-0.6, 0.8], rel=1e-6)


def test_a_short_gradient_is_left_alone() -> None:
    solver = solver_of(at(0.0, 0.0), lr=1.0, clip_norm=5.0)
    assert solver.receive(arrived([3.0, -4.0])).gradient_norm == 5.0
    assert solver.flat.parameters.tolist() == [-3.0, 4.0]


def test_without_clipping_no_norm_is_taken() -> None:
    assert solver_of(at(0.0)).receive(arrived([1e30])).gradient_norm is None


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 1000.0])
def test_clipping_is_torch_s_own_up_to_rounding(clip_norm: float) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20))
    solver = solver_of(copy.deepcopy(plain), lr=1.0, clip_norm=clip_norm)
    before = solver.flat.parameters.clone()
    plain(torch.randn(5, 30)).square().sum().backward()
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in plain.parameters()])
    outcome = solver.receive(arrived(gradient.numpy()))
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
    clipped = torch.cat([parameter.grad.reshape(-1) for parameter in plain.parameters()])
    assert outcome.gradient_norm == pytest.approx(norm.item(), rel=1e-6)
    assert outcome.gradient_norm == pytest.approx(sqrt(sum(gradient.double().square())), rel=1e-6)
    torch.testing.assert_close(before - solver.flat.parameters, clipped, rtol=1e-5, atol=1e-6)


# Learning rates


def test_a_schedule_by_the_step_moves_after_every_step() -> None:
    halving = ScheduleConfig(name="StepLR", arguments={"step_size": 2, "gamma": 0.5})
    assert rates(solver_of(at(1.0), lr=1.0, schedule=halving), 5) == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_a_schedule_by_the_epoch_moves_after_every_epoch() -> None:
    halving = ScheduleConfig(name="StepLR", interval="epoch", arguments={"step_size": 1, "gamma": 0.5})
    solver = solver_of(at(1.0), lr=1.0, schedule=halving, turns_per_epoch=3)
    assert rates(solver, 7) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_a_cosine_is_a_cosine() -> None:
    cosine = ScheduleConfig(name="CosineAnnealingLR", arguments={"T_max": 8})
    found = rates(solver_of(at(1.0), lr=0.3, schedule=cosine), 8)
    assert found == pytest.approx([0.3 * (1 + cos(pi * step / 8)) / 2 for step in range(8)])


def test_a_schedule_that_moves_momentum_as_well_is_torch_s_own() -> None:
    arguments = {"max_lr": 0.5, "total_steps": 6}
    solver = solver_of(
        at(1.0),
        lr=0.1,
        momentum=0.9,
        schedule=ScheduleConfig(name="OneCycleLR", arguments=arguments),
    )
    plain = at(1.0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, **arguments)
    for step in range(5):
        outcome = solver.receive(arrived([step + 1.0]))
        assert outcome.lr == optimizer.param_groups[0]["lr"]
        plain.weight.grad = torch.tensor([[step + 1.0]])
        optimizer.step()
        schedule.step()
        assert solver.flat.parameters.item() == plain.weight.item()


def test_a_schedule_that_the_run_cuts_short_is_named() -> None:
    fitting, longer = (
        ScheduleConfig(name="OneCycleLR", arguments={"max_lr": 0.5, "total_steps": steps}) for steps in (3, 4)
    )
    assert solver_of(at(1.0), lr=0.1, momentum=0.9, schedule=fitting).remarks == []
    (remark,) = solver_of(at(1.0), lr=0.1, momentum=0.9, schedule=longer).remarks
    assert "total_steps is 4, but the run moves the schedule 3 times" in remark


def test_the_rate_counts_in_the_step_that_reports_it() -> None:
    halving = ScheduleConfig(name="StepLR", arguments={"step_size": 1, "gamma": 0.5})
    solver = solver_of(at(0.0), lr=1.0, schedule=halving)
    for expected in (-1.0, -1.5, -1.75):
        solver.receive(arrived([1.0]))
        assert solver.flat.parameters.item() == expected


# Refusals


def make_optimizer(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """A schedule of one's own that evaluations move."""


def make_schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


@pytest.mark.parametrize(
    ("name", "arguments", "phrases"),
    [
        ("SDG", {}, ["optimizer.name is 'SDG'", "did you mean SGD?", "package.module:attribute"]),
        ("Optimizer", {}, ["optimizer.name is 'Optimizer'", "not one of ours"]),
        ("nowhere:Mine", {}, ["optimizer.name is 'nowhere:Mine'", "no module 'nowhere'"]),
        ("SGD", {"momentun": 0.9}, ["optimizer.momentun is no argument of SGD (did you mean momentum?)"]),
        ("SGD", {"lr": -1.0}, ["does not take {'lr': -1.0}", "Invalid learning rate"]),
        ("SGD", {"lr": "fast"}, ["does not take {'lr': 'fast'}"]),
        ("SGD", {"fused": True}, ["optimizer.fused is true", "other bits", "leave it out"]),
        ("LBFGS", {}, ["optimizer.name is 'LBFGS'", "use another"]),
        (
            f"{__name__}:make_optimizer",
            {},
            [
                "which is a function",
                "Let a class do in __init__ what make_optimizer does",
                "class Mine(torch",
            ],
        ),
        (f"{__name__}:pytest", {}, ["which is not a torch.optim.optimizer.Optimizer"]),
    ],
)
def test_an_optimiser_that_cannot_serve_is_refused(
    name: str, arguments: dict[str, Any], phrases: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        solver_of(at(1.0), name, **arguments)
    for phrase in phrases:
        assert phrase in str(refused.value)


@pytest.mark.parametrize(
    ("name", "arguments", "phrases"),
    [
        ("StepLr", {"step_size": 1}, ["schedule.name is 'StepLr'", "did you mean StepLR?"]),
        ("StepLR", {}, ["schedule.name is 'StepLR'", "does not take {}", "step_size"]),
        (
            "StepLR",
            {"step_size": 1, "gama": 1},
            ["schedule.gama is no argument of StepLR (did you mean gamma?)"],
        ),
        (f"{__name__}:Plateau", {}, [":Plateau'", "only torch's own", '"ReduceLROnPlateau"']),
        (None, {"step_size": 1}, ["schedule.step_size is set, but schedule.name is not"]),
        (
            f"{__name__}:make_schedule",
            {},
            [
                "which is a function, but must be a class derived from",
                "Let a class do in __init__ what make_schedule does: class WarmUp(",
            ],
        ),
    ],
)
def test_a_schedule_that_cannot_serve_is_refused(
    name: str | None, arguments: dict[str, Any], phrases: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        solver_of(at(1.0), schedule=ScheduleConfig(name=name, arguments=arguments))
    for phrase in phrases:
        assert phrase in str(refused.value)
