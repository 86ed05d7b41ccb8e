"""Functions of torch.jit give the bits of what is written, however often a process has called them before."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from two_workers import train_here

from sparksgd.arithmetic.scripted import as_written, forget_optimised
from sparksgd.engines.protocol import StepReport
from sparksgd.training.state import Observer, Training

Function = Callable[[torch.Tensor], torch.Tensor]


def gate(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x) * torch.sigmoid(x)
    return torch.sin(y) + y.exp() / (1 + y * y)


scripted = torch.jit.script(gate)
traced = torch.jit.trace(gate, torch.ones(3, 8))
unit = torch.jit.CompilationUnit(
    """
def gate(x):
    y = torch.tanh(x) * torch.sigmoid(x)
    return torch.sin(y) + y.exp() / (1 + y * y)
"""
)
of_a_text = unit.gate


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.gated(self.inner(x))).squeeze(1)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return gate(x)


class ByGlobal(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return scripted(x)


class Traced(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return traced(x)


class OfText(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return of_a_text(x)


class OfUnit(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return unit.gate(x)


def reloaded() -> torch.jit.ScriptModule:
    """A module with a compilation unit of its own."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(Gate(), torch.ones(3, 8)), stream)
    stream.seek(0)
    return torch.jit.load(stream)


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gate(x)


loaded_module = reloaded()
loaded = reloaded().forward


class OfMethod(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return loaded(x)


class OfLoadedModule(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return loaded_module(x)


class OfClass(Gated):
    function = staticmethod(unit.gate)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class InAThread(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(scripted(x)))
        thread.start()
        thread.join()
        return found[0]


class Optimised(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        with torch.jit.optimized_execution(True):
            return scripted(x)


class ByAttribute(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.gated = scripted


class InTheLoss(Gated):
    """As `Gated`; its loss is `scripted_loss`."""


def error(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return gate(output - label) + (output - label).square()


scripted_error = torch.jit.script(error)


def scripted_loss(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return scripted_error(output, label)


def warm(function: Callable[..., torch.Tensor], arguments: int = 1) -> None:
    """Call a function so often that torch optimises it."""
    for _ in range(4):
        given = [torch.randn(12, 8, requires_grad=True) for _ in range(arguments)]
        function(*given).sum().backward()


def warm_all() -> None:
    """Let torch optimise all functions of this file."""
    for function in (
        scripted,
        traced,
        of_a_text,
        lambda x: unit.gate(x),
        loaded,
        loaded_module,
        OfClass.function,
    ):
        warm(function)
    warm(scripted_error, 2)


@pytest.fixture(autouse=True)
def cold() -> Any:
    yield
    forget_optimised([traced, of_a_text, unit, loaded, loaded_module])


def bits(folder: Path, module: nn.Module, loss: str = "error", **more: Any) -> object:
    run = train_here(
        folder,
        module=module,
        tested=True,
        loss={"name": f"{__name__}:{loss}"},
        **more,
    )
    return run.flat.parameters_sha256(), [evaluation.loss for evaluation in run.evaluations]


def test_the_optimiser_gives_other_bits() -> None:
    """Otherwise the tests below would show nothing."""
    x = torch.linspace(-3, 3, 96).view(12, 8)

    def gradient(function: Function) -> torch.Tensor:
        given = x.clone().requires_grad_()
        function(given).square().sum().backward()
        assert given.grad is not None
        return given.grad

    with as_written():
        cold = gradient(scripted)
    assert torch.equal(cold, gradient(gate))
    warm(scripted)
    assert not torch.equal(cold, gradient(scripted))
    forget_optimised()
    with as_written():
        assert torch.equal(cold, gradient(scripted))


KINDS = [
    ByGlobal, ByAttribute, Traced, OfText, OfUnit, OfMethod, OfLoadedModule, OfClass, InAThread, Optimised,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_was_optimised_before_the_run(tmp_path: Path, kind: type[Gated]) -> None:
    right = bits(tmp_path / "plain", Gated())
    warm_all()
    assert bits(tmp_path / "scripted", kind()) == right


def test_a_loss_that_was_optimised_before_the_run(tmp_path: Path) -> None:
    right = bits(tmp_path / "plain", Gated())
    warm_all()
    assert bits(tmp_path / "scripted", InTheLoss(), loss="scripted_loss") == right


class Calling(Observer):
    """Calls the same functions between two steps."""

    def stepped(self, training: Training, report: StepReport) -> None:
        warm_all()


def test_an_observer_that_calls_the_function(tmp_path: Path) -> None:
    right = bits(tmp_path / "plain", Gated())
    assert bits(tmp_path / "scripted", ByGlobal(), observers=[Calling()]) == right


def test_a_function_that_nobody_names_is_forgotten(tmp_path: Path) -> None:
    """As one of an installed package, or of an optimiser."""
    right, hidden = bits(tmp_path / "plain", Gated()), reloaded()
    HIDDEN.append(weakref.ref(hidden))
    warm(hidden)
    assert bits(tmp_path / "scripted", Hidden()) == right


HIDDEN: list[Any] = []


class Hidden(Gated):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return HIDDEN[-1]()(x)


def test_the_switch_is_as_before(tmp_path: Path) -> None:
    for setting in (True, False):
        with torch.jit.optimized_execution(setting):
            bits(tmp_path / str(setting), ByGlobal())
            assert torch._C._get_graph_executor_optimize() is setting


def test_a_process_with_another_executor_trains(tmp_path: Path) -> None:
    before = torch._C._jit_set_profiling_mode(False)
    try:
        function = torch.jit.script(simple)
        warm(function)
        bits(tmp_path, Gated())
    finally:
        torch._C._jit_set_profiling_mode(before)


def simple(x: torch.Tensor) -> torch.Tensor:
    return x * 2
