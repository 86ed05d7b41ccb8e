"""What an optimiser and its schedule keep belongs together: it is carried as one, or refused by name."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import carried_kinds
import numpy as np
import pytest
import torch
from carried_kinds import NOT_CARRIED, OUTSIDE, RIGHT
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR

from sparksgd.arithmetic.believed import NotBelieved, check_believed, only_classes_of
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.engines.trial.outside import watch_steps
from sparksgd.errors import ConfigError, ModelError
from sparksgd.solvers import carrying
from sparksgd.solvers.protocol import Message, SolverState
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.schedules import own_schedule
from sparksgd.solvers.synchronous import SynchronousSettings, SynchronousSolver
from sparksgd.solvers.torch_optimizers import another_optimizer
from sparksgd.training.encoding import as_plain, of_plain

STEPS = 12
PACKAGES = frozenset(("carried_kinds",))


def named(kind: type[Any]) -> str:
    return f"{kind.__module__}:{kind.__name__}"


def module() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def solver_of(
    optimizer: type[Any] | None = None, schedule: type[Any] | None = None, *, is_tried: bool = False
) -> SynchronousSolver:
    experiment = Experiment(
        optimizer=OptimizerConfig(
            name="SGD" if optimizer is None else named(optimizer), arguments={"lr": 0.05}
        ),
        schedule=ScheduleConfig() if schedule is None else ScheduleConfig(name=named(schedule)),
        num_shards=1,
        turns_per_epoch=1,
        total_turns=STEPS,
    )
    flat = FlatModule(module())
    return SynchronousSolver(flat, SynchronousSettings(), experiment, is_replica=is_tried)


def step(solver: SynchronousSolver, number: int) -> None:
    width = solver.flat.parameters.numel()
    solver.receive(
        Message(
            vectors={"gradient": np.sin(np.arange(width, dtype=np.float32) + number)},
            statistics=np.zeros(0, np.float32),
            counters=np.zeros(0, np.int64),
            loss=0.0,
            rows=1,
        )
    )


def bits(solver: SynchronousSolver) -> tuple[str, float]:
    (optimizer,) = solver.optimizers
    return solver.flat.parameters_sha256(), optimizer.lr


def travelled(state: SolverState) -> SolverState:
    """Return a state as another process gets it in a run."""
    found: SolverState = pickle.loads(pickle.dumps(state))
    return found


def saved(state: SolverState) -> SolverState:
    """Return a state as a checkpoint gives it back: the code that it names is believed."""
    rest = of_plain(as_plain(dict(state.rest)))
    for part in rest.values():
        if part and "attributes" in part:
            check_believed(part["attributes"])
    return SolverState(weights=state.weights, turns=state.turns, vectors={}, rest=rest)


def course(solver: SynchronousSolver, first: int = 0) -> list[tuple[str, float]]:
    found = []
    for number in range(first, STEPS):
        step(solver, number)
        found.append(bits(solver))
    return found


@pytest.fixture(autouse=True)
def believing() -> Iterator[None]:
    with only_classes_of(PACKAGES):
        yield


# Right: one graph


@pytest.mark.parametrize("by", [travelled, saved])
@pytest.mark.parametrize("kind", RIGHT)
def test_it_is_carried_as_one(kind: str, by: Callable[[SolverState], SolverState]) -> None:
    whole = course(solver_of(**RIGHT[kind]))
    assert len(set(whole)) == STEPS
    for stopped in (1, 5, 8):  # the next test goes through all
        first = solver_of(**RIGHT[kind], is_tried=True)
        for number in range(stopped):
            step(first, number)
        other = first.make_replica()(FlatModule(module()))
        other.load_state(by(first.state()))
        assert course(other, stopped) == whole[stopped:], stopped


@pytest.mark.parametrize("kind", RIGHT)
def test_it_is_carried_as_one_after_every_step(kind: str) -> None:
    one, found = solver_of(**RIGHT[kind], is_tried=True), []
    for number in range(STEPS):
        other = one.make_replica()(FlatModule(module()))
        other.load_state(saved(travelled(one.state())))
        step(other, number)
        found.append(bits(other))
        one = other
    assert found == course(solver_of(**RIGHT[kind], is_tried=True))


def test_one_that_takes_over_may_have_made_other_steps() -> None:
    """As a worker's own, when a segment is tried again."""
    whole = course(solver_of(carried_kinds.TwoClosures))
    one, other = solver_of(carried_kinds.TwoClosures), solver_of(carried_kinds.TwoClosures)
    course(other)
    for number in range(4):
        step(one, number)
    other.load_state(saved(one.state()))
    assert course(other, 4) == whole[4:]


