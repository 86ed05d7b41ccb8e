"""Workers whose modules see the solver's writes without a copy make the bits of those that copy."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from company_of_workers import Company
from shard_jobs import Job
from torch import nn

from sparksgd.arithmetic import flat as flat_module
from sparksgd.arithmetic.flat import FlatModule, Weights
from sparksgd.arithmetic.mapped_twice import mapped_twice
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.data.shard import Descriptor
from sparksgd.engines.compute import Computer, Plan
from sparksgd.engines.replies import Reply
from sparksgd.peers.replica import Replica, Segment, SegmentAnswer
from sparksgd.solvers.local_sgd import LocalSGD, LocalSGDSettings
from sparksgd.solvers.protocol import RoundSolver, SolverState
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.synchronous import SynchronousSettings, SynchronousSolver

WORKERS, STEPS, TURNS = 2, 3, 12


class Net(nn.Module):
    """Two layers, of which the first is a convolution; forward does what a test is about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Conv2d(1, 20, 3)
        self.outer = nn.Linear(20, 60)
        self.table = nn.Parameter(torch.linspace(-1, 1, 60 * 40).view(60, 40))
        self.register_buffer("calls", torch.zeros(1))

    def change(self) -> None:
        """Change nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change()
        hidden = self.inner(x.view(-1, 1, 3, 3)).flatten(1).tanh()
        return (self.outer(hidden).tanh() @ self.table).sum(1) * 0.01


class Clamps(Net):
    def change(self) -> None:
        self.table.data.clamp_(-0.8, 0.8)
        self.inner.weight.data.clamp_(-0.2, 0.2)
        self.calls.add_(1)


class ClampsAll(Net):
    def change(self) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.6, 0.6)


class Rebinds(Net):
    def change(self) -> None:
        self.outer.weight.data = self.outer.weight.data * 0.99


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module, a rule, and whether its workers' memory is mapped twice."""

    module: Callable[[], nn.Module] = Net
    rule: Callable[..., RoundSolver] = SynchronousSolver
    settings: Any = field(default_factory=SynchronousSettings)
    optimizer: str = "SGD"
    arguments: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05, "momentum": 0.9})
    channels_last: bool = False
    overlaps: bool = False
    rows_per_backward: int | None = None
    is_mapped: bool = True


LOCAL = {"rule": LocalSGD, "settings": LocalSGDSettings(turns_per_round=2), "is_mapped": False}
POST_LOCAL = LocalSGDSettings(turns_per_round=2, synchronous_steps=2)
CASES = {
    "momentum": Case(),
    "Adam": Case(optimizer="Adam", arguments={"lr": 0.01}),
    "clamps": Case(module=Clamps),
    "clamps all": Case(module=ClampsAll),
    "rebinds": Case(module=Rebinds),
    "clamps, channels last": Case(module=Clamps, channels_last=True),
    "clamps, in chunks": Case(module=Clamps, rows_per_backward=3),
    "overlaps": Case(overlaps=True),
    "clips, so that each worker updates all": Case(
        module=Clamps, settings=SynchronousSettings(clip_norm=0.5), is_mapped=False
    ),
    "an optimiser of whole tensors": Case(
        module=Clamps, optimizer="Adafactor", arguments={"lr": 0.01}, is_mapped=False
    ),
    "an optimiser of the user's own": Case(
        optimizer="users_modules:NoisyLookahead", arguments={"lr": 0.01}, is_mapped=False
    ),
    "local SGD": Case(**LOCAL),
    "local SGD, clamps": Case(module=Clamps, **LOCAL),
    "local SGD after synchronous steps": Case(**{**LOCAL, "settings": POST_LOCAL}),
}


# What runs in the process of a worker

held: dict[str, Any] = {}
plain_map_twice = FlatModule.map_twice


def make(plan: Plan, *, maps: bool) -> None:
    """Make the process's worker; it may map its memory twice, however small, or must copy."""
    flat_module.mapped_twice = mapped_twice if maps else lambda _: None
    FlatModule.map_twice = partialmethod(plain_map_twice, least_bytes=0)
    held["computer"] = Computer(plan)
    held["replica"] = Replica(held["computer"])


def run(worker: int, table: list[Descriptor], asked: Segment, state: SolverState | None) -> SegmentAnswer:
    load = None if state is None else lambda: state
    return held["replica"].run(worker, [table[worker]], asked, load)


def evaluate(worker: int, table: list[Descriptor], weights: Weights) -> Reply:
    return held["computer"].evaluations(worker, [table[worker]], weights)


