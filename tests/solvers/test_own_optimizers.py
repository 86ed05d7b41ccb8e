"""Optimisers and schedules of the user's own do what they do in plain torch, or are refused by name."""

from __future__ import annotations

import itertools
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_local_sgd import configured, net, rows, trained
from test_untouched import steps_of_torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import Config, OptimizerConfig, ScheduleConfig
from sparksgd.data.local_files import ParquetRows
from sparksgd.errors import ConfigError, ModelError, UpdateNotFinite, UserCodeError
from sparksgd.solvers.protocol import Message
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.schedules import Rates
from sparksgd.solvers.synchronous import SynchronousSettings, SynchronousSolver
from sparksgd.solvers.torch_optimizers import another_optimizer, make_optimizer

__all__ = ["rows"]  # a fixture

STEPS = 6


class RebindsData(torch.optim.SGD):
    """p.data becomes a new tensor; of some, every other column of a larger one."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                if p.grad is not None:
                    moved = p.data - group["lr"] * p.grad
                    p.data = torch.stack([moved, moved], -1)[..., 0] if number else moved


class SwapsData(torch.optim.SGD):
    """Tensors of one shape change places: each gets another one's memory."""

    def step(self, closure: None = None) -> None:
        super().step()
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in self.param_groups[0]["params"]:
            by_shape.setdefault(p.shape, []).append(p)
        for alike in by_shape.values():
            data = [p.data for p in alike]
            for p, other in zip(alike, data[1:] + data[:1], strict=True):
                p.data = other


class RebindsGrad(torch.optim.SGD):
    """p.grad becomes a new tensor."""

    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad.sign() * 0.1
        super().step()


class ClearsGrads(torch.optim.SGD):
    def step(self, closure: None = None) -> None:
        super().step()
        self.zero_grad()


class KeepsGrads(torch.optim.SGD):
    """The last gradient is kept as it is, not as a copy."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                last = self.state[p].get("last", p.grad)
                self.state[p]["last"] = p.grad
                p.sub_(2 * p.grad - last, alpha=group["lr"])


class Lookahead(torch.optim.Optimizer):
    """Slow weights, a counter and another optimiser, which are in no state_dict."""

    def __init__(self, params: Any, lr: float, k: int = 3) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=lr, momentum=0.9)
        self.param_groups = self.inner.param_groups
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.k, self.count = k, 0
        self.mix: Callable[[int], float] = lambda count: 0.5
        self.forms = {"mean": self.mean}

    def mean(self, slow: torch.Tensor, fast: torch.Tensor) -> torch.Tensor:
        return slow + self.mix(self.count) * (fast - slow)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.copy_(self.forms["mean"](slow, p))
                p.copy_(slow)


class SharesMemory(torch.optim.SGD):
    """One attribute is a parameter, one a view of it, and two share memory with each other."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.first = self.param_groups[0]["params"][0]
        self.row = self.first.data[:1]
        self.sums = torch.zeros(4)
        self.half = self.sums[2:]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        self.sums += self.row.sum()
        self.half.mul_(0.5)
        self.row.mul_(1 - 0.01 * self.sums[3].tanh())
        self.first += 0.001 * self.half[0].tanh()


class OddStates(torch.optim.SGD):
    """Its state has string keys, and tensors that are sparse, bfloat16, complex or boolean."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        kept = self.state.setdefault("all", {"turns": np.zeros(2), "words": [{"deep": (1,)}]})
        kept["turns"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                own = self.state[p]
                own["half"] = own.get("half", torch.zeros_like(p, dtype=torch.bfloat16)) + p.grad.bfloat16()
                own["waves"] = own.get("waves", torch.zeros_like(p, dtype=torch.complex64)) + 1j * p.grad
                own["signs"] = p.grad > 0
                own["few"] = (own["few"].to_dense() if "few" in own else 0 * p).add(p.grad).to_sparse()
                own[7] = own.get(7, 0) + 1
                moved = own["half"].float() + own["waves"].imag + own["few"].to_dense() * own["signs"]
                p.sub_(moved, alpha=group["lr"] / (kept["turns"][0] + own[7]))


class Langevin(torch.optim.SGD):
    """SGLD: it draws from all three global generators."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p) * (1 + np.random.rand()) * random.random(), alpha=0.01)


