"""What an optimiser or a schedule of the user's own reaches outside its attributes: it must stay as it is.

Its attributes are carried to other processes, with what functions among them close over.  Globals, attributes
of classes and of functions with a name, and the arguments that it was made with are not.  And the module that
the caller gave is not the one that trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from torch import nn
from torch.optim import Optimizer

from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.engines.held import Held, Seen, held_of
from sparksgd.engines.held_names import around
from sparksgd.engines.trial.operations import Operations
from sparksgd.engines.trial.ownership import Owned
from sparksgd.errors import ModelError, UserCodeError
from sparksgd.solvers.flat_optimizer import FlatOptimizer, is_of_torch
from sparksgd.solvers.schedules import Schedule, make_schedule, own_schedule
from sparksgd.solvers.torch_optimizers import Tried, own_optimizer, small

__all__ = ["Outside", "refuse_later_moves", "watch_steps"]

_LATER_STEPS = 60


class Outside:
    """What is outside an optimiser and its schedule, as it is now.

    Args:
        optimizer: with its schedule.
        module: the caller's, not the copy that trains.
        owned: its tensors.

    Raises:
        ModelError: they refer to the caller's module.
    """

    def __init__(self, optimizer: FlatOptimizer, module: nn.Module, owned: Owned) -> None:
        self._owned = owned
        self._held, seen = _around(optimizer)
        if {id(module), *map(id, module.parameters())} & seen:
            raise ModelError(_of_the_caller(f"the {type(module).__name__}, by a global or a class,"))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the block, which makes a step.

        Raises:
            ModelError: something outside changed, or a tensor of the caller's module was used.
        """
        changed: list[Held] = []
        try:
            with Operations(self._owned.storages) as seen:
                yield
        finally:
            changed += (one for one in self._held if one.is_changed())
            for one in changed:
                with suppress(ModelError):  # an iterator cannot go back
                    one.restore()
        for tensor in seen.met.values():
            raise ModelError(_of_the_caller(f"{self._owned.name_of(tensor) or 'a tensor'!r} of the module"))
        for one in changed:
            raise _moved(one)


def _around(optimizer: FlatOptimizer) -> tuple[list[Held], set[int]]:
    """Return what is outside an optimiser and its schedule, and all that was looked at.

    What is both outside and in an attribute is outside: another process would have two of it.
    """
    own = list(optimizer.schedules)
    if not is_of_torch(type(optimizer.optimizer)):
        own.append(optimizer.optimizer)
    held = optimizer.parameters
    anchors = [optimizer.optimizer, *optimizer.schedules, optimizer.optimizer.state, *held.trainable]
    ids = [id(one) for one in (*anchors, held.whole, *optimizer.optimizer.param_groups)]
    inside, seen = Seen(ids), Seen(ids)
    for owner in own:
        held_of(type(owner).__name__, dict(vars(owner)), inside)
    seen.kinds |= inside.kinds
    found = [held_of(path, value, seen) for path, value in optimizer.arguments.items()]
    for number, parameter in enumerate(held.trainable):
        for name, value in vars(parameter).items():
            found.append(held_of(f"the attribute {name!r} of parameter {number}", value, seen))
    seen.functions += inside.functions
    seen.carried = {id(one) for one in inside.functions if "<" in one.__qualname__}
    seen |= seen.carried
    moved = [one for one in found if one is not None] + around(own, seen)
    return moved, seen | inside


def watch_steps(optimizers: Sequence[FlatOptimizer]) -> None:
    """Let optimisers refuse, at each step from now on, what they or their schedules move outside."""
    for optimizer in optimizers:
        if optimizer.runs_own_code:
            optimizer.watched = _Steps(optimizer).watched


class _Steps:
    """The steps of a run.

    Args:
        optimizer: with its schedule.
    """

    def __init__(self, optimizer: FlatOptimizer) -> None:
        self._optimizer = optimizer
        self._held, _ = _around(optimizer)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the block, which makes a step.

        Raises:
            ModelError: something outside changed.
        """
        if any(one.is_changed() for one in self._held):  # others may do so between steps
            self._held, _ = _around(self._optimizer)
        yield
        for one in self._held:
            if one.is_changed():
                raise _moved(one)


def _moved(one: Held) -> ModelError:
    return ModelError(
        f"{one.path} changes as the optimiser or the schedule makes a step, but no other process would get "
        "it: keep it in an attribute of self"
    )


def refuse_later_moves(
    parameters: Sequence[nn.Parameter],
    config: OptimizerConfig,
    schedule: ScheduleConfig,
    module: nn.Module,
    owned: Owned,
) -> None:
    """Refuse what an optimiser or a schedule of the user's own moves outside after some steps only.

    They make more steps on small tensors.

    Args:
        parameters: what these are like.
        config: which optimiser.
        schedule: which schedule.
        module: the caller's.
        owned: its tensors.

    Raises:
        ModelError: something outside changed.
        ConfigError: they did what each step refuses.
    """
    if not (own_optimizer(config) or own_schedule(schedule)):
        return

    def made(_: Optimizer, held: FlatOptimizer | None) -> Schedule:
        assert held is not None
        one = make_schedule(held, schedule, 0, is_tried=True)
        assert one is not None
        return one

    tried = Tried(config, small(parameters), None if schedule.name is None else made)
    try:
        optimizer, steps = tried.longer(_LATER_STEPS)
    except Exception:  # small tensors do not suit it
        return
    outside = Outside(optimizer, module, owned)
    with suppress(UserCodeError):  # it ends, or needs what was left out
        for make_step in steps:
            with outside.watched():
                make_step()


def _of_the_caller(what: str) -> str:
    return (
        f"the optimiser or the schedule refers to {what} that was given to train, but a copy of it trains: "
        "reach parameters by param_groups"
    )