def look(worker: int, table: list[Descriptor]) -> tuple[bool, bool]:
    """Return whether the memory is mapped twice, and whether the module sees what the solver has."""
    flat = held["computer"].flat
    seen = b"".join(one.detach().numpy().tobytes() for one in flat.trainable)
    return flat.is_mapped, seen == flat.parameters.numpy().tobytes()


# What asks them


@pytest.fixture(name="processes", scope="module")
def _processes() -> Iterator[list[ProcessPoolExecutor]]:
    made = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(WORKERS)]
    yield made
    for one in made:
        one.shutdown()


class Workers:
    """Two workers of one shard each, and the driver's solver."""

    def __init__(self, processes: list[ProcessPoolExecutor], folder: Path, case: Case, *, maps: bool) -> None:
        drawn = np.random.default_rng(0)
        rows = [(tuple(drawn.standard_normal(9)), drawn.standard_normal()) for _ in range(8 * TURNS)]
        shards = [rows[: 4 * TURNS], rows[4 * TURNS :]]
        job = Job(folder, case.module(), shards, rows_per_step=8, rows_per_backward=case.rows_per_backward)
        experiment = Experiment(
            optimizer=OptimizerConfig(name=case.optimizer, arguments=case.arguments),
            schedule=ScheduleConfig(name=None, arguments={}),
            num_shards=WORKERS,
            turns_per_epoch=TURNS,
            total_turns=TURNS,
        )
        self.case, self.table, self._processes = case, job.table, processes
        self.solver = case.rule(FlatModule(case.module()), case.settings, experiment)
        plan = replace(job.plan, halves=self.solver.halves, channels_last=case.channels_last)
        for process in processes:
            process.submit(make, plan, maps=maps).result()
        self.rendezvous = Company(WORKERS).rendezvous

    def all(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Let all workers do something at once."""
        asked = [
            process.submit(work, worker, self.table, *arguments)
            for worker, process in enumerate(self._processes)
        ]
        return [one.result() for one in asked]

    def segment(self, state: SolverState | None) -> SolverState:
        """Make some steps; return the state after them, which is the driver's then."""
        asked = Segment(
            meeting=self.rendezvous.call(),
            version=self.solver.version,
            steps=STEPS,
            owned=[[0], [1]],
            by_strips=self.solver.by_strips,
            make_replica=self.solver.make_replica(),
            overlaps=self.case.overlaps,
        )
        answers = self.all(run, asked, state)
        for answer in answers:
            assert (answer.failure, answer.lacks_state) == (None, False)
        states = [one.state for one in sorted(answers, key=lambda one: one.rank) if one.state is not None]
        self.solver.load_state(SolverState.joined(states) if self.solver.by_strips else states[0])
        return self.solver.state()

    def loss(self) -> float:
        one, other = self.all(evaluate, self.solver.readout())
        one += other
        assert one.failure is None
        return one.total().loss


def contents(state: SolverState) -> tuple[Any, ...]:
    weights = state.weights
    return (
        weights.parameters.tobytes(),
        {name: words.tobytes() for name, words in weights.constants.items()},
        {name: vector.tobytes() for name, vector in state.vectors.items()},
    )


SLOW = ("clamps all", "momentum", "local SGD after synchronous steps")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name in SLOW else ()) for name in CASES]
)
def test_what_is_trained_is_the_same_with_and_without_a_copy(
    tmp_path: Path, processes: list[ProcessPoolExecutor], name: str
) -> None:
    case = CASES[name]

    def course(*, maps: bool) -> list[Any]:
        """Return what a short training makes, whose first segment is made twice."""
        folder = tmp_path / f"{maps}"
        folder.mkdir()
        workers = Workers(processes, folder, case, maps=maps)
        try:
            start = pickle.dumps(workers.solver.state())
            found: list[Any] = [workers.loss(), contents(workers.segment(pickle.loads(start)))]
            found += [workers.loss(), contents(workers.segment(None)), workers.loss()]
            looks = workers.all(look)
            assert [is_mapped for is_mapped, _ in looks] == [maps and case.is_mapped] * WORKERS
            if case.rule is not LocalSGD:  # whose workers have models of their own
                assert [is_seen for _, is_seen in looks] == [True] * WORKERS
            workers.solver.load_state(pickle.loads(start))
            again = contents(workers.segment(pickle.loads(start)))
            assert again == found[1] != found[3]
            return found
        finally:
            workers.rendezvous.close()

    assert course(maps=True) == course(maps=False)
