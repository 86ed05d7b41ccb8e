"""torch's optimisers and schedules for all rules: making them, refusing them, their state as arrays.

torch wraps the methods of its optimisers.  The wrapper imports torch._dynamo, the compiler, only to switch it
off, which costs a second and 75 MB in every process.  After `without_compiler()` the method is called without
the wrapper, as long as nothing else in the process has imported the compiler.

Legend: P parameters.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from sparksgd.arithmetic.flat import FlatParameters
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, resolve, users_code
from sparksgd.solvers.protocol import Settings, Vector

__all__ = [
    "Parameters",
    "Rates",
    "another_optimizer",
    "averaged_state",
    "is_elementwise",
    "load_averaged_state",
    "load_state",
    "make_optimizer",
    "make_schedule",
    "remarks_on",
    "state_names",
    "state_of",
    "without_compiler",
]

# They update each element by itself.  So one vector of all parameters gives the same bits as many tensors,
# and so do strips of the vector.  A test checks this for each of them.
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


class Parameters(Protocol):
    """Parameters as one vector, and as the tensors that are its parts."""

    whole: nn.Parameter
    trainable: list[nn.Parameter]


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether an optimiser treats each element by itself, so that strips can be updated apart."""
    return type(optimizer) in _ELEMENTWISE


def make_optimizer(parameters: Parameters, config: OptimizerConfig) -> Optimizer:
    """Return the optimiser that a configuration names, over one vector, or over its tensors if it needs them.

    Raises:
        ConfigError: no optimiser has that name, or it does not take these arguments.
    """
    kind = _optimizer_kind(config)
    if config.arguments.get("fused"):
        raise ConfigError("optimizer.fused is true, but fused optimisers give other bits: leave it out")
    if issubclass(kind, torch.optim.LBFGS):
        raise ConfigError("optimizer.name is 'LBFGS', which evaluates a step many times: use another")
    with _refusing("optimizer", config.name, kind, config.arguments):
        trial = nn.Parameter(torch.zeros(2, 2))
        trial.grad = torch.ones(2, 2)
        kind([trial], **config.arguments).step()
        return another_optimizer(parameters, config)


def another_optimizer(parameters: Parameters, config: OptimizerConfig) -> Optimizer:
    """Return an optimiser as `make_optimizer` does, of a configuration that was tried before."""
    kind = _optimizer_kind(config)
    tensors = [parameters.whole] if kind in _ELEMENTWISE else parameters.trainable
    made: Optimizer = kind(tensors, **config.arguments)
    return made


def _optimizer_kind(config: OptimizerConfig) -> Any:
    return _kind("optimizer.name", config.name, torch.optim, Optimizer)


def make_schedule(
    optimizer: Optimizer, config: ScheduleConfig, moves: int
) -> lr_scheduler.LRScheduler | None:
    """Return the schedule that a configuration names, or None; it must last for this many moves.

    Raises:
        ConfigError: no schedule has that name, it does not take these arguments, or it ends too early.
    """
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


def remarks_on(schedule: lr_scheduler.LRScheduler | None, moves: int) -> list[str]:
    """Return a remark if the run ends before the schedule does."""
    limit = getattr(schedule, "total_steps", None)
    if limit is None or not 0 < moves < limit:
        return []
    return [
        f"schedule.total_steps is {limit}, but the run moves the schedule {moves} times and ends before its "
        f"end: set schedule.total_steps={moves}"
    ]


