"""Schedules of the user's own go on wherever their solver does, or are refused by name."""

from __future__ import annotations

import pickle
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from own_optimizers import STEPS, RebindsGrad, TwoGroups, arrived, named, solver_of
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from watched_trainings import configured, net, trained

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config, OptimizerConfig, ScheduleConfig
from sparksgd.data.local_files import ParquetRows
from sparksgd.errors import ConfigError
from sparksgd.solvers.schedules import Rates


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
