"""torch's optimisers for all rules: making them, trying them, refusing them.

An optimiser of the user's own, and one of torch that looks at whole tensors, is tried on small tensors of the
dimensions of the module's, or on ones like these where they have attributes: held as it will be, against
itself held as a plain loop would.  So the trial finds tensors that share memory with a parameter that is
rebound, state that no attribute holds, and numbers that no seed decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks

from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatParameters
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import OptimizerConfig
from sparksgd.errors import ConfigError, UserCodeError
from sparksgd.imports import did_you_mean, resolve, shown
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.solvers.flat_optimizer import (
    ELEMENTWISE,
    HAS,
    FlatOptimizer,
    Parameters,
    hooks_of,
    in_shapes,
    is_of_torch,
    seeded,
)
from sparksgd.solvers.protocol import Settings, Touched

__all__ = [
    "Like",
    "Scheduled",
    "Tried",
    "another_optimizer",
    "class_named",
    "in_plain_torch",
    "make_optimizer",
    "own_optimizer",
    "refuse_another_course",
    "refusing",
    "small",
    "state_names",
    "treats_sparse_alike",
]


def make_optimizer(
    parameters: Parameters, config: OptimizerConfig, seed: int = 0, *, shaped: bool = False
) -> FlatOptimizer:
    """Return the optimiser that a configuration names, after a trial.

    Args:
        parameters: that it will move.
        config: which class, and its arguments.
        seed: of the run.
        shaped: whether it must hold parameters in their shapes, because a schedule looks at them.

    Raises:
        ConfigError: no optimiser has that name, it does not take these arguments or parameters, or it cannot
            be held as this package holds optimisers.
    """
    kind = _optimizer_kind(config)
    if optimizer_hooks._global_optimizer_pre_hooks or optimizer_hooks._global_optimizer_post_hooks:
        raise ConfigError(
            "torch.optim has a hook for all optimisers (register_optimizer_step_post_hook or its like), "
            "which would see one vector of all parameters, and which workers do not have: let a class of "
            "your own do it in step(), and give it as optimizer.name"
        )
    shapes = [parameter.shape for parameter in parameters.trainable]
    tried = kind, repr(config.arguments), shapes
    has_attributes = any(map(vars, parameters.trainable))
    if has_attributes or tried not in _last_tried:  # a training makes several alike
        _try_optimizer(parameters.trainable, config)
        _last_tried[:] = [tried]
    with refusing("optimizer", config.name, kind, config.arguments):
        return another_optimizer(parameters, config, seed, shaped=shaped)


def another_optimizer(
    parameters: Parameters, config: OptimizerConfig, seed: int = 0, *, shaped: bool = False
) -> FlatOptimizer:
    """Return an optimiser as `make_optimizer` does, of a configuration that was tried before."""
    kind = _optimizer_kind(config)
    with seeded(kind, seed32(seed, "optimizer")):
        if kind in ELEMENTWISE and not shaped:
            return FlatOptimizer(parameters, kind([parameters.whole], **config.arguments), config)
        hooks = hooks_of(parameters)
        with in_shapes(parameters, f"the optimiser {kind.__name__}"):
            made = FlatOptimizer(parameters, kind(parameters.trainable, **config.arguments), config)
        made.refuse_hooks(hooks)
        return made


def own_optimizer(config: OptimizerConfig) -> bool:
    """Return whether an optimiser is the user's own.

    Raises:
        ConfigError: no optimiser has that name, or it does not take these arguments.
    """
    kind = _optimizer_kind(config)
    with refusing("optimizer", config.name, kind, config.arguments):
        return not is_of_torch(kind)


def state_names(config: OptimizerConfig, settings: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of what an elementwise optimiser keeps after a step: vectors, and numbers."""
    trial = FlatParameters([torch.Size([2])], torch.float32)
    optimizer = another_optimizer(trial, config)
    optimizer.set(settings)
    trial.gradient.fill_(1)
    optimizer.step(trial.gradient, None, 0)
    vectors, numbers = optimizer.averageable()
    names = {name.rpartition(".")[0] for name in numbers} - {HAS}
    return tuple(sorted(vectors)), tuple(sorted(names))


def _optimizer_kind(config: OptimizerConfig) -> Any:
    return class_named("optimizer.name", config.name, torch.optim, Optimizer, _EXAMPLE)


# The trial

_TRIED_STEPS = 4
_STATE_AFTER = 2
_LARGEST = 3  # of a dimension of a tried tensor
_last_tried: list[tuple[Any, str, list[torch.Size]]] = []