class OwnGenerator(torch.optim.SGD):
    """Its generator is its own, and has a seed."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.drawn, self.of_numpy = torch.Generator().manual_seed(3), np.random.default_rng(4)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn(p.shape, generator=self.drawn), alpha=0.01 * self.of_numpy.random())


class TwoGroups(torch.optim.SGD):
    """Matrices decay, vectors do not."""

    def __init__(self, params: Any, lr: float) -> None:
        params = list(params)
        matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.5}
        super().__init__([matrices, {"params": [p for p in params if p.ndim < 2], "lr": lr / 2}], lr=lr)


GOOD = [
    RebindsData, SwapsData, RebindsGrad, ClearsGrads, KeepsGrads, Lookahead, SharesMemory, OddStates,
    Langevin, OwnGenerator, TwoGroups,
]  # fmt: skip


def named(kind: type) -> dict[str, Any]:
    return {"name": f"{__name__}:{kind.__name__}", "lr": 0.03}


class Seeded:
    """An optimiser of torch whose steps draw from the seeds of the run."""

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.optimizer, self.seed, self.steps = optimizer, seed, itertools.count()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        with generators_seeded(seed32(self.seed, "optimizer", next(self.steps))):
            self.optimizer.step()


@pytest.mark.parametrize("kind", GOOD)
def test_a_training_is_a_plain_loop_with_the_optimiser(rows: ParquetRows, kind: Any) -> None:
    training, watch, given = trained(configured({}, named(kind)), rows)
    plain = net()
    expected, _, _ = steps_of_torch(
        given, plain, Seeded(kind(plain.parameters(), lr=0.03), 3), range(4), range(16)
    )
    np.testing.assert_allclose(watch.parameters, expected, atol=2e-5)
    saved = nn.utils.parameters_to_vector(training.module.parameters()).detach()
    assert torch.equal(saved, training.flat.parameters)
    assert {p.untyped_storage().data_ptr() for p in training.module.parameters()} == {
        training.flat.parameters.untyped_storage().data_ptr()
    }


def solver_of(optimizer: Any, schedule: ScheduleConfig | None = None) -> SynchronousSolver:
    experiment = Experiment(
        optimizer=OptimizerConfig(name=f"{__name__}:{optimizer.__name__}", arguments={"lr": 0.03}),
        schedule=schedule or ScheduleConfig(),
        num_shards=1,
        turns_per_epoch=1,
        total_turns=STEPS,
        seed=9,
    )
    return SynchronousSolver(FlatModule(net()), SynchronousSettings(), experiment)


def arrived(step: int, size: int) -> Message:
    return Message(
        vectors={"gradient": np.random.default_rng(step).standard_normal(size, np.float32)},
        statistics=np.empty(0, np.float32), counters=np.empty(0, np.int64), loss=1.0, rows=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_another_solver_goes_on_from_its_state_at_any_step(kind: Any) -> None:
    steady, moving = solver_of(kind), solver_of(kind)
    for step in range(STEPS):
        message = arrived(step, len(steady.flat.parameters))
        steady.receive(message)
        state = pickle.loads(pickle.dumps(moving.state()))
        moving = moving.make_replica()(FlatModule(net()))
        moving.load_state(state)
        moving.receive(message)
        assert moving.flat.parameters.numpy().tobytes() == steady.flat.parameters.numpy().tobytes(), step


def test_what_shares_memory_shares_it_again_with_the_other_s() -> None:
    one = solver_of(SharesMemory)
    one.receive(arrived(0, len(one.flat.parameters)))
    other = solver_of(SharesMemory)
    other.load_state(pickle.loads(pickle.dumps(one.state())))
    optimizer: Any = other._optimizer.optimizer
    assert optimizer.first is other.flat.trainable[0]
    assert optimizer.row.data_ptr() == other.flat.parameters.data_ptr()
    assert optimizer.half.data_ptr() == optimizer.sums.data_ptr() + 8


@pytest.mark.parametrize("kind", [Lookahead, RebindsData, Langevin])
def test_what_a_step_that_fails_left_is_taken_back(kind: Any) -> None:
    solver = solver_of(kind)
    before = solver.flat.parameters.clone()
    message = arrived(0, len(before))
    message.vectors["gradient"][:] = np.inf
    with pytest.raises(UpdateNotFinite, match="made a parameter infinite"):
        solver.receive(message)
    assert torch.equal(nn.utils.parameters_to_vector(solver.flat.trainable), before)
    assert torch.equal(solver.flat.parameters, before)


# Chance


@pytest.mark.parametrize("solver", [{}, {"name": "local_sgd", "turns_per_round": 3}], ids=["steps", "turns"])
def test_noise_follows_from_the_seed_and_the_caller_s_generators_are_as_before(
    rows: ParquetRows, solver: dict[str, Any]
) -> None:
    modules = [net(), net(), net()]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    one, _, _ = trained(configured(solver, named(Langevin)), rows, modules.pop)
    torch_state, *others = before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert [str(np.random.get_state()), random.getstate()] == others
    random.random()
    np.random.rand()
    torch.rand(1)
    again, _, _ = trained(configured(solver, named(Langevin)), rows, modules.pop)
    other, _, _ = trained(configured(solver, named(Langevin), seed=4), rows, modules.pop)
    assert one.flat.parameters_sha256() == again.flat.parameters_sha256()
    assert one.flat.parameters_sha256() != other.flat.parameters_sha256()


def test_shards_draw_different_noise_in_their_own_turns(rows: ParquetRows) -> None:
    drawn: list[torch.Tensor] = []
    real = torch.randn_like

    class Watched:
        def __call__(self, values: torch.Tensor) -> torch.Tensor:
            drawn.append(real(values).flatten()[:1])
            return torch.zeros_like(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", Watched())
        trained(configured({"name": "local_sgd", "turns_per_round": 4}, named(Langevin), epochs=1), rows)
    in_turns = torch.cat(drawn[-4 * 8 * 4 :: 4])  # of the first parameter, of 4 shards in 8 turns
    assert len(set(in_turns.tolist())) == 32


# Refusals


class KeepsMemoryOfRebound(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                last = self.state[p].get("last", p.data)
                self.state[p]["last"] = p.data
                p.data = p.data - group["lr"] * p.grad + 0.1 * (p.data - last)


class HoldsALock(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.guard = {"inside": threading.Lock()}


_STEPS = itertools.count()


class CountsInAGlobal(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.mul_(1 - 0.01 * (next(_STEPS) % 1000))


class DrawsFromTheSystem(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.drawn = np.random.default_rng()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.mul_(float(self.drawn.random()))


class ReplacesParameters(torch.optim.SGD):
    def step(self, closure: None = None) -> None:
        super().step()
        group = self.param_groups[0]
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]


class ReplacesShapes(torch.optim.SGD):
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = p.data.reshape(-1)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> float:  # type: ignore[override]
        return closure()


class NoRate(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"rate": lr})

    def step(self, closure: None = None) -> None:
        pass


REFUSED = [
    (KeepsMemoryOfRebound, "shares memory with a parameter that it rebinds; let it keep p.detach().clone()"),
    (HoldsALock, "guard (TypeError: cannot pickle '_thread.lock' object)"),
    (CountsInAGlobal, "two that are made alike give different parameters"),
    (DrawsFromTheSystem, "two that are made alike give different parameters"),
    (ReplacesParameters, 'let its step change the parameters in group["params"]'),
    (
        ReplacesShapes,
        "of shape (3,) on cpu, but it was torch.float32 of shape (1, 3)",
    ),
    (NeedsClosure, "TypeError"),
    (NoRate, "its parameter groups have no 'lr'"),
]


@pytest.mark.parametrize(("kind", "words"), REFUSED)
@pytest.mark.parametrize("solver", [{}, {"name": "local_sgd"}], ids=["synchronous", "local"])
def test_what_cannot_be_right_is_refused_by_name(
    rows: ParquetRows, kind: Any, words: str, solver: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as refused:
        trained(configured(solver, named(kind)), rows)
    assert words in str(refused.value)
    assert kind.__name__ in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LBFGS", "evaluates a step many times: use another"),
        ("SparseAdam", "takes sparse gradients alone, but gradients are summed as dense vectors: use Adam"),
        ("Muon", "Muon"),
    ],
)
@pytest.mark.parametrize("solver", [{}, {"name": "local_sgd"}], ids=["synchronous", "local"])
def test_what_torch_s_own_cannot_do_here_is_told_before_rows_are_dealt(
    rows: ParquetRows, name: str, words: str, solver: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(configured(solver, {"name": name, "lr": 0.03}), rows)  # net has vectors, which Muon refuses


class ReplacesLater(torch.optim.SGD):
    steps = 0

    def step(self, closure: None = None) -> None:
        super().step()
        self.steps += 1
        if self.steps == 10:
            raise RuntimeError("ten")
        if self.steps == 8:
            self.param_groups[0]["params"] = list(map(nn.Parameter, self.param_groups[0]["params"]))


def test_what_shows_after_the_trial_is_told_at_that_step(rows: ParquetRows) -> None:
    with pytest.raises(ConfigError, match="ReplacesLater put other objects into param_groups"):
        trained(configured({}, named(ReplacesLater)), rows)


def config_of(kind: type) -> OptimizerConfig:
    return OptimizerConfig(name=f"{__name__}:{kind.__name__}", arguments={"lr": 0.03})


class ChangesLate(torch.optim.SGD):
    """From the 80th step on it does something that no other process would see."""

    steps = 0

    def change(self, parameter: nn.Parameter) -> None:
        raise NotImplementedError

    def step(self, closure: None = None) -> None:
        super().step()
        self.steps += 1
        if self.steps == 80:
            self.change(self.param_groups[0]["params"][0])


class FreezesLate(ChangesLate):
    def change(self, parameter: nn.Parameter) -> None:
        parameter.requires_grad_(False)


class HooksLate(ChangesLate):
    def change(self, parameter: nn.Parameter) -> None:
        parameter.register_hook(lambda gradient: 2 * gradient)


class AttributesLate(ChangesLate):
    def change(self, parameter: nn.Parameter) -> None:
        parameter.seen = True  # type: ignore[attr-defined]


class SetsThreadsLate(ChangesLate):
    def change(self, parameter: nn.Parameter) -> None:
        torch.set_num_threads(torch.get_num_threads() + 1)


class SetsTypeLate(ChangesLate):
    def change(self, parameter: nn.Parameter) -> None:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FreezesLate, "set requires_grad of parameter 0 to False"),
        (HooksLate, "changed the hooks of parameter 0, but gradients are computed by workers"),
        (AttributesLate, "changed the attribute 'seen' of parameter 0"),
        (SetsThreadsLate, "changed torch.set_num_threads and left it so"),
        (SetsTypeLate, "changed torch.set_default_dtype and left it so"),
    ],
)
def test_what_an_optimiser_changes_late_is_told_at_that_step(kind: Any, words: str) -> None:
    flat = FlatModule(nn.Linear(3, 1))
    optimizer = another_optimizer(flat, config_of(kind))
    for step in range(79):
        optimizer.step(optimizer.new_gradient().fill_(1), None, step)
    with pytest.raises((ConfigError, ModelError)) as refused:
        optimizer.step(optimizer.new_gradient().fill_(1), None, 79)
    assert words in str(refused.value)
    assert kind.__name__ in str(refused.value)
    assert torch.get_default_dtype() == torch.float32


class HooksAtOnce(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for p in self.param_groups[0]["params"]:
            p.register_hook(lambda gradient: 2 * gradient)


def test_an_optimiser_that_hooks_parameters_when_it_is_made_is_refused() -> None:
    with pytest.raises(ConfigError, match="HooksAtOnce changed the hooks of parameter 0"):
        make_optimizer(FlatModule(nn.Linear(3, 1)), config_of(HooksAtOnce))


class Fragile(torch.optim.SGD):
    """It cannot do without a gradient, in plain torch neither."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.sign(), alpha=0.1)


