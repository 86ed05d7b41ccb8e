"""Optimisers of users' own that several files of tests take, and solvers that have one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from watched_trainings import net

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.solvers.protocol import Message
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.synchronous import SynchronousSettings, SynchronousSolver

STEPS = 6


class RebindsGrad(torch.optim.SGD):
    """p.grad becomes a new tensor."""

    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad.sign() * 0.1
        super().step()


class TwoGroups(torch.optim.SGD):
    """Matrices decay, vectors do not."""

    def __init__(self, params: Any, lr: float) -> None:
        params = list(params)
        matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.5}
        super().__init__([matrices, {"params": [p for p in params if p.ndim < 2], "lr": lr / 2}], lr=lr)


def named(kind: type) -> dict[str, Any]:
    return {"name": f"{kind.__module__}:{kind.__name__}", "lr": 0.03}


def config_of(kind: type) -> OptimizerConfig:
    return OptimizerConfig(name=f"{kind.__module__}:{kind.__name__}", arguments={"lr": 0.03})


def solver_of(optimizer: Any, schedule: ScheduleConfig | None = None) -> SynchronousSolver:
    experiment = Experiment(
        optimizer=config_of(optimizer),
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