def _try_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> None:
    """Try an optimiser on small tensors of as many dimensions as these, or on ones like these.

    Raises:
        ConfigError: see `make_optimizer`.
    """
    kind, arguments = _optimizer_kind(config), config.arguments
    if arguments.get("fused"):
        raise ConfigError("optimizer.fused is true, but fused optimisers give other bits: leave it out")
    if issubclass(kind, torch.optim.LBFGS):
        raise ConfigError("optimizer.name is 'LBFGS', which evaluates a step many times: use another")
    if issubclass(kind, torch.optim.SparseAdam):
        raise ConfigError(
            f"optimizer.name is {config.name!r}, which takes sparse gradients alone, but gradients are "
            f"summed as dense vectors: use Adam"
        )
    with refusing("optimizer", config.name, kind, arguments):
        if kind in ELEMENTWISE:
            one = _free([Like(torch.Size([2, 2]))])
            one[0].grad = torch.ones(2, 2)
            kind(one, **arguments).step()
            return
        models = small(parameters)
        if not any(map(vars, parameters)):
            one_of_each = list({len(like.shape): like for like in models}.values())
            models = one_of_each * (2 if len(one_of_each) == 1 else 1)
        _compare(*in_plain_torch(Tried(config, models), parameters))


def in_plain_torch(tried: Tried, parameters: Sequence[nn.Parameter]) -> tuple[Tried, list[torch.Tensor]]:
    """Return what was tried, and its course in a plain loop: in the parameters' shapes if it needs them."""
    try:
        return tried, tried.in_torch()
    except ConfigError:
        raise
    except Exception:
        tried = replace(tried, models=[Like.of(one) for one in parameters])
        return tried, tried.in_torch()


def small(parameters: Sequence[nn.Parameter]) -> list[Like]:
    """Return small tensors of as many dimensions; where some have attributes, all in their shapes."""
    if any(map(vars, parameters)):
        return [Like.of(one) for one in parameters]
    return [Like(torch.Size(min(size, _LARGEST) for size in one.shape)) for one in parameters]


def _compare(tried: Tried, expected: list[torch.Tensor]) -> None:
    """Refuse an optimiser that gives other parameters as it is held here."""

    def refuse(what: str) -> None:
        raise ConfigError(f"optimizer.name is {tried.config.name!r}, but {what}")

    refuse_another_course(
        tried,
        expected,
        refuse,
        made_alike="two that are made alike give different parameters: let it draw from torch's, numpy's or "
        "random's global generator, which are seeded for each step, and from no clock",
        in_a_vector="it gives other parameters where these are views of one vector: it keeps a tensor that "
        "shares memory with a parameter that it rebinds; let it keep p.detach().clone()",
        carried="it does not go on to the same parameters in another process: it keeps something that is no "
        "attribute of its own, such as a global, or something of its class; keep it in self.state",
    )
    untouched = [index > 0 for index in range(len(tried.models))]
    try:
        skipping = tried.in_torch(untouched)
    except Exception:
        return  # as in plain torch, it raises where a parameter has no gradient
    if not _are_same(skipping, tried.as_held(untouched, moves=True)):
        refuse("it gives other parameters than in plain torch where one has no gradient: use another")


def refuse_another_course(
    tried: Tried,
    expected: Sequence[torch.Tensor],
    refuse: Callable[[str], object],
    *,
    made_alike: str,
    in_a_vector: str,
    carried: str,
) -> None:
    """Refuse what does not repeat its course: made again, as it is held here, and in another process.

    Args:
        tried: makes the courses.
        expected: that in a plain loop.
        refuse: raises the error.
        made_alike: what to say where two that are made alike differ.
        in_a_vector: where it differs as it is held here.
        carried: where it differs when another one takes over.
    """
    courses: tuple[tuple[str, Callable[[], list[torch.Tensor]]], ...] = (
        (made_alike, tried.in_torch),
        (in_a_vector, partial(tried.as_held, moves=False)),
        (carried, partial(tried.as_held, moves=True)),
    )
    for what, course in courses:
        if not _are_same(expected, course()):
            refuse(what)


@dataclass(frozen=True)
class Like:
    """What a tried tensor is like."""

    shape: torch.Size
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Like:
        """Return what is like a parameter."""
        return cls(parameter.shape, vars(parameter))