def test_one_that_needs_every_gradient_raises_where_one_is_none() -> None:
    solver = solver_of(Fragile)
    size = len(solver.flat.parameters)
    solver.receive(arrived(0, size))
    message = arrived(1, size)
    message.touched = np.array([True, True, True, False])
    with pytest.raises(UserCodeError, match="the optimiser raised AttributeError: 'NoneType'"):
        solver.receive(message)


# Schedules


class WarmUp(LambdaLR):
    """A schedule of one's own, as they are written: with a lambda."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        super().__init__(optimizer, lambda turn: min(1.0, (turn + 1) / steps))


class Wanders(LRScheduler):
    """It keeps a walk and a counter, and draws."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.walk: list[float] = []
        self.count = {"moves": 0}
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.count["moves"] += 1
        self.walk.append(0.1 * random.random() + 0.01 * np.random.rand() + torch.rand(1).item())
        return [base * (1 + sum(self.walk)) / self.count["moves"] for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}


class Opened(LRScheduler):
    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.guard = threading.Lock()
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return self.base_lrs


def scheduled(kind: Any) -> ScheduleConfig:
    return ScheduleConfig(name=f"{__name__}:{kind.__name__}", arguments={"steps": 4})


@pytest.mark.parametrize("kind", [WarmUp, Wanders])
def test_a_schedule_goes_on_in_another_solver_and_ahead(kind: Any) -> None:
    steady, moving = (solver_of(RebindsGrad, scheduled(kind)) for _ in range(2))
    rates = []
    for step in range(STEPS):
        message = arrived(step, len(steady.flat.parameters))
        rates.append(steady.receive(message).lr)
        state = pickle.loads(pickle.dumps(moving.state()))
        moving = moving.make_replica()(FlatModule(net()))
        moving.load_state(state)
        assert moving.receive(message).lr == rates[-1]
    assert len(set(rates)) > 3
    config = OptimizerConfig(name="SGD", arguments={"lr": 0.03})
    ahead, behind = (Rates(config, scheduled(kind), 1, STEPS, seed=9) for _ in range(2))
    assert [settings["lr"] for settings in ahead.ahead(STEPS)] == rates
    for rate in rates:
        assert behind.lr == rate
        behind.move(1)


