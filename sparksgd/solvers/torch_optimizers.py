"""torch's optimisers for all rules: making them, trying them, refusing them.

An optimiser of the user's own, and one of torch that looks at whole tensors, is tried on small tensors of the
dimensions of the module's: held as it will be, against itself held as a plain loop would.  So the trial finds
tensors that share memory with a parameter that is rebound, state that no attribute holds, and numbers that no
seed decides.

torch wraps the methods of its optimisers.  The wrapper imports torch._dynamo, the compiler, only to switch it
off, which costs a second and 75 MB in every process.  After `without_compiler()` the method is called without
the wrapper, as long as nothing else in the process has imported the compiler.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from sparksgd.arithmetic.flat import FlatParameters
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import OptimizerConfig
from sparksgd.errors import ConfigError, UserCodeError
from sparksgd.imports import did_you_mean, resolve, users_code
from sparksgd.solvers.flat_optimizer import ELEMENTWISE, HAS, FlatOptimizer, Parameters, seeded
from sparksgd.solvers.protocol import Settings, Touched

__all__ = [
    "another_optimizer",
    "class_named",
    "make_optimizer",
    "refusing",
    "state_names",
    "without_compiler",
]


def make_optimizer(parameters: Parameters, config: OptimizerConfig, seed: int = 0) -> FlatOptimizer:
    """Return the optimiser that a configuration names, after a trial.

    Args:
        parameters: that it will move.
        config: which class, and its arguments.
        seed: of the run.

    Raises:
        ConfigError: no optimiser has that name, it does not take these arguments or parameters, or it cannot
            be held as this package holds optimisers.
    """
    kind = _optimizer_kind(config)
    shapes = [parameter.shape for parameter in parameters.trainable]
    tried = kind, repr(config.arguments), shapes
    if tried not in _last_tried:  # a training makes several alike: one that is tried, and one on each side
        _try_optimizer(shapes, config)
        _last_tried[:] = [tried]
    with refusing("optimizer", config.name, kind, config.arguments):
        return another_optimizer(parameters, config, seed)


def another_optimizer(parameters: Parameters, config: OptimizerConfig, seed: int = 0) -> FlatOptimizer:
    """Return an optimiser as `make_optimizer` does, of a configuration that was tried before."""
    kind = _optimizer_kind(config)
    tensors = [parameters.whole] if kind in ELEMENTWISE else parameters.trainable
    with seeded(kind, seed32(seed, "optimizer")):
        return FlatOptimizer(parameters, kind(tensors, **config.arguments))


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
    return class_named("optimizer.name", config.name, torch.optim, Optimizer)


# The trial

_TRIED_STEPS = 4
_STATE_AFTER = 2
_LARGEST = 3  # of a dimension of a tried tensor
_last_tried: list[tuple[Any, str, list[torch.Size]]] = []


def _try_optimizer(shapes: Sequence[torch.Size], config: OptimizerConfig) -> None:
    """Try an optimiser on small tensors of as many dimensions as these.

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
            one = _free([torch.Size([2, 2])])
            one[0].grad = torch.ones(2, 2)
            kind(one, **arguments).step()
            return
        small = {len(shape): torch.Size(min(size, _LARGEST) for size in shape) for shape in shapes}
        tried = list(small.values()) * (2 if len(small) == 1 else 1)
        try:
            expected = _steps_of_torch(kind, arguments, tried, None)
        except Exception:
            tried = list(shapes)  # it may need larger ones
            expected = _steps_of_torch(kind, arguments, tried, None)
        _compare(kind, config, tried, expected)


