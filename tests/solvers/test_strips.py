"""A solver of strips, or one that took over another's state, makes the bits of one that never stopped."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.solvers import flat_optimizer
from sparksgd.solvers.protocol import Message, SolverState
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.synchronous import SynchronousSettings, SynchronousSolver

ROWS, STEPS = 7, 6
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}],
    "Adam": [{}, {"amsgrad": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
}
CASES = [
    (kind.__name__, arguments)
    for kind in flat_optimizer.ELEMENTWISE
    for arguments in ARGUMENTS.get(kind.__name__, [{}])
]


def module() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 17), nn.BatchNorm1d(17), nn.Linear(17, 5))


def solver_over(flat: FlatModule | FlatStrip, name: str, arguments: dict[str, Any]) -> SynchronousSolver:
    experiment = Experiment(
        optimizer=OptimizerConfig(name=name, arguments={"lr": 0.05} | arguments),
        schedule=ScheduleConfig(name="CosineAnnealingLR", arguments={"T_max": STEPS}),
        num_shards=1,
        turns_per_epoch=1,
        total_turns=STEPS,
    )
    return SynchronousSolver(flat, SynchronousSettings(), experiment)


def arrived(step: int, size: int) -> Message:
    source = np.random.default_rng(step)
    return Message(
        vectors={"gradient": source.standard_normal(size, np.float32) * np.float32(10.0 ** (step - 2))},
        statistics=source.random(34, np.float32),
        counters=np.array([step + 1], np.int64),
        loss=1.0,
        rows=ROWS,
    )


def part(whole: Message, strip: range) -> Message:
    return replace(whole, vectors={"gradient": whole.vectors["gradient"][strip.start : strip.stop]})


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_strips_make_the_bits_of_torchs_own_tensors(name: str, arguments: dict[str, Any]) -> None:
    plain, flat = module(), FlatModule(module())
    optimizer = getattr(torch.optim, name)(plain.parameters(), **({"lr": 0.05} | arguments))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    size = len(flat.parameters)
    strips = [balanced_range(rank, 3, size) for rank in range(3)]
    solvers = [solver_over(FlatStrip(flat, strip), name, arguments) for strip in strips]
    assert all(solver.by_strips for solver in solvers)
    for step in range(STEPS):
        whole = arrived(step, size)
        for solver, strip in zip(solvers, strips, strict=True):
            solver.receive(part(whole, strip))
        mean, start = torch.from_numpy(whole.vectors["gradient"]) / ROWS, 0
        for parameter in plain.parameters():
            parameter.grad = mean[start : start + parameter.numel()].view(parameter.shape).clone()
            start += parameter.numel()
        optimizer.step()
        schedule.step()
        expected = torch.cat([parameter.detach().reshape(-1) for parameter in plain.parameters()])
        assert flat.parameters.numpy().tobytes() == expected.numpy().tobytes(), step


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_state_may_be_cut_into_strips_and_joined_at_any_step(name: str, arguments: dict[str, Any]) -> None:
    steady, moving = (solver_over(FlatModule(module()), name, arguments) for _ in range(2))
    size = len(steady.flat.parameters)
    for step in range(STEPS):
        whole = arrived(step, size)
        outcome = steady.receive(whole)
        strips = [balanced_range(rank, 1 + step, size) for rank in range(1 + step)]  # other ones every time
        sent: SolverState = pickle.loads(pickle.dumps(moving.state()))
        states = []
        for strip in strips:
            flat = FlatModule(module())
            flat.load(sent.weights)
            worker = moving.make_replica()(FlatStrip(flat, strip))
            worker.load_state(sent.strip(strip))
            assert worker.receive(part(whole, strip)).lr == outcome.lr
            states.append(pickle.loads(pickle.dumps(worker.state())))
        moving.load_state(SolverState.joined(states))
        assert moving.version == steady.version == step + 1
        assert moving.flat.parameters.numpy().tobytes() == steady.flat.parameters.numpy().tobytes()
        assert moving.flat.weights(0).statistics.tobytes() == steady.flat.weights(0).statistics.tobytes()
        assert moving.flat.weights(0).counters.tolist() == [step + 1]


def test_a_solver_that_was_given_the_next_state_can_step_back() -> None:
    ahead, behind = (solver_over(FlatModule(module()), "SGD", {"momentum": 0.9}) for _ in range(2))
    size = len(ahead.flat.parameters)
    ahead.receive(arrived(0, size))
    behind.load_state(ahead.state())
    first = behind.flat.parameters.clone()
    ahead.receive(arrived(1, size))
    behind.load_state(ahead.state())
    behind.step_back()
    assert behind.version == 1
    assert torch.equal(behind.flat.parameters, first)


def test_a_replica_copies_no_parameters_because_it_undoes_no_step() -> None:
    solver, flat = solver_over(FlatModule(module()), "SGD", {}), FlatModule(module())
    strip = range(7, 101)
    replica = solver.make_replica()(FlatStrip(flat, strip))
    own = flat.parameters.numpy()[strip.start : strip.stop]
    for step in range(2):
        assert np.shares_memory(replica.state().weights.parameters, own)
        replica.receive(part(arrived(step, len(flat.parameters)), strip))
        assert replica.readout().version == step + 1
    assert not np.shares_memory(solver.readout().parameters, solver.flat.parameters.numpy())


class Normed(torch.optim.SGD):
    """An optimiser that looks at the whole: no strip knows its norm."""


@pytest.mark.parametrize(
    ("name", "clip_norm"), [("SGD", 1.0), ("test_strips:Normed", None), ("Adafactor", None)]
)
def test_who_looks_at_the_whole_is_not_cut(name: str, clip_norm: float | None) -> None:
    experiment = Experiment(
        optimizer=OptimizerConfig(name=name, arguments={"lr": 0.1}),
        schedule=ScheduleConfig(),
        num_shards=1,
        turns_per_epoch=1,
        total_turns=1,
    )
    solver = SynchronousSolver(FlatModule(module()), SynchronousSettings(clip_norm=clip_norm), experiment)
    assert not solver.by_strips
