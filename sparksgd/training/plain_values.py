"""Plain values that a module keeps as attributes: numbers, texts, and lists, tuples and dictionaries of them.

They may come from anywhere: arguments, the environment, a file, the system's entropy.  A module that is built
again in another process may have others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from torch import nn

__all__ = ["PlainValue", "is_plain", "is_torchs", "plain_values"]

_SCALARS = frozenset((bool, int, float, complex, str, bytes, type(None)))
_CONTAINERS = frozenset((list, tuple, dict))


@dataclass(frozen=True, kw_only=True)
class PlainValue:
    """A plain value in its place."""

    path: str
    """From the module: "encoder.scales", "tables[1]"."""

    value: Any

    put: Callable[[Any], None]
    """Replaces it."""

    is_users: bool
    """Whether it is an attribute of a class that is not torch's own."""

    def differs(self, other: Any) -> bool:
        """Return whether another value is not the same; NaN is itself, and 1 is not 1.0."""
        return self.value is not other and repr(self.value) != repr(other)


def plain_values(module: nn.Module) -> Iterator[PlainValue]:
    """Yield the plain values of a module, each as large as it can be: a list of numbers is one."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        is_users = any(kind.__module__.split(".")[0] not in _NOT_USERS for kind in type(part).__mro__)
        held = vars(part)
        for name in [name for name in held if not is_torchs(name)]:
            path = f"{prefix}.{name}" if prefix else name
            for found, value, put in _within(path, held[name], partial(operator.setitem, held, name), seen):
                yield PlainValue(path=found, value=value, put=put, is_users=is_users)


_NOT_USERS = ("torch", "builtins", "typing", "collections", "abc")


def is_torchs(name: str) -> bool:
    """Return whether an attribute is one of those that every module of torch has, or every lazy one."""
    return name in _TORCHS


_TORCHS = frozenset(vars(nn.Module())) | {"_initialize_hook", "_load_hook"}


def _within(
    path: str, value: Any, put: Callable[[Any], None], seen: set[int]
) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    if is_plain(value):
        yield path, value, put
    elif isinstance(value, list | dict) and id(value) not in seen:
        seen.add(id(value))
        content: Any = dict(value) if isinstance(value, dict) else list(value)
        if type(value) not in _CONTAINERS and is_plain(content):  # a Counter, an OrderedDict
            yield path, content, partial(_refill, value)
            return
        for place, part in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _within(f"{path}[{place!r}]", part, partial(operator.setitem, value, place), seen)


def _refill(container: list[Any] | dict[Any, Any], content: Any) -> None:
    container.clear()
    if isinstance(container, dict):
        for key, value in content.items():  # a Counter's update would add
            container[key] = value
    else:
        container.extend(content)


def is_plain(value: object) -> bool:
    """Return whether a value is plain; quick, however many it holds."""
    if isinstance(value, np.generic):
        return not value.dtype.hasobject
    return type(value) in _SCALARS or (type(value) in _CONTAINERS and _are_plain([value]))


def _are_plain(containers: Collection[Any], depth: int = 0) -> bool:
    """Return whether containers hold plain values; in one pass for each depth, as they may be many."""
    kinds: set[type] = set()
    for container in containers:
        for values in (container, container.values()) if type(container) is dict else (container,):
            kinds.update(map(type, values))
    inner = kinds & _CONTAINERS
    if not kinds <= _SCALARS | _CONTAINERS or depth == _DEEPEST:
        return False
    if not inner:
        return True
    held = chain.from_iterable(chain(c, c.values()) if type(c) is dict else c for c in containers)
    return _are_plain({id(value): value for value in held if type(value) in inner}.values(), depth + 1)


_DEEPEST = 32  # a list may hold itself
