"""What tells whether an object has changed inside, and makes it as it was: a list, a generator, a global.

What is compared is first identity, then values; tensors and arrays are compared by their bytes.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import re
import types
import weakref
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
)
from functools import partial
from itertools import chain
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.copies import parts
from sparksgd.arithmetic.reductions import slots
from sparksgd.arithmetic.scripted import SCRIPTED
from sparksgd.engines.bytes_of import components, copy_of, same_bytes
from sparksgd.engines.hidden_state import CACHE, cached_in, hides_state, pickled, reduced, state_of
from sparksgd.errors import ModelError

__all__ = [
    "ABSENT",
    "OPAQUE",
    "TABLES",
    "Held",
    "HeldBytes",
    "Seen",
    "equal",
    "held_of",
    "is_opaque",
    "is_plain",
    "refusal",
]

_IMMUTABLE = (
    int, float, complex, str, bytes, type(None), type, range, slice, types.ModuleType, types.CodeType,
    types.BuiltinFunctionType, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    enum.Enum, PurePath, re.Pattern, np.generic, np.dtype, np.ufunc, datetime.date, datetime.time,
    datetime.timedelta, datetime.tzinfo, decimal.Decimal, fractions.Fraction, weakref.ReferenceType,
)  # fmt: skip
TABLES = ("_parameters", "_buffers", "_modules")
OPAQUE = frozenset(
    ("_thread", "abc", "asyncio", "concurrent", "logging", "multiprocessing", "py4j", "pyspark", "sparksgd",
     "threading", "typing", "warnings")
)  # fmt: skip
"""Packages whose objects are their own business; and torch, but for what is in `_OPEN`."""
_OPEN = ("torch.nn.", "torch.optim.", "torch.distributions.")


class _Absent:
    pass


ABSENT = _Absent()


def refusal(path: str) -> ModelError:
    """Return the error about an attribute that keeps something from piece to piece."""
    return ModelError(
        f"{path} changes as the module trains; its value would depend on which worker ran last. Make it in "
        f"forward each time, or register what belongs to the model as a parameter or a buffer; draw random "
        f"numbers from torch's, numpy's or Python's global generators, which are seeded for every piece"
    )


def equal(before: Any, now: Any) -> bool:
    """Return whether two objects can stand for each other; False where that is not sure."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, tuple):
        return len(before) == len(now) and all(map(equal, before, now))
    if isinstance(before, list | dict):
        return not len(before) and not len(now)
    if isinstance(before, _IMMUTABLE):
        try:
            return bool(before == now)
        except Exception:
            return False
    return isinstance(before, types.MethodType) and before == now


# Objects that can change inside


class Seen(set[int]):
    """The ids of objects that are looked at; what was met among them: classes, functions, torch.jit's."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        super().__init__(ids)
        self.kinds: dict[type, None] = {}
        self.functions: list[types.FunctionType] = []
        self.followed: list[types.FunctionType] = []
        """Those whose names were looked up, with what they call."""
        self.scripted: list[Any] = []
        """What torch.jit has made; see `forget_optimised`."""
        self.carried: set[int] = set()
        """The ids of functions that other processes get with what their arguments are by default."""


def held_of(path: str, value: Any, seen: Seen) -> Held | None:
    """Return what can tell whether an object changed inside; None: it cannot change, or another one tells."""
    if isinstance(value, type):
        seen.kinds[value] = None
    elif isinstance(value, enum.Enum):
        seen.kinds[type(value)] = None
    if isinstance(value, _IMMUTABLE) or id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, SCRIPTED):
        seen.scripted.append(value)
    if isinstance(value, torch.Tensor | np.ndarray | bytearray):
        return _held_bytes(path, value, seen)
    if is_plain(value):
        if isinstance(value, tuple | frozenset):
            return None
        items = _Items(path, value)
        if not hasattr(value, "__dict__"):
            return items
        return _Several(path, value, [items], _attributes(value), has_items=False)
    if (state := state_of(value)) is not None:
        return _State(path, value, *state)
    if isinstance(value, types.FunctionType):
        seen.functions.append(value)
    if is_opaque(value):
        return None
    seen.kinds[type(value)] = None
    if isinstance(value, CACHE):
        return _held_cache(path, value, seen)
    if hides_state(value) and (of_c := _Reduced.of(path, value, seen)) is not None:
        return of_c
    inner = [held for _, part in parts(value) if (held := held_of(path, part, seen)) is not None]
    if isinstance(value, types.FunctionType):
        return _Several(path, value, [*inner, _Variables(path, value)])
    if isinstance(value, types.MethodType | partial | tuple | frozenset):
        return _Several(path, value, inner) if inner else None
    return _Several(path, value, inner, _contents(value))


def _held_bytes(path: str, value: Any, seen: Seen) -> Held | None:
    if isinstance(value, torch.Tensor) and value.is_meta:
        return None
    held = HeldBytes(path, value)
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        parts_of = value.ravel().tolist()
        inner = [one for part in parts_of if (one := held_of(path, part, seen)) is not None]
        return _Several(path, value, [held, *inner]) if inner else held
    return held


def _held_cache(path: str, value: Any, seen: Seen) -> Held | None:
    """Return what tells whether the values that a function's cache holds changed: new ones may come."""
    inner = [held for part in cached_in(value) if (held := held_of(path, part, seen)) is not None]
    return _Several(path, value, inner) if inner else None


