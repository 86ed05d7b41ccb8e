"""Optimisers of the user's own do what they do in plain torch, wherever they go on."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from own_optimizers import STEPS, RebindsGrad, TwoGroups, arrived, named, solver_of
from torch import nn
from watched_trainings import configured, net, steps_of_torch, trained

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import OptimizerConfig
from sparksgd.data.local_files import ParquetRows
from sparksgd.errors import UpdateNotFinite
from sparksgd.solvers.torch_optimizers import another_optimizer, make_optimizer


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


GOOD = [
    RebindsData, SwapsData, RebindsGrad, ClearsGrads, KeepsGrads, Lookahead, SharesMemory, OddStates,
    Langevin, OwnGenerator, TwoGroups,
]  # fmt: skip


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