@dataclass(frozen=True)
class Tried:
    """Some steps of an optimiser, maybe with a schedule: in a plain loop, and as it is held here.

    Both give the parameters and the rates after each step.
    """

    config: OptimizerConfig
    """Which optimiser."""

    models: Sequence[Like]
    """What the tensors are like."""

    schedule: Callable[[Optimizer, FlatOptimizer | None], Scheduled] | None = None
    """Makes the schedule of an optimiser, which may be held."""

    sparse: Mapping[int, int] = field(default_factory=dict)
    """The numbers of tensors whose gradients have rows without a value, with their sparse dimensions."""

    is_sparse: bool = False
    """Whether these gradients are sparse tensors, in a plain loop."""

    def in_torch(self, touched: list[bool] | None = None) -> list[torch.Tensor]:
        """Make the steps of a plain loop; in one of them, only these parameters have a gradient."""
        kind, parameters = _optimizer_kind(self.config), _free(self.models)
        with seeded(kind, seed32(0, "optimizer")):
            optimizer = kind(parameters, **self.config.arguments)
        if "lr" not in optimizer.param_groups[0]:
            raise ValueError("its parameter groups have no 'lr', which schedules and reports need")
        schedule = None if self.schedule is None else self.schedule(optimizer, None)
        found = []
        for step in range(_TRIED_STEPS):
            mask = touched if step == _STATE_AFTER else None
            with users_torch_code("its zero_grad()"):
                optimizer.zero_grad()  # it may be the user's own, and change something
            for number, parameter in enumerate(parameters):
                has_gradient = mask is None or mask[number]
                parameter.grad = self._gradient(number, step, parameter.shape) if has_gradient else None
            with seeded(kind, step), users_torch_code("its step()"):
                optimizer.step()
            if schedule is not None:
                schedule.move(step + 1)
            found += _made_by(optimizer, torch.cat([one.detach().reshape(-1) for one in parameters]))
        return found

    def _gradient(self, number: int, step: int, shape: torch.Size) -> torch.Tensor:
        """Return the gradient of a tensor in a step."""
        gradient = _wave(shape, 10 * step + number)
        if number not in self.sparse:
            return gradient
        gradient[step % shape[0]] = 0
        return _in_two_parts(gradient, self.sparse[number]) if self.is_sparse else gradient

    def longer(self, steps: int) -> tuple[FlatOptimizer, Iterator[Callable[[], None]]]:
        """Return an optimiser as held here, and what makes each of its next steps; gradients are dense."""
        _, optimizer, schedule = self._held(None)

        def course() -> Iterator[Callable[[], None]]:
            points = torch.cat([_points(like.shape, number) for number, like in enumerate(self.models)])
            for step in range(steps):
                gradient = optimizer.new_gradient().copy_(torch.sin(points + 10 * step))
                then = None if schedule is None else partial(schedule.move, step + 1)
                yield partial(optimizer.step, gradient, None, step, then)

        return optimizer, course()

    def as_held(self, touched: list[bool] | None = None, *, moves: bool) -> list[torch.Tensor]:
        """Make the same steps as held here; if it moves, another one takes over in the middle."""
        parameters, optimizer, schedule = self._held(None)
        found = []
        for step in range(_TRIED_STEPS):
            if moves and step == _STATE_AFTER:
                vectors, rest = optimizer.state()
                of_schedule = None if schedule is None else schedule.state()
                parameters, optimizer, schedule = self._held(parameters.parameters)
                optimizer.load_state(vectors, rest)
                if schedule is not None and of_schedule is not None:
                    schedule.load_state(of_schedule)
            mask: Touched = np.array(touched) if touched and step == _STATE_AFTER else None
            gradient = optimizer.new_gradient()
            for number, (part, model) in enumerate(zip(parameters.parts, self.models, strict=True)):
                gradient[part] = self._gradient(number, step, model.shape).reshape(-1)
            then = None if schedule is None else partial(schedule.move, step + 1)
            optimizer.step(gradient, mask, step, then)
            found += _made_by(optimizer.optimizer, parameters.parameters.clone())
        return found

    def _held(self, values: torch.Tensor | None) -> tuple[FlatParameters, FlatOptimizer, Scheduled | None]:
        parameters = FlatParameters([model.shape for model in self.models], torch.float32)
        for one, like in zip(parameters.trainable, _free(self.models), strict=True):
            one.data.copy_(like.detach())
            vars(one).update(vars(like))
        shaped = self.schedule is not None
        optimizer = another_optimizer(parameters, self.config, shaped=shaped)
        schedule = None if self.schedule is None else self.schedule(optimizer.optimizer, optimizer)
        if values is not None:
            parameters.parameters.copy_(values)
        return parameters, optimizer, schedule


