"""torch's schedules for all rules: making them, trying them, moving them.

A schedule of the user's own may look at its optimiser's parameters, gradients and state, and change them.  So
its optimiser holds the parameters in their shapes, and the schedule moves while the step's gradients stand.
It is tried with its optimiser: what it does must follow from these, its attributes and the run's seed.  Where
shards make turns of their own, no such schedule could be right, and it finds no parameters in the groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from sparksgd.arithmetic.flat import FlatModule, FlatParameters, FlatStrip
from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.seeds import seed32
from sparksgd.arithmetic.settings import without_autocast
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.errors import ConfigError
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.solvers.carrying import CannotCarry, Carrier, holds_code
from sparksgd.solvers.flat_optimizer import FlatOptimizer, in_shapes, is_of_torch
from sparksgd.solvers.protocol import Settings
from sparksgd.solvers.rules import Experiment
from sparksgd.solvers.torch_optimizers import (
    Tried,
    another_optimizer,
    class_named,
    in_plain_torch,
    own_optimizer,
    refuse_another_course,
    refusing,
    small,
)

__all__ = ["Rates", "Schedule", "make_schedule", "own_schedule", "remarks_on"]


class Schedule:
    """A schedule, and the optimiser that it moves.

    Args:
        schedule: of `optimizer`.
        optimizer: whose groups it changes.
        seed: of the run.
        held: what holds the optimiser, where the schedule may look at the parameters; it carries it then.
        arguments: that it was made with.
        is_own: whether it runs code of the user's.
        blind: whether it may look at no parameter.
        metric: which number of an evaluation moves it; None: turns move it.
    """

    def __init__(
        self,
        schedule: lr_scheduler.LRScheduler,
        optimizer: Optimizer,
        seed: int,
        held: FlatOptimizer | None,
        arguments: Mapping[str, Any],
        *,
        is_own: bool,
        blind: bool,
        metric: str | None,
    ) -> None:
        self._metric = metric
        self._schedule, self._optimizer, self._seed, self._held = schedule, optimizer, seed, held
        self._is_own, self._blind = is_own, blind
        self._carrier = Carrier()
        if held is not None:
            held.add(schedule, arguments)
        elif is_own:
            self._carrier.add(schedule)

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
            ConfigError: it is blind, but looks at a parameter.
        """
        if self._metric is not None:
            return
        seed, blind = seed32(self._seed, "schedule", turn), self._blind
        with (
            users_torch_code("the schedule"),
            _seeded(seed, self._is_own),
            _sight(self._optimizer, blind),
            without_autocast(),
        ):
            self._schedule.step()

    def evaluated(self, loss: float, accuracy: float | None) -> bool:
        """Move it by an evaluation, if evaluations move it; return whether they do.

        Args:
            loss: the mean loss.
            accuracy: the share of right classes; None where there are no classes.
        """
        if self._metric is None:
            return False
        judged = loss if self._metric == "loss" or math.isnan(loss) else accuracy
        with users_torch_code("the schedule"):
            self._schedule.step(judged)  # type: ignore[arg-type]  # as `ReduceLROnPlateau` takes it
        return True

    def state(self) -> dict[str, Any]:
        """Return where it is, beside what its optimiser carries; a view.

        Raises:
            ConfigError: an attribute cannot be copied.
        """
        if not self._is_own:
            return self._schedule.state_dict()
        if self._held is not None:
            return {}
        try:
            return {"attributes": self._carrier.packed(self._anchors)}
        except CannotCarry as error:
            raise ConfigError(
                f"the schedule {type(self._schedule).__name__} keeps an attribute that cannot be copied to "
                f"another process: {error}: make it of numbers and containers"
            ) from error

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another one; it is copied."""
        if not self._is_own:
            self._schedule.load_state_dict(copy.deepcopy(dict(state)))
        elif self._held is None:
            self._carrier.unpack(state["attributes"], self._anchors)

    @property
    def _anchors(self) -> list[object]:
        groups = self._optimizer.param_groups
        return [self._schedule, self._optimizer, self._optimizer.state, groups, *groups]


def _seeded(seed: int, is_own: bool) -> AbstractContextManager[None]:
    return generators_seeded(seed) if is_own else nullcontext()


def own_schedule(config: ScheduleConfig) -> bool:
    """Return whether a schedule runs code of the user's, which may look at parameters and gradients.

    Raises:
        ConfigError: no schedule has that name, or it does not take these arguments.
    """
    if config.name is None or not _is_own(kind := _kind(config.name), config):
        return False
    with refusing("schedule", config.name, kind, config.arguments):
        return True


def _is_own(kind: type[Any], config: ScheduleConfig) -> bool:
    return not is_of_torch(kind) or holds_code(config.arguments)


_EXAMPLE = (
    "class WarmUp(torch.optim.lr_scheduler.LambdaLR): def __init__(self, optimizer, steps): "
    "super().__init__(optimizer, lambda step: min(1.0, (step + 1) / steps))"
)


def _kind(name: str) -> Any:
    return class_named("schedule.name", name, lr_scheduler, lr_scheduler.LRScheduler, _EXAMPLE)


def make_schedule(
    optimizer: FlatOptimizer,
    config: ScheduleConfig,
    moves: int,
    seed: int = 0,
    *,
    is_tried: bool = False,
    blind: bool = False,
) -> Schedule | None:
    """Return the schedule that a configuration names, or None; it must last for this many moves.

    Args:
        optimizer: that it moves; one that holds the parameters in their shapes, if it is an `own_schedule`.
        config: which class, and its arguments.
        moves: how often it will be moved.
        seed: of the run.
        is_tried: whether this schedule was tried before.
        blind: whether the optimiser only stands in for others, so that the schedule must look at no
            parameter, and change nothing but keys of the groups.

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
    kind = _kind(config.name)
    if issubclass(kind, lr_scheduler.ReduceLROnPlateau):
        if config.metric is None:
            raise ConfigError(
                f"schedule.name is {config.name!r}, but of the schedules that evaluations move only torch's "
                f'own is supported: write "ReduceLROnPlateau"'
            )
        if config.interval == "epoch":
            raise ConfigError(
                "schedule.interval is 'epoch', but evaluations move ReduceLROnPlateau: leave it out; "
                "train.eval_every says how often"
            )
        if blind:
            raise ConfigError(
                "schedule.name is 'ReduceLROnPlateau', but where shards make turns of their own the rate "
                "must follow from the turn alone: use CosineAnnealingLR or another, or solver.name = "
                '"synchronous"'
            )
    with refusing("schedule", config.name, kind, config.arguments):
        if not is_tried:
            _try_schedule(optimizer, kind, config, blind=blind)
        held = optimizer if _is_own(kind, config) else None
        made = _made(optimizer.optimizer, kind, config, seed, held, blind=blind)
    if made.limit is not None and made.limit < moves:
        raise ConfigError(
            f"schedule.total_steps is {made.limit}, but the run moves the schedule {moves} times: "
            f"set schedule.total_steps={moves}"
        )
    return made