# Refused


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_is_outside_is_refused_when_it_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, words = OUTSIDE[kind]
    monkeypatch.setattr(carried_kinds, "REGISTRY", {})
    monkeypatch.setattr(carried_kinds, "NUMBERS", itertools.count())
    arguments: dict[str, Any] = {"seen": [0]} if optimizer is carried_kinds.ItsArgument else {}
    experiment = OptimizerConfig(name=named(optimizer), arguments={"lr": 0.05} | arguments)
    flat = FlatModule(module())
    flat.trainable[0].notes = [0]  # type: ignore[attr-defined]  # as a module might
    held = another_optimizer(flat, experiment)
    watch_steps([held])
    with pytest.raises(ModelError, match=words):
        held.step(held.new_gradient().fill_(1), None, 0)


@pytest.mark.parametrize("kind", NOT_CARRIED)
def test_what_cannot_be_made_again_is_refused_by_name(kind: str) -> None:
    optimizer, words = NOT_CARRIED[kind]
    one = solver_of(optimizer, is_tried=True)
    for number in range(STEPS):
        step(one, number)
    with pytest.raises(ConfigError, match=rf"{optimizer.__name__} keeps an attribute .*{words}"):
        one.state()


def test_code_that_is_not_there_when_it_is_made_anew_is_named() -> None:
    state = solver_of(carried_kinds.ClosesOverAnObject).state()
    other = solver_of(carried_kinds.CountInAClosure)
    with pytest.raises(pickle.UnpicklingError, match=r"keeps carried_kinds.ClosesOverAnObject.keep.*lambda"):
        other.load_state(state)


def test_a_function_in_the_configuration_is_the_user_s_own_code() -> None:
    assert own_schedule(ScheduleConfig(name="LambdaLR", arguments={"lr_lambda": lambda _: 1.0}))
    assert own_schedule(
        ScheduleConfig(name=named(LambdaLR), arguments={"lr_lambda": [carried_kinds.Count()]})
    )
    arguments = {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 2}
    assert not own_schedule(ScheduleConfig(name="CyclicLR", arguments=arguments))
    assert own_schedule(ScheduleConfig(name=CyclicLR.__name__, arguments=arguments | {"scale_fn": abs}))


# Nobody gets in


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8c\x0dcarried_kinds\x8c\x07plainly\x93.",
        b"\x80\x04\x8c\x0dcarried_kinds\x8c\x0bLate.number\x93.",
    ],
)
def test_no_function_is_found_by_name(content: bytes) -> None:
    one = solver_of(carried_kinds.ItsMethod)
    state = one.state()
    forged = SolverState(
        weights=state.weights,
        turns=0,
        vectors={},
        rest={"optimizer": {"attributes": content}, "schedule": None},
    )
    with pytest.raises(NotBelieved):
        one.load_state(forged)


def test_a_function_of_a_file_is_not_changed_by_what_is_loaded() -> None:
    with pytest.raises(AssertionError):
        carrying._fill_function(carried_kinds.plainly, (None, None, {"x": 1}))
    with pytest.raises(pickle.UnpicklingError, match="__class__ of a list is not carried"):
        carrying._method([], "__class__")