def is_plain(value: object) -> bool:
    """Return whether a container holds nothing that can change inside; quick, however many it holds."""
    if isinstance(value, dict):
        return _are_immutable(dict.values(value))
    return isinstance(value, list | tuple | set | frozenset | deque) and _are_immutable(value)


def _are_immutable(values: Collection[object]) -> bool:
    kinds = set(map(type, values))
    inner = {kind for kind in kinds if issubclass(kind, tuple | frozenset) and not kind.__dictoffset__}
    if not all(issubclass(kind, _IMMUTABLE) for kind in kinds - inner):
        return False
    held: Iterable[Any] = values if inner == kinds else (one for one in values if type(one) in inner)
    return not inner or _are_immutable(list(chain.from_iterable(held)))


def is_opaque(value: object) -> bool:
    """Return whether a function or an object is no user's: a compiled graph, a handle, a logger."""
    name = (value if isinstance(value, types.FunctionType) else type(value)).__module__
    if not isinstance(name, str):
        return False
    root = name.split(".")[0]
    return root in OPAQUE or (root == "torch" and not name.startswith(_OPEN))


class Held:
    """An object that can change inside, as it was.

    Args:
        path: of the attribute that holds it.
        value: the object.
    """

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.value = path, value

    def now(self) -> object:
        """Return what tells two states apart by their values."""
        return self.value

    def is_changed(self) -> bool:
        """Return whether it is not as it was."""
        raise NotImplementedError

    def restore(self) -> None:
        """Make it as it was."""
        raise NotImplementedError


class HeldBytes(Held):
    """A tensor or an array."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(path, value)
        self._before = copy_of(value)

    def is_changed(self) -> bool:
        return not same_bytes(self._before, self.value)

    def restore(self) -> None:
        if isinstance(self.value, torch.Tensor):
            values = self.value.detach()
            if values.is_nested:
                for now, before in zip(components(values), components(self._before), strict=True):
                    now.copy_(before)
            elif values.shape == self._before.shape and values.dtype == self._before.dtype:
                values.copy_(self._before)
            else:
                self.value.data = self._before.clone()
        elif isinstance(self.value, bytearray):
            self.value[:] = self._before
        else:
            self.value[...] = self._before


class _State(Held):
    """An object whose state is asked from it: a generator."""

    def __init__(
        self, path: str, value: Any, get: Callable[[], Any], set_to: Callable[[Any], object] | None
    ) -> None:
        super().__init__(path, value)
        self._get, self._set = get, set_to
        self._before, self._bytes = get(), pickled(get())

    def now(self) -> object:
        return pickled(self._get())

    def is_changed(self) -> bool:
        return pickled(self._get()) != self._bytes

    def restore(self) -> None:
        if self._set is None:
            raise refusal(self.path)
        self._set(self._before)


class _Reduced(Held):
    """An object with fields of C: compared by what pickle makes of it, one level deep."""

    def __init__(self, path: str, value: Any, before: Any, inner: list[Held]) -> None:
        super().__init__(path, value)
        self._before, self._inner = before, inner

    @classmethod
    def of(cls, path: str, value: Any, seen: Seen) -> _Reduced | None:
        """Return what tells whether it changed, or None."""
        before, again = reduced(value), reduced(value)
        if not isinstance(before, tuple) or not _same_parts(before, again):
            return None
        return cls(path, value, before, list(_held_in(path, before, again, seen)))

    def now(self) -> object:
        return reduced(self.value), *(one.now() for one in self._inner)

    def is_changed(self) -> bool:
        if not _same_parts(self._before, reduced(self.value)):
            return True
        return any(one.is_changed() for one in self._inner)

    def restore(self) -> None:
        raise refusal(self.path)


def _same_parts(before: Any, now: Any) -> bool:
    """Return whether two results of `reduced` say the same; what both hold is told apart by itself."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, list | tuple):
        return len(before) == len(now) and all(map(_same_parts, before, now))
    if isinstance(before, dict):
        pairs = zip(before.items(), now.items(), strict=False)
        return len(before) == len(now) and all(_same_parts(one, other) for one, other in pairs)
    if isinstance(before, torch.Tensor | np.ndarray | bytearray):
        return same_bytes(before, now)
    return equal(before, now)


def _held_in(path: str, before: Any, again: Any, seen: Seen) -> Iterator[Held]:
    """Yield what tells whether objects changed that an object keeps: those that it gives twice."""
    if before is again and not (isinstance(before, tuple) and not before.__class__.__dictoffset__):
        if (held := held_of(path, before, seen)) is not None:
            yield held
    elif isinstance(before, list | tuple):
        for one, other in zip(before, again, strict=True):
            yield from _held_in(path, one, other, seen)
    elif isinstance(before, dict):
        for one, other in zip(before.values(), again.values(), strict=True):
            yield from _held_in(path, one, other, seen)