def _made(
    optimizer: Optimizer,
    kind: Any,
    config: ScheduleConfig,
    seed: int,
    held: FlatOptimizer | None = None,
    *,
    blind: bool,
) -> Schedule:
    is_own = _is_own(kind, config)
    blind = blind and is_own
    held = None if blind else held
    shaped = nullcontext() if held is None else in_shapes(held.parameters, f"the schedule {kind.__name__}")
    with _seeded(seed32(seed, "schedule"), is_own), shaped, _sight(optimizer, blind):
        made = kind(optimizer, **config.arguments)
        return Schedule(
            made, optimizer, seed, held, config.arguments,
            is_own=is_own, blind=blind, metric=config.metric,
        )  # fmt: skip


def _try_schedule(optimizer: FlatOptimizer, kind: Any, config: ScheduleConfig, *, blind: bool) -> None:
    """Try a schedule with an optimiser like this one.

    Raises:
        ConfigError: it cannot be held or carried.
    """
    if not _is_own(kind, config):
        groups = optimizer.optimizer.param_groups
        alike = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in groups]
        trial = torch.optim.SGD(alike, lr=1.0, momentum=0.9)
        for own, group in zip(trial.param_groups, groups, strict=True):
            kept = {name: value for name, value in group.items() if name != "params"}
            own.update(copy.deepcopy(kept) | {"momentum": 0.9, "nesterov": False})
        schedule = _made(trial, kind, config, 0, blind=blind)
        trial.step()
        schedule.move(1)
        schedule.evaluated(1.0, 0.5)
        return

    def made(of: Optimizer, held: FlatOptimizer | None) -> Schedule:
        return _made(of, kind, config, 0, held, blind=blind)

    def refuse(what: str) -> None:
        raise ConfigError(f"schedule.name is {config.name!r}, but {what}")

    parameters = optimizer.parameters.trainable
    tried, expected = in_plain_torch(Tried(optimizer.config, small(parameters), made), parameters)
    refuse_another_course(
        tried,
        expected,
        refuse,
        made_alike="two that are made alike do not do the same in the first turns: let it keep everything in "
        "its attributes, and draw from torch's, numpy's or random's global generator alone, which are seeded",
        in_a_vector="it does not do the same where parameters are views of one vector: let it keep "
        "p.detach().clone() of what it compares",
        carried="it does not go on to the same rates and parameters in another process: let it keep "
        "everything in its attributes",
    )