def state_of(optimizer: Optimizer) -> tuple[dict[str, Vector], dict[str, Any]]:
    """Return an optimiser's state: what it keeps for each element of its vector, and the rest.

    The arrays are views of its tensors.  An optimiser over several tensors has no vectors.
    """
    whole = optimizer.state_dict()
    kept = {
        key: {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        for key, values in whole["state"].items()
    }
    vectors: dict[str, Vector] = {}
    if is_elementwise(optimizer):
        (parameter,) = optimizer.param_groups[0]["params"]
        of_whole = kept.get(0, {})
        vectors = {name: v for name, v in of_whole.items() if np.shape(v) == tuple(parameter.shape)}
        kept = {0: {name: v for name, v in of_whole.items() if name not in vectors}} if of_whole else {}
    return vectors, {"param_groups": whole["param_groups"], "state": kept}


def load_state(optimizer: Optimizer, vectors: Mapping[str, Vector], rest: Mapping[str, Any]) -> None:
    """Continue from the state of another optimiser of the same kind, from `state_of`; it is copied."""
    kept = {key: dict(values) for key, values in rest["state"].items()}
    if vectors:
        kept[0] = kept.get(0, {}) | dict(vectors)
    tensors = {
        key: {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}
        for key, values in kept.items()
    }
    optimizer.load_state_dict(copy.deepcopy({**rest, "state": tensors}))


def averaged_state(optimizer: Optimizer) -> tuple[dict[str, Vector], dict[str, float]]:
    """Return the state of an elementwise optimiser, in a form that can be averaged.

    Returns:
        Copies of what it keeps for each element, float32[P] each, and its single numbers, such as a count.
    """
    vectors, rest = state_of(optimizer)
    numbers = {name: float(v) for name, v in rest["state"].get(0, {}).items() if v is not None}
    return {name: vector.copy() for name, vector in vectors.items()}, numbers


def load_averaged_state(
    optimizer: Optimizer, vectors: Mapping[str, Vector], numbers: Mapping[str, float]
) -> None:
    """Let an elementwise optimiser continue from a result of `averaged_state`, or from a mean of several."""
    _, rest = state_of(optimizer)
    kept = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
    load_state(optimizer, vectors, {**rest, "state": {0: kept}})


def state_names(config: OptimizerConfig, settings: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of what an elementwise optimiser keeps after a step: vectors, and numbers."""
    trial = FlatParameters([torch.Size([2])], torch.float32)
    optimizer = another_optimizer(trial, config)
    optimizer.param_groups[0].update(settings)
    trial.gradient.fill_(1)
    optimizer.step()
    vectors, numbers = averaged_state(optimizer)
    return tuple(sorted(vectors)), tuple(sorted(numbers))


class Rates:
    """What a schedule sets in each turn; the schedule moves a stand-in optimiser with one element.

    Args:
        optimizer: which class of torch.optim, and its arguments.
        schedule: which class of torch.optim.lr_scheduler, and its arguments.
        turns_per_move: how many turns pass between two moves of the schedule.
        moves: how often it will be moved.
    """

    def __init__(
        self, optimizer: OptimizerConfig, schedule: ScheduleConfig, turns_per_move: int, moves: int
    ) -> None:
        stand_in = FlatParameters([torch.Size([1, 1])], torch.float32)
        self._optimizer = make_optimizer(stand_in, optimizer)
        self.is_elementwise = is_elementwise(self._optimizer)
        self._unscheduled = dict(self._group)
        self._schedule = make_schedule(self._optimizer, schedule, moves)
        scheduled = dict(self._group)
        self._optimizer.step()  # else torch warns that the schedule moved first
        self._group.update(scheduled)
        self._moved: set[str] = set()
        self._note_moved()
        self._turns_per_move = turns_per_move
        self._turn = 0
        self.remarks = remarks_on(self._schedule, moves)

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.param_groups[0]

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
                with users_code("the schedule"):
                    self._schedule.step()
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
        schedule = None if self._schedule is None else self._schedule.state_dict()
        return {"turn": self._turn, "group": group, "moved": sorted(self._moved), "schedule": schedule}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another one."""
        self._turn, self._moved = state["turn"], set(state["moved"])
        self._group.update(copy.deepcopy(dict(state["group"])))
        if self._schedule is not None:
            self._schedule.load_state_dict(copy.deepcopy(dict(state["schedule"])))


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
    """Turn an error of torch about arguments, at the start or at the first step, into a ConfigError."""
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


_COMPILER = "torch._dynamo"
_DISABLED = "__dynamo_disable"  # where torch._disable_dynamo keeps the wrapped function


def without_compiler() -> None:
    """Let the optimisers of this process work without torch's compiler, as long as it is not loaded.

    This changes classes of torch for the whole process.  So only the start of a process calls it.  If a torch
    version wraps its methods in another way, nothing changes, except that methods take longer.
    """
    if _COMPILER in sys.modules:
        return
    for method in vars(Optimizer).values():
        if _wrapper_of(method) == "inner":  # of torch._disable_dynamo
            _put_off(method)
    for base in vars(torch.optim).values():
        step: Any = vars(base).get("step") if inspect.isclass(base) else None
        if _wrapper_of(step) == "_use_grad":  # of torch.optim.optimizer._use_grad_for_differentiable
            base.step = _put_off_step(step)  # as torch does itself, for its hooks


def _wrapper_of(method: Any) -> str | None:
    """Return the name of the function that wraps a method."""
    return method.__code__.co_name if hasattr(method, "__wrapped__") and hasattr(method, "__code__") else None


def _put_off(method: Any) -> None:
    """Make a wrapper call its function directly, until the compiler is loaded."""
    wrapped = method.__wrapped__
    if hasattr(wrapped, _DISABLED):
        return

    def by_itself(*args: Any, **kwargs: Any) -> Any:
        if _COMPILER not in sys.modules:
            return wrapped(*args, **kwargs)
        vars(wrapped).pop(_DISABLED, None)
        return method(*args, **kwargs)

    setattr(wrapped, _DISABLED, by_itself)


def _put_off_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that does what the wrapper does, without the compiler."""
    inner = step.__wrapped__  # type: ignore[attr-defined]  # as functools.wraps leaves it

    @functools.wraps(step)
    def by_itself(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if _COMPILER in sys.modules:
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return inner(self, *args, **kwargs)

    return by_itself