def test_a_schedule_that_cannot_be_copied_is_refused_with_its_attribute() -> None:
    with pytest.raises(ConfigError, match=r"the schedule Opened keeps an attribute .*guard \(TypeError"):
        solver_of(RebindsGrad, scheduled(Opened))


def test_several_groups_have_no_schedule_in_local_turns(rows: ParquetRows) -> None:
    local = {"name": "local_sgd", "turns_per_round": 3}
    assert trained(configured(local, named(TwoGroups)), rows)[0].is_finished
    config = configured(local, named(TwoGroups))
    config = Config(**{**vars(config), "schedule": ScheduleConfig(name="LinearLR", arguments={})})
    with pytest.raises(ConfigError, match="divides the parameters into 2 groups"):
        trained(config, rows)


def test_an_optimiser_is_tried_once_for_all_that_a_training_makes_alike(monkeypatch):
    tried = []
    monkeypatch.setattr(
        "sparksgd.solvers.torch_optimizers._try_optimizer",
        lambda shapes, config: tried.append(config.arguments["lr"]),
    )
    for lr, width in ((0.011, 3), (0.011, 3), (0.012, 3), (0.012, 3), (0.012, 2)):
        make_optimizer(
            FlatModule(nn.Linear(width, 2)), OptimizerConfig(name="Adafactor", arguments={"lr": lr})
        )
    assert tried == [0.011, 0.012, 0.012]