def remarks_on(schedule: Schedule | None, moves: int) -> list[str]:
    """Return a remark if the run ends before the schedule does."""
    limit = None if schedule is None else schedule.limit
    if limit is None or not 0 < moves < limit:
        return []
    return [
        f"schedule.total_steps is {limit}, but the run moves the schedule {moves} times and ends before its "
        f"end: set schedule.total_steps={moves}"
    ]


_UNSEEN = (
    "it looks at parameters, gradients or the state of its optimiser, or changes more than keys of "
    "param_groups; but shards make turns of their own, each at its own parameters, so it cannot set one rate "
    'for all: let it follow from the turn alone, or use solver.name = "synchronous"'
)


class _Unseen:
    """What stands in a group where parameters would be, and refuses to be looked at."""

    def _refuse(self, *_: object) -> Any:
        raise ConfigError(_UNSEEN)

    __iter__ = __len__ = __bool__ = __getitem__ = __setitem__ = __contains__ = __add__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(_UNSEEN)


@contextmanager
def _sight(optimizer: Optimizer, blind: bool) -> Iterator[None]:
    """In the block, hide an optimiser's parameters and state from a schedule that must be blind."""
    if not blind:
        yield
        return
    groups, state, before = list(optimizer.param_groups), optimizer.state, _beside(optimizer)
    held = [group["params"] for group in groups]
    for group in groups:
        group["params"] = _Unseen()
    optimizer.state = _Unseen()  # type: ignore[assignment]
    try:
        yield
    finally:
        optimizer.state = state
        for group, parameters in zip(groups, held, strict=True):
            group["params"] = parameters
    now = _beside(optimizer)
    if now.keys() != before.keys() or any(now[name] is not before[name] for name in before):
        raise ConfigError(_UNSEEN)


def _beside(optimizer: Optimizer) -> dict[str, object]:
    """Return what an optimiser has beside groups and state, with how many hooks it has."""
    found = {name: value for name, value in vars(optimizer).items() if name not in ("state", "_opt_called")}
    step = found.get("step")
    if step is not None and step.__code__.co_filename == lr_scheduler.__file__:
        del found["step"]  # torch counts its calls by it
    return {name: len(one) if name.endswith("_hooks") else one for name, one in found.items()}


class Rates:
    """What a schedule sets in each turn; the schedule moves a stand-in optimiser of a few elements.

    Args:
        optimizer: which class of torch.optim, and its arguments; it was tried before.
        schedule: which class of torch.optim.lr_scheduler, and its arguments.
        turns_per_move: how many turns pass between two moves of the schedule.
        moves: how often it will be moved.
        seed: of the run.
        like: parameters of its own that an optimiser of the user's may look at; None: one small one.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        turns_per_move: int,
        moves: int,
        seed: int = 0,
        like: FlatParameters | None = None,
    ) -> None:
        stand_in = like or FlatParameters([torch.Size([2, 2])], torch.float32)
        self._optimizer = another_optimizer(stand_in, optimizer, seed)
        self.is_elementwise = self._optimizer.is_elementwise
        self._unscheduled, self._is_own = dict(self._group), own_schedule(schedule)
        self._schedule = make_schedule(self._optimizer, schedule, moves, seed, blind=True)
        if self._schedule is not None:
            scheduled = dict(self._group)
            gradient = self._optimizer.new_gradient().zero_()
            self._optimizer.step(
                gradient, None, seed32(seed, "schedule")
            )  # else torch warns that the schedule moved first
            self._group.update(scheduled)
        self._moved: set[str] = set()
        self._note_moved()
        self._turns_per_move, self._moves = turns_per_move, moves
        self._turn = 0
        self.remarks = remarks_on(self._schedule, moves)

    @classmethod
    def of(cls, experiment: Experiment, flat: FlatModule | FlatStrip) -> Self:
        """Return what the schedule of an experiment sets, for models like this one."""
        return cls(
            experiment.optimizer,
            experiment.schedule,
            experiment.turns_per_move,
            experiment.moves,
            experiment.seed,
            flat.parameters_like() if own_optimizer(experiment.optimizer) else None,
        )

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
            if self._turn % self._turns_per_move == 0 and self._turn <= self._moves * self._turns_per_move:
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
        """Note which of the optimiser's keys the schedule changes; new ones of torch's are its own."""
        before, now = self._unscheduled, self._group
        names = [name for name in (now if self._is_own else before) if name not in ("params", "initial_lr")]
        self._moved |= {name for name in names if name not in before or now[name] != before[name]}

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
