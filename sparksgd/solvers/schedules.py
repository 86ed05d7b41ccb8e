"""torch's schedules for all rules: making them, trying them, moving them.

A schedule of the user's own is tried, too: what it sets must follow from its attributes and the run's seed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from sparksgd.arithmetic.flat import FlatParameters
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.errors import ConfigError
from sparksgd.imports import users_code
from sparksgd.solvers.carrying import CannotCarry, own_attributes, packed, replace_attributes, unpacked
from sparksgd.solvers.flat_optimizer import is_of_torch, seeded
from sparksgd.solvers.protocol import Settings
from sparksgd.solvers.torch_optimizers import another_optimizer, class_named, refusing

__all__ = ["Rates", "Schedule", "make_schedule", "remarks_on"]


class Schedule:
    """A schedule, and the optimiser that it moves.

    Args:
        schedule: of `optimizer`.
        optimizer: whose groups it changes.
        seed: of the run.
    """

    def __init__(self, schedule: lr_scheduler.LRScheduler, optimizer: Optimizer, seed: int) -> None:
        self._schedule, self._optimizer, self._seed = schedule, optimizer, seed

    @property
    def limit(self) -> int | None:
        """Return how often it can be moved; None: without end."""
        return getattr(self._schedule, "total_steps", None)

    def move(self, turn: int) -> None:
        """Move it once.

        Args:
            turn: how many turns have passed; a schedule of the user's own draws its numbers by it.

        Raises:
            UserCodeError: it raised.
        """
        with users_code("the schedule"), seeded(type(self._schedule), seed32(self._seed, "schedule", turn)):
            self._schedule.step()

    def state(self) -> dict[str, Any]:
        """Return where it is; a view.

        Raises:
            ConfigError: an attribute cannot be copied.
        """
        if is_of_torch(type(self._schedule)):
            return self._schedule.state_dict()
        try:
            return {"attributes": packed(own_attributes(self._schedule), self._anchors)}
        except CannotCarry as error:
            raise ConfigError(
                f"the schedule {type(self._schedule).__name__} keeps an attribute that cannot be copied to "
                f"another process: {error}: make it of numbers and containers"
            ) from error

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another one; it is copied."""
        if is_of_torch(type(self._schedule)):
            self._schedule.load_state_dict(copy.deepcopy(dict(state)))
            return
        before = own_attributes(self._schedule)
        replace_attributes(self._schedule, before, unpacked(state["attributes"], before, self._anchors))

    @property
    def _anchors(self) -> list[object]:
        groups = self._optimizer.param_groups
        return [self._schedule, self._optimizer, groups, *groups]


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, moves: int, seed: int = 0) -> Schedule | None:
    """Return the schedule that a configuration names, or None; it must last for this many moves.

    Args:
        optimizer: that it moves.
        config: which class, and its arguments.
        moves: how often it will be moved.
        seed: of the run.

    Raises:
        ConfigError: no schedule has that name, it does not take these arguments, it ends too early, or it
            cannot be carried to another process.
    """
    if config.name is None:
        if config.arguments:
            raise ConfigError(
                f"schedule.{next(iter(config.arguments))} is set, but schedule.name is not: name one, or "
                f"unset {' and '.join(f'schedule.{key}' for key in config.arguments)} (--set KEY=none)"
            )
        return None
    kind = class_named("schedule.name", config.name, lr_scheduler, lr_scheduler.LRScheduler)
    if issubclass(kind, lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(
            "schedule.name is 'ReduceLROnPlateau', but the rate must follow from the step alone: "
            "use CosineAnnealingLR, OneCycleLR or another"
        )
    with refusing("schedule", config.name, kind, config.arguments):
        expected = _rates_of(optimizer, kind, config, moves=False)
        for moved in () if is_of_torch(kind) else (False, True):
            again = _rates_of(optimizer, kind, config, moves=moved)
            if again != expected:
                raise ConfigError(
                    f"schedule.name is {config.name!r}, but two that are made alike set {expected} and "
                    f"{again} in the first turns: let it keep everything in its attributes, and draw from "
                    f"torch's, numpy's or random's global generator alone, which are seeded"
                )
        made = _made(optimizer, kind, config, seed)
    if made.limit is not None and made.limit < moves:
        raise ConfigError(
            f"schedule.total_steps is {made.limit}, but the run moves the schedule {moves} times: "
            f"set schedule.total_steps={moves}"
        )
    return made


_TRIED_MOVES = 4
_STATE_AFTER = 2


def _made(optimizer: Optimizer, kind: Any, config: ScheduleConfig, seed: int) -> Schedule:
    with seeded(kind, seed32(seed, "schedule")):
        return Schedule(kind(optimizer, **config.arguments), optimizer, seed)


def _rates_of(optimizer: Optimizer, kind: Any, config: ScheduleConfig, *, moves: bool) -> list[float]:
    """Return the first rates of a trial; if it moves, another schedule takes over in the middle."""
    found: list[float] = []
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}

    def made() -> tuple[Optimizer, Schedule]:
        trial = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        trial.param_groups[0].update(copy.deepcopy(group) | {"momentum": 0.9, "nesterov": False})
        return trial, _made(trial, kind, config, 0)

    trial, schedule = made()
    for turn in range(1 if is_of_torch(kind) else _TRIED_MOVES):
        if moves and turn == _STATE_AFTER:
            state, values = schedule.state(), dict(trial.param_groups[0])
            trial, schedule = made()
            trial.param_groups[0].update({name: v for name, v in values.items() if name != "params"})
            schedule.load_state(state)
        trial.step()
        schedule.move(turn + 1)
        found.append(float(trial.param_groups[0]["lr"]))
    return found


