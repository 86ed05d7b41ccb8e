"""Attributes of optimisers and schedules are carried; what they move outside is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moving_objects import LATE, moving
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from two_workers import train_here

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.engines.trial.outside import watch_steps
from sparksgd.errors import ModelError
from sparksgd.solvers.torch_optimizers import another_optimizer
from tests.engines.trials import Around, refused

GLOBAL: Any = None


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda kind: monkeypatch.setitem(globals(), "GLOBAL", moving(kind))


class Moves(torch.optim.SGD):
    kind = ""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        if GLOBAL.number() > LATE:
            self.param_groups[0]["lr"] = 0.0


class Moved(LRScheduler):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [base * (1 + (GLOBAL.number() > LATE)) for base in self.base_lrs]


class CountsOnItsClass(torch.optim.SGD):
    count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        CountsOnItsClass.count += 1


def named(kind: type) -> OptimizerConfig:
    return OptimizerConfig(name=f"{__name__}:{kind.__name__}", arguments={"lr": 0.1})


@pytest.mark.parametrize("kind", ["an object", "itertools.count", "a bytearray", "a cache of a function"])
def test_what_an_optimiser_or_a_schedule_moves_outside_is_refused(kept: Any, kind: str) -> None:
    kept(kind)
    refused(Around(), "changes as the optimiser or the schedule makes a step", optimizer=named(Moves))
    kept(kind)
    schedule = ScheduleConfig(name=f"{__name__}:Moved")
    refused(Around(), "changes as the optimiser or the schedule makes a step", schedule=schedule)


def test_so_is_what_its_class_holds() -> None:
    refused(
        Around(), "CountsOnItsClass", "keep it in an attribute of self", optimizer=named(CountsOnItsClass)
    )


class MovesLate(torch.optim.SGD):
    """It keeps its own count, and moves what is outside from the tenth step on."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps > 10:
            GLOBAL.number()


class MovedLate(LRScheduler):
    def get_lr(self) -> list[float]:  # type: ignore[override]
        if self.last_epoch > 10:
            GLOBAL.number()
        return list(self.base_lrs)


def test_so_is_what_they_move_after_some_steps_only(kept: Any) -> None:
    words = "GLOBAL changes as the optimiser or the schedule makes a step"
    kept("an object")
    refused(Around(), words, optimizer=named(MovesLate))
    kept("an object")
    refused(Around(), words, schedule=ScheduleConfig(name=f"{__name__}:MovedLate"))


class MovesVeryLate(torch.optim.SGD):
    """The trial does not see it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps == 70:
            GLOBAL.number()


def test_what_one_moves_after_the_trial_is_refused_at_that_step(kept: Any, tmp_path: Path) -> None:
    kept("an object")
    optimizer = {"name": f"{__name__}:MovesVeryLate", "lr": 0.01}
    with pytest.raises(ModelError, match="GLOBAL changes as the optimiser or the schedule makes a step"):
        train_here(tmp_path, module=nn.Linear(4, 1), optimizer=optimizer, train={"epochs": 20})


def test_what_others_move_between_its_steps_is_their_business(kept: Any) -> None:
    kept("an object")
    optimizer = another_optimizer(FlatModule(nn.Linear(4, 1)), named(MovesVeryLate))
    watch_steps([optimizer])
    for step in range(69):
        GLOBAL.number()
        optimizer.step(optimizer.new_gradient().fill_(1), None, step)
    with pytest.raises(ModelError, match="GLOBAL changes as the optimiser or the schedule makes a step"):
        optimizer.step(optimizer.new_gradient().fill_(1), None, 69)


class ByModule(LRScheduler):
    def get_lr(self) -> list[float]:  # type: ignore[override]
        if self.last_epoch < LATE:
            return list(self.base_lrs)
        return [base / float(GLOBAL.inner.weight.norm()) for base in self.base_lrs]


def test_a_schedule_that_refers_to_the_caller_s_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Around()
    monkeypatch.setitem(globals(), "GLOBAL", module)
    refused(module, "reach parameters by param_groups", schedule=ScheduleConfig(name=f"{__name__}:ByModule"))
