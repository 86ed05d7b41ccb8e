"""Synchronous SGD: every step uses gradients of the newest weights, of all shards, or of all but b.

    g_t = (sum over the rows that took part of the gradient of their loss) / rows
    theta_(t+1) = optimiser(theta_t, g_t)

With no backup workers that is one process taking all rows of the step as one mini-batch.  With b of
them the step is made of the first N = S - b shards that arrive; later ones are dropped.  The
optimiser and the schedule are torch's own.  Chen et al. 2016, "Revisiting Distributed Synchronous
SGD" (arXiv:1604.00981), algorithms 3 and 4.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from sparksgd.config import OptimizerConfig, ScheduleConfig, SolverConfig
from sparksgd.errors import ConfigError, UpdateNotFinite
from sparksgd.flat import FlatModule, FlatStrip, Weights
from sparksgd.imports import did_you_mean, resolve
from sparksgd.solvers.eager import keep_eager
from sparksgd.solvers.protocol import GradientSum, MakeReplica, Quorum, SolverState, StepOutcome
from sparksgd.users_code import users_code

__all__ = ["SendEverything", "SynchronousSolver"]

# Their rule for one element looks at no other: one vector of all parameters gives the bits of many
# tensors, and so do strips of it.  Measured for each by a test.
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)


class SendEverything:
    """The worker half of synchronous SGD: every gradient goes out as it is."""

    sends_as_it_is = True

    def outgoing(self, fresh: GradientSum) -> GradientSum:
        """Return the gradient."""
        return fresh


class SynchronousSolver:
    """Synchronous SGD with any torch optimiser and learning-rate schedule.

    Args:
        flat: the module, or a strip of it; its parameters are the solver's from here on.
        optimizer: which class of torch.optim, and its arguments.
        schedule: which class of torch.optim.lr_scheduler, and its arguments.
        solver: clipping, and backup workers.
        num_shards: S.
        steps_per_epoch: how often a schedule that moves by the epoch moves.
        total_steps: how many steps will be made; a schedule must reach that far.
        took_part: the shards of each step of an earlier run, to be made again; None: the first to arrive.
    """

    def __init__(
        self,
        flat: FlatModule | FlatStrip,
        *,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        solver: SolverConfig,
        num_shards: int,
        steps_per_epoch: int,
        total_steps: int,
        took_part: Sequence[frozenset[int]] | None = None,
    ) -> None:
        self.flat = flat
        self.step = 0
        self._make_replica = partial(
            SynchronousSolver,
            optimizer=optimizer,
            schedule=schedule,
            solver=solver,
            num_shards=num_shards,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )
        self._all = Quorum(shards=frozenset(range(num_shards)), enough=num_shards - solver.backup_workers)
        self._took_part = took_part
        self._clip_norm = solver.clip_norm
        self._optimizer = _optimizer(flat, optimizer)
        self.by_strips = type(self._optimizer) in _ELEMENTWISE and self._clip_norm is None
        self._steps_per_move = steps_per_epoch if schedule.interval == "epoch" else 1
        moves = total_steps // self._steps_per_move
        self._schedule = _schedule(self._optimizer, schedule, moves)
        self.remark = _remark(self._schedule, moves)
        self._current: Weights | None = None
        self._previous: Weights | None = None

    def worker_half(self) -> SendEverything:
        """Return the trivial worker half."""
        return SendEverything()

    def make_replica(self) -> MakeReplica:
        """Return what makes another of its kind, at step 0; it pickles."""
        return self._make_replica

    def state(self) -> SolverState:
        """Return what its next step depends on; the optimiser's arrays are views of its own."""
        optimizer = self._optimizer.state_dict()
        kept = {
            key: {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
            for key, values in optimizer["state"].items()
        }
        return SolverState(
            weights=self.weights(),
            optimizer=optimizer | {"state": kept},
            schedule=None if self._schedule is None else self._schedule.state_dict(),
        )

    def load_state(self, state: SolverState) -> None:
        """Go on from another's state, one step further or anywhere else."""
        before = self.weights() if state.weights.version == self.step + 1 else None
        kept = {
            key: {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}
            for key, values in state.optimizer["state"].items()
        }
        self._optimizer.load_state_dict(copy.deepcopy(state.optimizer | {"state": kept}))
        if self._schedule is not None:
            self._schedule.load_state_dict(copy.deepcopy(dict(state.schedule or {})))
        self.flat.load(state.weights)
        self.step = state.weights.version
        self._previous, self._current = before, None

    def weights(self) -> Weights:
        """Return a copy of the newest weights; the same object until the next step."""
        if self._current is None:
            self._current = self.flat.weights(self.step)
        return self._current

    def quorum(self) -> Quorum:
        """Return whose gradients the next step is made of: all but the backups, or those of the record."""
        if self._took_part is None:
            return self._all
        shards = self._took_part[self.step]
        return Quorum(shards=shards, enough=len(shards))

    def receive(self, arrived: GradientSum) -> StepOutcome:
        """Make one step of the mean gradient.

        Raises:
            UpdateNotFinite: the step would make a parameter NaN or infinite; the weights stay as before.
        """
        before = self.weights()
        gradient = self.flat.gradient
        torch.div(torch.from_numpy(arrived.gradient), arrived.rows, out=gradient)
        norm = None
        if self._clip_norm is not None:
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
            if norm > self._clip_norm:
                gradient.mul_(self._clip_norm / norm)
        lr = float(self._optimizer.param_groups[0]["lr"])
        with users_code("the optimiser"):
            self._optimizer.step()
        parameters = self.flat.parameters
        if not torch.isfinite(parameters.sum()) and not torch.isfinite(parameters).all():
            self.flat.load(before)
            self._previous = None
            raise UpdateNotFinite(
                f"step {self.step + 1} made a parameter infinite or NaN; lower optimizer.lr (it was "
                f"{lr:g}) or set solver.clip_norm"
            )
        self.flat.load_buffers(
            arrived.statistics / np.asarray(arrived.rows, arrived.statistics.dtype),
            arrived.counters,
        )
        self.step += 1
        if self._schedule is not None and self.step % self._steps_per_move == 0:
            with users_code("the schedule"):
                self._schedule.step()
        self._previous, self._current = before, None
        return StepOutcome(lr=lr, gradient_norm=norm)

    def step_back(self) -> None:
        """Return to the weights of the step before, the last ones whose loss was finite.

        For a run that ends here: the optimiser's own state stays as it is.
        """
        if self._previous is not None:
            self.flat.load(self._previous)
            self.step = self._previous.version
        self._current = self._previous = None


def _optimizer(flat: FlatModule | FlatStrip, config: OptimizerConfig) -> Optimizer:
    kind = _kind("optimizer.name", config.name, torch.optim, Optimizer)
    if config.arguments.get("fused"):
        raise ConfigError("optimizer.fused is true, but fused optimisers give other bits: leave it out")
    if issubclass(kind, torch.optim.LBFGS):
        raise ConfigError("optimizer.name is 'LBFGS', which evaluates a step many times: use another")
    keep_eager(kind)
    with _refusing("optimizer", config.name, kind, config.arguments):
        trial = nn.Parameter(torch.zeros(2, 2))
        trial.grad = torch.ones(2, 2)
        kind([trial], **config.arguments).step()
        parameters = [flat.whole] if kind in _ELEMENTWISE else flat.trainable
        made: Optimizer = kind(parameters, **config.arguments)
    return made


def _schedule(optimizer: Optimizer, config: ScheduleConfig, moves: int) -> lr_scheduler.LRScheduler | None:
    if config.name is None:
        if config.arguments:
            raise ConfigError(
                f"schedule.{next(iter(config.arguments))} is set, but schedule.name is not: name one, or "
                f"unset {' and '.join(f'schedule.{key}' for key in config.arguments)} (--set KEY=none)"
            )
        return None
    kind = _kind("schedule.name", config.name, lr_scheduler, lr_scheduler.LRScheduler)
    if issubclass(kind, lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(
            "schedule.name is 'ReduceLROnPlateau', but the rate must follow from the step alone: "
            "use CosineAnnealingLR, OneCycleLR or another"
        )
    keep_eager(torch.optim.SGD)
    with _refusing("schedule", config.name, kind, config.arguments):
        trial = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        moving = kind(trial, **config.arguments)
        trial.step()
        moving.step()
        made: lr_scheduler.LRScheduler = kind(optimizer, **config.arguments)
    limit = getattr(made, "total_steps", None)
    if limit is not None and limit < moves:
        raise ConfigError(
            f"schedule.total_steps is {limit}, but the run moves the schedule {moves} times: "
            f"set schedule.total_steps={moves}"
        )
    return made


def _remark(schedule: lr_scheduler.LRScheduler | None, moves: int) -> str | None:
    """Return what a person should know of a schedule that the run does not follow to its end."""
    limit = getattr(schedule, "total_steps", None)
    if limit is None or not 0 < moves < limit:
        return None
    return (
        f"schedule.total_steps is {limit}, but the run moves the schedule {moves} times and ends before its "
        f"end: set schedule.total_steps={moves}"
    )


def _kind(key: str, name: str, home: Any, base: type[Any]) -> Any:
    ours = {
        word: kind
        for word, kind in vars(home).items()
        if inspect.isclass(kind) and issubclass(kind, base) and kind is not base
    }
    kind = resolve(key, name, ours)
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise ConfigError(f"{key} is {name!r}, which is not a {base.__module__}.{base.__name__}")
    return kind


@contextmanager
def _refusing(section: str, name: str, kind: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn what torch says of arguments, when made or at the first step, into a ConfigError."""
    known = inspect.signature(kind).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for key in arguments:
        if key not in known and not takes_any:
            raise ConfigError(f"{section}.{key} is no argument of {name}{did_you_mean(key, list(known)[1:])}")
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{section}.name is {name!r}, which does not take {dict(arguments)}: "
            f"{type(error).__name__}: {error}"
        ) from error