def _compare(
    kind: Any, config: OptimizerConfig, shapes: Sequence[torch.Size], expected: list[torch.Tensor]
) -> None:
    """Refuse an optimiser that gives other parameters as it is held here."""

    def refuse(what: str) -> None:
        raise ConfigError(f"optimizer.name is {config.name!r}, but {what}")

    if not _are_same(expected, _steps_of_torch(kind, config.arguments, shapes, None)):
        refuse(
            "two that are made alike give different parameters: let it draw from torch's, numpy's or "
            "random's global generator, which are seeded for each step, and from no clock"
        )
    if not _are_same(expected, _steps_as_held(kind, config, shapes, None, moves=False)):
        refuse(
            "it gives other parameters where these are views of one vector: it keeps a tensor that shares "
            "memory with a parameter that it rebinds; let it keep p.detach().clone()"
        )
    if not _are_same(expected, _steps_as_held(kind, config, shapes, None, moves=True)):
        refuse(
            "it does not go on to the same parameters in another process: it keeps something that is no "
            "attribute of its own, such as a global, or something of its class; keep it in self.state"
        )
    untouched = [index > 0 for index in range(len(shapes))]
    try:
        skipping = _steps_of_torch(kind, config.arguments, shapes, untouched)
    except Exception:
        return  # as in plain torch, it raises where a parameter has no gradient
    if not _are_same(skipping, _steps_as_held(kind, config, shapes, untouched, moves=True)):
        refuse("it gives other parameters than in plain torch where one has no gradient: use another")


def _steps_of_torch(
    kind: Any, arguments: Mapping[str, Any], shapes: Sequence[torch.Size], touched: list[bool] | None
) -> list[torch.Tensor]:
    """Return the parameters after each step of a plain loop; in one step some have no gradient."""
    parameters, found = _free(shapes), []
    with seeded(kind, seed32(0, "optimizer")):
        optimizer = kind(parameters, **arguments)
    if "lr" not in optimizer.param_groups[0]:
        raise ValueError("its parameter groups have no 'lr', which schedules and reports need")
    for step in range(_TRIED_STEPS):
        mask = touched if step == _STATE_AFTER else None
        for number, parameter in enumerate(parameters):
            has_gradient = mask is None or mask[number]
            parameter.grad = _wave(parameter.shape, 10 * step + number) if has_gradient else None
        with seeded(kind, step), users_code("its step()"):
            optimizer.step()
        found.append(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    return found


def _steps_as_held(
    kind: Any,
    config: OptimizerConfig,
    shapes: Sequence[torch.Size],
    touched: list[bool] | None,
    *,
    moves: bool,
) -> list[torch.Tensor]:
    """Return the same of a `FlatOptimizer`; if it moves, another one takes over in the middle."""

    def made() -> tuple[FlatParameters, FlatOptimizer]:
        parameters = FlatParameters(shapes, torch.float32)
        for number, (parameter, shape) in enumerate(zip(parameters.trainable, shapes, strict=True)):
            parameter.data.copy_(_wave(shape, number))
        return parameters, another_optimizer(parameters, config)

    parameters, optimizer = made()
    found = []
    for step in range(_TRIED_STEPS):
        if moves and step == _STATE_AFTER:
            vectors, rest = optimizer.state()
            values = parameters.parameters.clone()
            parameters, optimizer = made()
            parameters.parameters.copy_(values)
            optimizer.load_state(vectors, rest)
        mask: Touched = np.array(touched) if touched and step == _STATE_AFTER else None
        gradient = optimizer.new_gradient()
        for number, (part, shape) in enumerate(zip(parameters.parts, shapes, strict=True)):
            gradient[part] = _wave(shape, 10 * step + number).reshape(-1)
        optimizer.step(gradient, mask, step)
        found.append(parameters.parameters.clone())
    return found


def _free(shapes: Sequence[torch.Size]) -> list[nn.Parameter]:
    return [nn.Parameter(_wave(shape, number)) for number, shape in enumerate(shapes)]


def _wave(shape: torch.Size, phase: int) -> torch.Tensor:
    """Return values between -1 and 1 that are not alike."""
    return torch.sin(torch.arange(shape.numel()) * 1.7 + phase).view(shape)


def _are_same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Compare to rounding: matrix products depend on where in memory a tensor begins."""
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs)


# Classes by name


def class_named(key: str, name: str, home: Any, base: type[Any]) -> Any:
    """Return the class that a configuration value names: one of torch's module `home`, or the user's own.

    Raises:
        ConfigError: there is none, or it is not derived from `base`.
    """
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
        raise ConfigError(f"{section}.name is {name!r}, which cannot be used: {error}") from error
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