class _Variables(Held):
    """The variables that a function closes over, and its attributes."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(path, value)
        self._before, self._attributes = self._now(), dict(value.__dict__)

    def now(self) -> object:
        return self._now(), dict(self.value.__dict__)

    def _now(self) -> list[Any]:
        found = []
        for cell in self.value.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:
                found.append(ABSENT)
        return found

    def is_changed(self) -> bool:
        attributes = self.value.__dict__
        if len(attributes) != len(self._attributes) or not all(map(equal, self._before, self._now())):
            return True
        return not all(equal(one, attributes.get(name)) for name, one in self._attributes.items())

    def restore(self) -> None:
        for cell, before in zip(self.value.__closure__ or (), self._before, strict=True):
            if before is not ABSENT:
                cell.cell_contents = before
        self.value.__dict__.clear()
        self.value.__dict__.update(self._attributes)


class _Items(Held):
    """What a container holds, where none of it can change inside: compared by C, as tables may be long."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(path, value)
        self._before = self._now()

    def _now(self) -> tuple[list[Any], ...]:
        """Return the items in their order, in passes that hash nothing."""
        value = self.value
        if not isinstance(value, dict):
            return (list(value),)
        own_order = [] if type(value) is dict else list(value)  # an OrderedDict has one of its own
        return list(dict.keys(value)), list(dict.values(value)), own_order

    def is_changed(self) -> bool:
        try:
            now = self._now()
            if now == self._before:
                return False
            return not isinstance(self.value, set) or set(now[0]) != set(self._before[0])
        except Exception:
            return True

    def restore(self) -> None:
        if isinstance(self.value, list):
            self.value[:] = self._before[0]
            return
        self.value.clear()
        if isinstance(self.value, dict):
            keys, values, own_order = self._before
            held = dict(zip(keys, values, strict=True))
            self.value.update({key: held[key] for key in own_order or keys})
        elif isinstance(self.value, set):
            self.value.update(self._before[0])
        else:
            self.value.extend(self._before[0])


class _Several(Held):
    """An object of several parts: a list, a dictionary, an object with attributes."""

    def __init__(
        self,
        path: str,
        value: Any,
        inner: list[Held],
        contents: list[tuple[Any, Any]] | None = None,
        *,
        has_items: bool = True,
    ) -> None:
        super().__init__(path, value)
        self._inner, self._before, self._has_items = inner, contents, has_items

    def now(self) -> object:
        return self.value, *(one.now() for one in self._inner)

    def is_changed(self) -> bool:
        if self._before is not None:
            now = _contents(self.value) if self._has_items else _attributes(self.value)
            if len(now) != len(self._before) or not all(
                _same_place(key, place) and equal(one, other)
                for (key, one), (place, other) in zip(self._before, now, strict=True)
            ):
                return True
        return any(one.is_changed() for one in self._inner)

    def restore(self) -> None:
        if self._before is not None:
            if self._has_items:
                _set_items(self.value, self._before)
            _set_attributes(self.value, self._before)
        for one in self._inner:
            if one.is_changed():
                one.restore()


_ITEMS, _SLOT = "items", "slot"


def _same_place(key: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return key[0] == other[0] and (key[1] is other[1] or equal(key[1], other[1]))


def _contents(value: Any) -> list[tuple[Any, Any]]:
    """Return what an object consists of now, each with its place."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        found += [((_ITEMS, key), part) for key, part in list(value.items())]
    elif isinstance(value, list | deque):
        found += [((_ITEMS, number), part) for number, part in enumerate(value)]
    elif isinstance(value, set):
        found += [((_ITEMS, part), part) for part in sorted(value, key=id)]
    return found + _attributes(value)


def _attributes(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for name, part in attributes.items():
            if isinstance(value, nn.Module) and name in TABLES:
                found += [((name, key), one) for key, one in part.items()]
            else:
                found.append(((None, name), part))
    found += [((_SLOT, name), getattr(value, name)) for name in slots(type(value)) if hasattr(value, name)]
    return found


def _set_items(value: Any, contents: list[tuple[Any, Any]]) -> None:
    items = [(key, part) for (kind, key), part in contents if kind == _ITEMS]
    if isinstance(value, MutableMapping):
        value.clear()
        value.update(dict(items))  # a Counter would count pairs
    elif isinstance(value, MutableSequence):
        value.clear()
        value.extend(part for _, part in items)
    elif isinstance(value, MutableSet):
        value.clear()
        value.update(part for _, part in items)  # type: ignore[attr-defined]  # sets have it


def _set_attributes(value: Any, contents: list[tuple[Any, Any]]) -> None:
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        kept = {key: part for (kind, key), part in contents if kind is None}
        for name in [name for name in attributes if name not in kept and name not in TABLES]:
            del attributes[name]
        attributes.update(kept)
    in_slots = {key: part for (kind, key), part in contents if kind is _SLOT}
    for name in slots(type(value)):
        if name in in_slots:
            object.__setattr__(value, name, in_slots[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)