def remarks_on(schedule: Schedule | None, moves: int) -> list[str]:
    """Return a remark if the run ends before the schedule does."""
    limit = None if schedule is None else schedule.limit
    if limit is None or not 0 < moves < limit:
        return []
    return [
        f"schedule.total_steps is {limit}, but the run moves the schedule {moves} times and ends before its "
        f"end: set schedule.total_steps={moves}"
    ]


class Rates:
    """What a schedule sets in each turn; the schedule moves a stand-in optimiser of a few elements.

    Args:
        optimizer: which class of torch.optim, and its arguments; it was tried before.
        schedule: which class of torch.optim.lr_scheduler, and its arguments.
        turns_per_move: how many turns pass between two moves of the schedule.
        moves: how often it will be moved.
        seed: of the run.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        turns_per_move: int,
        moves: int,
        seed: int = 0,
    ) -> None:
        stand_in = FlatParameters([torch.Size([2, 2])], torch.float32)
        self._optimizer = another_optimizer(stand_in, optimizer, seed)
        self.is_elementwise = self._optimizer.is_elementwise
        self._unscheduled = dict(self._group)
        self._schedule = make_schedule(self._optimizer.optimizer, schedule, moves, seed)
        if self._schedule is not None:
            scheduled = dict(self._group)
            gradient = self._optimizer.new_gradient().zero_()
            self._optimizer.step(
                gradient, None, seed32(seed, "schedule")
            )  # else torch warns that the schedule moved first
            self._group.update(scheduled)
        self._moved: set[str] = set()
        self._note_moved()
        self._turns_per_move = turns_per_move
        self._turn = 0
        self.remarks = remarks_on(self._schedule, moves)

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.group

    @property
    def lr(self) -> float:
        """Return the learning rate of the next turn."""
        return float(self._group["lr"])

    @property
    def now(self) -> Settings:
        """What the schedule has set for the turn that is next: nothing without one."""
        return {name: self._group[name] for name in sorted(self._moved)}

    def move(self, turns: int) -> None:
        """Let this many turns pass."""
        if self._schedule is None:
            self._turn += turns
            return
        for _ in range(turns):
            self._turn += 1
            if self._turn % self._turns_per_move == 0:
                self._schedule.move(self._turn)
                self._note_moved()

    def ahead(self, turns: int) -> tuple[Settings, ...]:
        """Return what will be set for each of the next turns."""
        if self._schedule is None:
            return (self.now,) * turns
        before, found = copy.deepcopy(self.state()), []
        for _ in range(turns):
            found.append(self.now)
            self.move(1)
        self.load_state(before)
        return tuple(found)

    def _note_moved(self) -> None:
        """Note which of the optimiser's keys the schedule changes."""
        before, now = self._unscheduled, self._group
        self._moved |= {name for name, v in before.items() if name != "params" and now[name] != v}

    def state(self) -> dict[str, Any]:
        """Return where it is; a view."""
        group = {name: v for name, v in self._group.items() if name != "params"}
        schedule = None if self._schedule is None else self._schedule.state()
        return {"turn": self._turn, "group": group, "moved": sorted(self._moved), "schedule": schedule}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another one."""
        self._turn, self._moved = state["turn"], set(state["moved"])
        self._group.update(copy.deepcopy(dict(state["group"])))
        if self._schedule is not None:
            self._schedule.load_state(state["schedule"])