class Scheduled(Protocol):
    """A schedule that is tried."""

    def move(self, turn: int) -> None:
        """Move it once."""

    def state(self) -> dict[str, Any]:
        """Return where it is."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another one."""


def _made_by(optimizer: Optimizer, parameters: torch.Tensor) -> list[torch.Tensor]:
    """Return what a step made: parameters, and rates, as multiples of the first ones."""
    rates = [float(g["lr"]) / (float(g.get("initial_lr", 0)) or 1.0) for g in optimizer.param_groups]
    return [parameters, torch.tensor(rates)]


def _free(models: Sequence[Like]) -> list[nn.Parameter]:
    found = [nn.Parameter(_wave(model.shape, number)) for number, model in enumerate(models)]
    for one, attributes in zip(found, copied([dict(model.attributes) for model in models]), strict=True):
        vars(one).update(attributes)
    return found


def _wave(shape: torch.Size, phase: int) -> torch.Tensor:
    """Return values between -1 and 1 that are not alike."""
    return torch.sin(_points(shape, phase)).view(shape)


def _points(shape: torch.Size, phase: int) -> torch.Tensor:
    return torch.arange(shape.numel()) * 1.7 + phase


def _in_two_parts(gradient: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Return a gradient as a sparse one that has each row twice, as a layer gives it for words that recur."""
    once = gradient.to_sparse(dimensions)
    indices, values = once.indices(), once.values()
    return torch.sparse_coo_tensor(
        torch.cat([indices, indices], 1),
        torch.cat([values * 0.25, values * 0.75]),
        gradient.shape,
        check_invariants=False,
    )


def treats_sparse_alike(
    parameters: Sequence[nn.Parameter], config: OptimizerConfig, sparse: Mapping[int, int]
) -> bool:
    """Return whether an optimiser makes the same steps with sparse gradients as with dense ones.

    One that raises on sparse ones is no other: it would in plain torch, too.

    Args:
        parameters: that it moves.
        config: which optimiser.
        sparse: the numbers of the parameters that have sparse gradients, with their sparse dimensions.
    """
    tried, _ = in_plain_torch(Tried(config, small(parameters)), parameters)
    tried = replace(tried, sparse=sparse)
    try:
        found = replace(tried, is_sparse=True).in_torch()
    except Exception:
        return True
    return _are_same(found, tried.in_torch())


def _are_same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Compare to rounding: matrix products depend on where in memory a tensor begins."""
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs)


# Classes by name

_EXAMPLE = (
    "class Mine(torch.optim.AdamW): def __init__(self, params, lr): "
    "super().__init__(params, lr=lr, betas=(0.9, 0.95))"
)


def class_named(key: str, name: str, home: Any, base: type[Any], example: str) -> Any:
    """Return the class that a configuration value names: one of torch's module `home`, or the user's own.

    Args:
        key: of the configuration.
        name: its value.
        home: of torch's own.
        base: what it must be derived from.
        example: of a class, for who names a function.

    Raises:
        ConfigError: there is none, or it is not derived from `base`.
    """
    ours = {
        word: kind
        for word, kind in vars(home).items()
        if inspect.isclass(kind) and issubclass(kind, base) and kind is not base
    }
    kind = resolve(key, name, ours)
    if inspect.isclass(kind) and issubclass(kind, base):
        return kind
    named = f"{base.__module__}.{base.__name__}"
    if inspect.isclass(kind) or not callable(kind):
        raise ConfigError(f"{key} is {shown(name)}, which is not a {named}")
    word = kind.__name__ if inspect.isroutine(kind) else type(kind).__name__
    raise ConfigError(
        f"{key} is {shown(name)}, which is a function, but must be a class derived from {named}, because "
        f"workers and resumed runs make another one and give it the state. Let a class do in __init__ what "
        f"{word} does: {example}"
    )


@contextmanager
def refusing(section: str, name: str, kind: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of torch about arguments, at the start or at the first step, into a ConfigError."""
    known = inspect.signature(kind).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for key in arguments:
        if key not in known and not takes_any:
            raise ConfigError(f"{section}.{key} is no argument of {name}{did_you_mean(key, list(known)[1:])}")
    try:
        yield
    except ConfigError:
        raise
    except UserCodeError as error:
        raise ConfigError(f"{section}.name is {shown(name)}, which cannot be used: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{section}.name is {shown(name)}, which does not take {shown(dict(arguments))}: "
            f"{type(error).__name__}: {error}"
        ) from error
