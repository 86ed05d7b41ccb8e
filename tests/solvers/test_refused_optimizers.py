"""Optimisers that cannot be right here are refused by name, before the first step or where it shows."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from own_optimizers import arrived, config_of, named, solver_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from watched_trainings import configured, trained

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import OptimizerConfig
from sparksgd.data.local_files import ParquetRows
from sparksgd.errors import ConfigError, ModelError, UserCodeError
from sparksgd.solvers.torch_optimizers import another_optimizer, make_optimizer

# Before the first step


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


class HooksAtOnce(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for p in self.param_groups[0]["params"]:
            p.register_hook(lambda gradient: 2 * gradient)


def test_an_optimiser_that_hooks_parameters_when_it_is_made_is_refused() -> None:
    with pytest.raises(ConfigError, match="HooksAtOnce changed the hooks of parameter 0"):
        make_optimizer(FlatModule(nn.Linear(3, 1)), config_of(HooksAtOnce))


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


# At the step where it shows


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
