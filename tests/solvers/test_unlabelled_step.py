"""A step without torch's label for its profiler is the same step, and hooks and profilers still see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from sparksgd.solvers.flat_optimizer import ELEMENTWISE
from sparksgd.solvers.unlabelled_step import make_step

LABEL = "Optimizer.step#SGD.step"


def made(kind: type[Optimizer] = torch.optim.SGD) -> tuple[torch.Tensor, Any]:
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    weights.grad = torch.linspace(1, 3, 5)
    return weights, kind([weights], lr=0.1)  # type: ignore[call-arg]  # all of torch's take it


@pytest.fixture(name="labels")
def _labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels that torch makes."""
    found: list[str] = []

    class Counted(torch.autograd.profiler.record_function):
        def __init__(self, name: str, args: str | None = None) -> None:
            found.append(name)
            super().__init__(name, args)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", Counted)
    return found


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_the_step_is_that_of_the_optimiser(kind: type[Optimizer], labels: list[str]) -> None:
    (weights, optimizer), (same, other) = made(kind), made(kind)
    for _ in range(3):
        make_step(optimizer)
        assert not labels
        assert weights.requires_grad
        assert torch.is_grad_enabled()
    for _ in range(3):
        other.step()
    assert len(labels) == 3
    assert weights.tolist() == same.tolist() != torch.linspace(-1, 1, 5).tolist()


def test_a_profiler_sees_the_label() -> None:
    _, optimizer = made()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        make_step(optimizer)
    assert LABEL in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
        lambda optimizer, hook: optimizer.register_step_post_hook(hook),
        lambda optimizer, hook: register_optimizer_step_pre_hook(hook),
        lambda optimizer, hook: register_optimizer_step_post_hook(hook),
    ],
)
def test_every_hook_is_called(register: Callable[..., Any]) -> None:
    called = []
    _, optimizer = made()
    handle = register(optimizer, lambda *_: called.append(1))
    make_step(optimizer)
    handle.remove()
    make_step(optimizer)
    assert called == [1]


def test_a_step_that_someone_has_set_is_called() -> None:
    weights, optimizer = made()
    optimizer.step = lambda: weights.data.fill_(7)
    make_step(optimizer)
    assert weights.tolist() == [7.0] * 5


def test_a_class_whose_step_has_another_wrapper_is_called() -> None:
    called = []

    class Own(torch.optim.SGD):
        pass

    weights, optimizer = made(Own)
    inner = Own.step

    def step(self: Any) -> None:
        called.append(1)
        inner(self)

    Own.step = step  # type: ignore[assignment,method-assign]
    make_step(optimizer)
    assert called == [1]
    assert weights.tolist() != torch.linspace(-1, 1, 5).tolist()
