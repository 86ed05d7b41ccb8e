"""Sees each operation of torch in a block: which tensors it reads, how precise it is; or steadies chance.

A mode of torch's dispatcher.  It sees what any Python code, closure or hook does, forward and backward, below
autograd.  What does not pass through the dispatcher (numpy, data pointers) it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparksgd.engines.trial.chance import BETWEEN, HIGH, MOST_DRAWS

__all__ = ["Operations", "storage_of"]

_WIDE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}
"""For each narrow type the one to compare in."""
_SINGLE = {torch.float32, torch.complex64}
_EXACT = (
    "clone",
    "detach",
    "lift_fresh",
    "index_select",
    "gather",
    "cat",
    "stack",
    "where",
    "zeros_like",
    "ones_like",
)
"""Operations that copy numbers, beside views."""
_LEFT_AS_THEY_ARE = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
"""Operations that count as random, though they draw nothing on a CPU."""
_MASKS = ("native_dropout", "bernoulli", "randperm", *_LEFT_AS_THEY_ARE)
"""Operations that drop at HIGH, and give the same at all other levels."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """In the block, records what operations of torch do.

    Args:
        watched: the addresses of storages to look for.
        steady: operations that draw random numbers give constants of this level of chance instead.
        wide: what asks for narrower numbers than float64 gets float64.
    """

    def __init__(self, watched: Iterable[int] = (), *, steady: int | None = None, wide: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._watched = frozenset(watched)
        self._steady, self._wide = steady, wide
        self.draws = 0
        """How many operations drew random numbers."""
        self.graded = False
        """Whether one of them is no mask, and gives other numbers at each level of chance."""
        self.widened = False
        """Whether one got or gave wider numbers than it asked for."""
        self.met: dict[int, torch.Tensor] = {}
        """The watched storages that an operation read or wrote, each with one tensor that is a view of it."""
        self.dtypes: set[torch.dtype] = set()
        """The types narrower than float64 that an operation computed in."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes a second, only to switch it off

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._watched:
            for tensor in _tensors((*args, *kwargs.values()) if kwargs else args):
                address = storage_of(tensor)
                if address in self._watched:
                    self.met.setdefault(address, tensor)
        if self._wide:
            given = args, kwargs
            args, kwargs = _widened(func, args, kwargs)
            self.widened |= args is not given[0] or kwargs is not given[1]
        if self._steady is not None and _is_random(func) and _is_global(kwargs.get("generator")):
            self.draws += 1
            self.graded |= not func._schema.name.partition("::")[2].startswith(_MASKS)
            if self.draws > MOST_DRAWS:
                result = func(*args, **kwargs)
            else:
                result = _without_chance(func, args, kwargs, self._steady)
        else:
            result = func(*args, **kwargs)
        if self._wide and isinstance(result, torch.Tensor) and result.dtype in _WIDE and _is_new(func, args):
            result = result.to(_WIDE[result.dtype])
            self.widened = True
        if isinstance(result, torch.Tensor):
            self._note(result, func, args)
        elif isinstance(result, tuple | list):
            for tensor in _tensors(result):
                self._note(tensor, func, args)
        return result

    def _note(self, made: torch.Tensor, func: Any, args: tuple[Any, ...]) -> None:
        dtype = made.dtype
        if dtype in _WIDE and dtype not in self.dtypes and _may_round(func, args):
            self.dtypes.add(dtype)

    @property
    def is_ordinary(self) -> bool:
        """Whether operations give the same without this mode, as precisely as their type lets them."""
        ordinary = set() if self._wide else _SINGLE
        return not (self.draws or self.widened) and self.dtypes <= ordinary

    @property
    def epsilon(self) -> float:
        """Return the relative rounding error of the least precise operation."""
        return max(torch.finfo(dtype).eps for dtype in {torch.float64, *self.dtypes})


def _is_global(generator: torch.Generator | None) -> bool:
    """Return whether a generator is torch's own: one that forward seeds itself gives each piece the same."""
    return generator is None or torch.equal(generator.get_state(), torch.default_generator.get_state())


@cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def storage_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage; 0 if it has none that could be shared."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or without memory
        return 0


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _widened(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments that ask for wide numbers; narrow constants, too, where they meet wide ones."""
    if kwargs.get("dtype") in _WIDE:
        kwargs = {**kwargs, "dtype": _WIDE[kwargs["dtype"]]}
    dtypes = {value.dtype for value in args if isinstance(value, torch.Tensor)}
    if torch.float64 in dtypes and not dtypes.isdisjoint(_WIDE) and not func._schema.is_mutable:
        args = tuple(
            value.to(_WIDE[value.dtype])
            if isinstance(value, torch.Tensor) and value.dtype in _WIDE and not value.is_sparse
            else value
            for value in args
        )
    return args, kwargs


def _is_new(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation made a tensor of numbers that Python gave."""
    return func._schema.name == "aten::lift_fresh" or next(_tensors(args), None) is None


def _may_round(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation computes with floating-point numbers, and does not only copy them."""
    if func.is_view or func._schema.name.partition("::")[2] in _EXACT:
        return False
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in _tensors(args))


def _without_chance(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], level: int) -> Any:
    """Return what a random operation could have given, the same for each element; masks drop all at HIGH."""
    name = func._schema.name.partition("::")[2]
    if name.startswith(_LEFT_AS_THEY_ARE):
        return func(*args, **kwargs)
    if name == "native_dropout":
        values, probability, training = args
        if training and level == HIGH:
            return torch.zeros_like(values), torch.zeros_like(values, dtype=torch.bool)
        scale = 1 / (1 - probability) if training and probability < 1 else 1.0
        return values * scale, torch.ones_like(values, dtype=torch.bool)
    if name.startswith("rrelu_with_noise"):
        values, noise, lower, upper = args[:4]
        slope = float(lower) + (float(upper) - float(lower)) * _SLOPE[level]
        noise.copy_(torch.where(values > 0, 1.0, slope))
        return values * noise
    if name == "normal" and any(isinstance(value, torch.Tensor) for value in args[:2]):
        mean, deviation = (*args, 1.0)[:2]
        return mean + _NORMAL[level] * deviation
    if name in ("poisson", "bernoulli") and args[0].is_floating_point():
        if name == "poisson":
            return args[0].clone()
        return torch.zeros_like(args[0]) if level == HIGH else torch.ones_like(args[0])
    result = args[0] if name.endswith("_") else func(*args, **kwargs)
    if not isinstance(result, torch.Tensor):
        return result
    if name == "randperm":  # in the reverse order: a permutation of the rows does mix them
        return result.copy_(torch.arange(len(result) - 1, -1, -1))
    if name == "bernoulli_":
        return result.fill_(0.0 if level == HIGH else 1.0)
    constant: Callable[..., float] = _CONSTANTS.get(name, _positive)
    return result.fill_(constant(level, *args))


_NORMAL = (0.5, -1.5, 1.5, -0.84, -0.39, 0.39, 0.84)
_UNIFORM = (0.5, 0.05, 0.95, 0.2, 0.35, 0.65, 0.8)
_SLOPE = (0.5, 0.0, 1.0, *_UNIFORM[3:])
_POSITIVE = (1.0, 1.0, 3.0, 0.2, 0.4, 1.5, 2.0)


def _positive(level: int, *args: Any) -> float:
    return _POSITIVE[level]


def _standard_normal(level: int, *args: Any) -> float:
    return _NORMAL[level]


def _standard_uniform(level: int, *args: Any) -> float:
    return _UNIFORM[level]


def _whole(level: int, *args: Any) -> float:
    """Return what randint(low, high, size) or randint(high, size) may give, by the level."""
    numbers = [value for value in args if isinstance(value, int)]
    if level in BETWEEN and numbers:
        low, high = numbers[:2] if len(numbers) > 1 else (0, numbers[0])
        return float(low + int((high - low) * _UNIFORM[level]))
    if level == HIGH and numbers:
        return float(numbers[min(1, len(numbers) - 1)] - 1)
    return float(numbers[0]) if len(numbers) > 1 else 0.0


def _category(level: int, weights: torch.Tensor, *rest: Any) -> float:
    last = weights.shape[-1] - 1
    return float((last - last // 2, 0, last, *(round(last * at) for at in _UNIFORM[3:]))[level])


_CONSTANTS: dict[str, Callable[..., float]] = {
    "rand": _standard_uniform,
    "rand_like": _standard_uniform,
    "randn": _standard_normal,
    "randn_like": _standard_normal,
    "normal": lambda level, mean=0.0, deviation=1.0, *rest: mean + _NORMAL[level] * deviation,
    "uniform_": lambda level, values, low=0.0, high=1.0, *rest: low + (high - low) * _UNIFORM[level],
    "normal_": lambda level, values, mean=0.0, deviation=1.0, *rest: mean + _NORMAL[level] * deviation,
    "randint": _whole,
    "randint_like": lambda level, values, *bounds: _whole(level, *bounds),
    "random_": lambda level, values, *bounds: _whole(level, *bounds),
    "multinomial": _category,
}
"""What an operation gives instead of random numbers; others give a positive one."""
