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

__all__ = ["Operations", "storage_of"]

_HALVES = (torch.float16, torch.bfloat16)
_LEFT_AS_THEY_ARE = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
"""Operations that count as random, though they draw nothing on a CPU."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """In the block, records what operations of torch do.

    Args:
        watched: the addresses of storages to look for.
        steady: operations that draw random numbers give constants instead.
    """

    def __init__(self, watched: Iterable[int] = (), *, steady: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._watched = frozenset(watched)
        self._steady = steady
        self.met: dict[int, torch.Tensor] = {}
        """The watched storages that an operation read or wrote, each with one tensor that is a view of it."""
        self.dtypes: set[torch.dtype] = set()
        """The half types that an operation gave."""
        self.draws = False
        """Whether an operation drew random numbers."""

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
        if self._steady and _is_random(func):
            self.draws = True
            result = _without_chance(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            if result.dtype in _HALVES:
                self.dtypes.add(result.dtype)
        elif isinstance(result, tuple | list):
            self.dtypes.update(tensor.dtype for tensor in _tensors(result) if tensor.dtype in _HALVES)
        return result

    @property
    def is_ordinary(self) -> bool:
        """Whether no operation drew random numbers or gave a half type."""
        return not (self.draws or self.dtypes)

    @property
    def epsilon(self) -> float:
        """Return the relative rounding error of the least precise operation."""
        return max([torch.finfo(torch.float32).eps, *(torch.finfo(dtype).eps for dtype in self.dtypes)])


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


def _without_chance(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a random operation could have given, the same for each element."""
    name = func._schema.name.partition("::")[2]
    if name.startswith(_LEFT_AS_THEY_ARE):
        return func(*args, **kwargs)
    if name == "native_dropout":
        values, probability, training = args
        scale = 1 / (1 - probability) if training and probability < 1 else 1.0
        return values * scale, torch.ones_like(values, dtype=torch.bool)
    if name.startswith("rrelu_with_noise"):
        values, noise, lower, upper = args[:4]
        noise.copy_(torch.where(values > 0, 1.0, (float(lower) + float(upper)) / 2))
        return values * noise
    if name == "normal" and any(isinstance(value, torch.Tensor) for value in args[:2]):
        mean, deviation = (*args, 1.0)[:2]
        return mean + 0.5 * deviation
    if name in ("poisson", "bernoulli") and args[0].is_floating_point():
        return args[0].clone() if name == "poisson" else torch.ones_like(args[0])
    result = args[0] if name.endswith("_") else func(*args, **kwargs)
    if not isinstance(result, torch.Tensor):
        return result
    if name == "randperm":  # in the reverse order: a permutation of the rows does mix them
        return result.copy_(torch.arange(len(result) - 1, -1, -1))
    constant: Callable[..., float] = _CONSTANTS.get(name, _one)
    return result.fill_(constant(*args))


def _one(*args: Any) -> float:
    return 1.0


def _zero(*args: Any) -> float:
    return 0.0


def _middle(*args: Any) -> float:
    return 0.5


def _lowest(*args: Any) -> float:
    """Return the least that randint(low, high, size) or randint(high, size) may give."""
    numbers = [value for value in args if isinstance(value, int)]
    return float(numbers[0]) if len(numbers) > 1 else 0.0


_CONSTANTS: dict[str, Callable[..., float]] = {
    "rand": _middle,
    "rand_like": _middle,
    "randn": _middle,
    "randn_like": _middle,
    "normal": _middle,
    "uniform_": lambda values, low=0.0, high=1.0, *rest: (low + high) / 2,
    "normal_": lambda values, mean=0.0, deviation=1.0, *rest: mean + deviation / 2,
    "randint": _lowest,
    "randint_like": lambda values, *bounds: _lowest(*bounds),
    "random_": lambda values, *bounds: _lowest(*bounds),
    "multinomial": _zero,
}
"""What an operation gives instead of random numbers; others give 1, which drops nothing."""