class KeepsViews(torch.optim.Optimizer):
    """It steps through views that it made at its start."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.views = [p.data for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Make a step."""
        found = [p for group in self.param_groups for p in group["params"]]
        for view, parameter in zip(self.views, found, strict=True):
            view.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


class OddPlaces(nn.Module):
    """A parameter of a class of the user's begins at an odd place, and is looked at as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pairs, self.last = (nn.Parameter(torch.ones(n)) for n in (3, 4, 3))


def test_views_of_a_parameter_at_an_odd_place_move_after_a_move() -> None:
    flat = FlatModule(OddPlaces())
    config = OptimizerConfig(name=f"{__name__}:KeepsViews", arguments={"lr": 0.1})
    optimizer = another_optimizer(flat, config)
    optimizer.load_state(*optimizer.state())
    optimizer.step(optimizer.new_gradient().fill_(1), None, 0)
    assert torch.allclose(flat.parameters, torch.full((10,), 0.9))


class MovesAsItClears(torch.optim.SGD):
    """Decay in zero_grad."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and let parameters decay."""
        super().zero_grad(set_to_none)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.99)


def test_an_optimiser_whose_zero_grad_does_more_is_refused() -> None:
    config = OptimizerConfig(name=f"{__name__}:MovesAsItClears", arguments={"lr": 0.1})
    with pytest.raises(ConfigError, match="MovesAsItClears"):
        make_optimizer(FlatModule(nn.Linear(2, 2)), config)


def test_a_hook_for_all_optimisers_is_refused() -> None:
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: None)
    try:
        with pytest.raises(ConfigError, match="a hook for all optimisers"):
            make_optimizer(FlatModule(nn.Linear(2, 2)), OptimizerConfig(arguments={"lr": 0.1}))
    finally:
        hook.remove()
