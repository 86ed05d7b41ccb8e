"""State of a module or a loss that is no parameter and no buffer, which would make bits differ.

A counter, a tensor kept as an attribute, a list, a generator of one's own: workers have one each, and what
they hold depends on which shards a worker computed before.  So every piece must leave this state as it was.
Some modules write what they never read from an earlier piece: the last activation, a cache of masks.  The
trial proves that (`harmless_state`); then each piece starts from the first state again.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pickle
import random
import re
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.copies import parts
from sparksgd.errors import ModelError

__all__ = ["Watch", "refusal"]

_IMMUTABLE = (
    int, float, complex, str, bytes, type(None), type, range, slice, types.ModuleType, types.CodeType,
    types.BuiltinFunctionType, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    enum.Enum, PurePath, re.Pattern, np.generic, np.dtype, np.ufunc, datetime.date, datetime.time,
    datetime.timedelta, datetime.tzinfo, decimal.Decimal, fractions.Fraction, weakref.ReferenceType,
)  # fmt: skip
_TABLES = ("_parameters", "_buffers", "_modules")


class Watch:
    """The state of a module and its loss as they are now, to which each piece returns.

    Args:
        module: its parameters and buffers are not looked at: others do that.
        loss: any callable; all that it holds is looked at.
        harmless: paths of attributes that a piece may leave changed.
    """

    def __init__(self, module: nn.Module, loss: object, harmless: frozenset[str] = frozenset()) -> None:
        self._harmless = harmless
        seen = {id(part) for part in (*module.modules(), *module.parameters(), *module.buffers())}
        self._tables: list[_Table] = []
        for path, part in module.named_modules():
            self._tables.append(_Table(path, part, seen))
        inner: list[_Held] = []
        if isinstance(loss, nn.Module):
            seen.update(map(id, loss.modules()))
            for path, part in loss.named_modules(prefix="loss"):
                self._tables.append(_Table(path, part, seen))
            fixed = [(name, one) for name, one in loss.named_parameters() if not one.requires_grad]
            inner += [_Bytes(f"loss.{name}", one) for name, one in (*loss.named_buffers(), *fixed)]
        elif (held := _held("loss", loss, seen)) is not None:
            inner.append(held)
        self._inner = inner
        self._outer = [one for table in self._tables for one in table.inner]
        self._same = [(vars(table.module), table.values) for table in self._tables]

    def changed(self) -> list[str]:
        """Return the paths of the attributes that are not as they were."""
        if self._is_same():
            return []
        found = {path: None for table in self._tables for path in table.changed()}
        found |= {one.path: None for one in self._inner if one.is_changed()}
        return list(found)

    def require_unchanged(self) -> None:
        """Refuse what changed; where that was shown to be harmless, return to the first state.

        Raises:
            ModelError: an attribute changed.
        """
        if self._is_same():
            return
        for path in self.changed():
            if path not in self._harmless:
                raise refusal(path)
        self.restore()

    def restore(self) -> None:
        """Return to the first state."""
        if self._is_same():
            return
        for table in self._tables:
            table.restore()
        for one in self._inner:
            if one.is_changed():
                one.restore()

    def _is_same(self) -> bool:
        try:
            for now, before in self._same:
                if now != before:
                    return False
        except Exception:  # two tensors, or two arrays, of which there is no one answer
            return False
        return not any(one.is_changed() for one in (*self._outer, *self._inner))


def refusal(path: str) -> ModelError:
    """Return the error about an attribute that keeps something from piece to piece."""
    return ModelError(
        f"{path} changes as the module trains; its value would depend on which worker ran last. Make it in "
        f"forward each time, or register what belongs to the model as a parameter or a buffer; draw random "
        f"numbers from torch's, numpy's or Python's global generators, which are seeded for every piece"
    )


class _Table:
    """The attributes of one module."""

    def __init__(self, path: str, module: nn.Module, seen: set[int]) -> None:
        self.path, self.module = path, module
        self.values = {
            name: value.copy() if _is_table(name, value) else value for name, value in vars(module).items()
        }
        self.inner: list[_Held] = []
        self._inner_of: dict[str, list[_Held]] = {}
        for name, value in vars(module).items():
            if name in _TABLES:
                continue
            values = value.values() if _is_table(name, value) and isinstance(value, dict) else [value]
            found = [held for one in values if (held := _held(self._named(name), one, seen)) is not None]
            if found and not (_is_table(name, value) and isinstance(value, set)):
                self._inner_of[name] = found
                self.inner += found

    def _named(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def changed(self) -> Iterator[str]:
        """Yield the paths of the attributes that changed."""
        now = vars(self.module)
        for name in {**self.values, **now}:
            before = self.values.get(name, _ABSENT)
            value = now.get(name, _ABSENT)
            if name in _TABLES:
                yield from map(self._named, _changed_names(name, before, value))
            elif _differ(name, before, value):
                yield self._named(name)
            else:
                yield from (held.path for held in self._inner_of.get(name, ()) if held.is_changed())

    def restore(self) -> None:
        """Return to the first values."""
        now = vars(self.module)
        for name in [name for name in now if name not in self.values]:
            del now[name]
        for name, before in self.values.items():
            if name in _TABLES or not _differ(name, before, now.get(name, _ABSENT)):
                continue
            if _is_table(name, before):
                now[name].clear()
                now[name].update(before)
            else:
                now[name] = before
        for held in self.inner:
            if held.is_changed():
                held.restore()


class _Absent:
    pass


_ABSENT = _Absent()


def _is_table(name: str, value: object) -> bool:
    """Return whether an attribute is one of torch's own tables of a module: parameters, hooks, and so on."""
    return name.startswith("_") and isinstance(value, dict | set) and name in _TORCHS_TABLES


_TORCHS_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))


def _changed_names(table: str, before: Any, now: Any) -> Iterator[str]:
    """Yield the names of parameters, buffers or submodules that came, went or (no buffers) were replaced."""
    for name in {**before, **now}:
        one, other = before.get(name, _ABSENT), now.get(name, _ABSENT)
        is_buffer = table == "_buffers" and isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        if one is not other and not is_buffer:
            yield name


def _differ(name: str, before: Any, now: Any) -> bool:
    """Return whether an attribute is another object that may be of another value."""
    if before is now:
        return False
    if _is_table(name, before) and type(before) is type(now):
        if isinstance(before, set):
            return bool(before != now)
        return [id(one) for one in before.values()] != [id(one) for one in now.values()]
    return not _equal(before, now)


def _equal(before: Any, now: Any) -> bool:
    """Return whether two objects can stand for each other; False where that is not sure."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, tuple):
        return len(before) == len(now) and all(map(_equal, before, now))
    if isinstance(before, list | dict):
        return not len(before) and not len(now)
    if isinstance(before, _IMMUTABLE):
        try:
            return bool(before == now)
        except Exception:
            return False
    return isinstance(before, types.MethodType) and before == now


# Objects that can change inside


def _held(path: str, value: Any, seen: set[int]) -> _Held | None:
    """Return what can tell whether an object changed inside; None: it cannot change, or another one tells."""
    if isinstance(value, _IMMUTABLE) or id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, torch.Tensor | np.ndarray | bytearray):
        return _Bytes(path, value)
    if (state := _state_of(value)) is not None:
        return _State(path, value, *state)
    if _is_of_torch(value):
        return None
    inner = [held for _, part in parts(value) if (held := _held(path, part, seen)) is not None]
    if isinstance(value, types.FunctionType):
        return _Several(path, value, [*inner, _Variables(path, value)])
    if isinstance(value, types.MethodType | partial | tuple | frozenset):
        return _Several(path, value, inner) if inner else None
    return _Several(path, value, inner, _contents(value))


def _is_of_torch(value: object) -> bool:
    """Return whether a function or an object is torch's own business: a compiled graph, a handle."""
    one = value if isinstance(value, types.FunctionType) else type(value)
    return one.__module__.split(".")[0] == "torch" and not one.__module__.startswith("torch.nn.")


class _Held:
    """An object that can change inside, as it was.

    Args:
        path: of the attribute that holds it.
        value: the object.
    """

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.value = path, value

    def is_changed(self) -> bool:
        """Return whether it is not as it was."""
        raise NotImplementedError

    def restore(self) -> None:
        """Make it as it was."""
        raise NotImplementedError


class _Bytes(_Held):
    """A tensor or an array."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(path, value)
        self._before = _copy_of(value)

    def is_changed(self) -> bool:
        return not _same_bytes(self._before, self.value)

    def restore(self) -> None:
        if isinstance(self.value, torch.Tensor):
            values = self.value.detach()
            if values.shape == self._before.shape and values.dtype == self._before.dtype:
                values.copy_(self._before)
            else:
                self.value.data = self._before.clone()
        else:
            self.value[...] = self._before


class _State(_Held):
    """An object whose state is asked from it: a generator."""

    def __init__(
        self, path: str, value: Any, get: Callable[[], Any], set_to: Callable[[Any], object] | None
    ) -> None:
        super().__init__(path, value)
        self._get, self._set = get, set_to
        self._before, self._bytes = get(), _pickled(get())

    def is_changed(self) -> bool:
        return _pickled(self._get()) != self._bytes

    def restore(self) -> None:
        if self._set is None:
            raise refusal(self.path)
        self._set(self._before)


class _Variables(_Held):
    """The variables that a function closes over, and its attributes."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(path, value)
        self._before, self._attributes = self._now(), dict(value.__dict__)

    def _now(self) -> list[Any]:
        found = []
        for cell in self.value.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:
                found.append(_ABSENT)
        return found

    def is_changed(self) -> bool:
        attributes = self.value.__dict__
        if len(attributes) != len(self._attributes) or not all(map(_equal, self._before, self._now())):
            return True
        return not all(_equal(one, attributes.get(name)) for name, one in self._attributes.items())

    def restore(self) -> None:
        for cell, before in zip(self.value.__closure__ or (), self._before, strict=True):
            if before is not _ABSENT:
                cell.cell_contents = before
        self.value.__dict__.clear()
        self.value.__dict__.update(self._attributes)


class _Several(_Held):
    """An object of several parts: a list, a dictionary, an object with attributes."""

    def __init__(
        self, path: str, value: Any, inner: list[_Held], contents: list[tuple[Any, Any]] | None = None
    ) -> None:
        super().__init__(path, value)
        self._inner, self._before = inner, contents

    def is_changed(self) -> bool:
        if self._before is not None:
            now = _contents(self.value)
            if len(now) != len(self._before) or not all(
                _same_place(key, place) and _equal(one, other)
                for (key, one), (place, other) in zip(self._before, now, strict=True)
            ):
                return True
        return any(one.is_changed() for one in self._inner)

    def restore(self) -> None:
        if self._before is not None:
            _set_contents(self.value, self._before)
        for one in self._inner:
            if one.is_changed():
                one.restore()


_ITEMS = "items"


def _same_place(key: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return key[0] == other[0] and (key[1] is other[1] or _equal(key[1], other[1]))


def _contents(value: Any) -> list[tuple[Any, Any]]:
    """Return what an object consists of now, each with its place."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        found += [((_ITEMS, key), part) for key, part in list(value.items())]
    elif isinstance(value, list | deque):
        found += [((_ITEMS, number), part) for number, part in enumerate(value)]
    elif isinstance(value, set):
        found += [((_ITEMS, part), part) for part in sorted(value, key=id)]
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for name, part in attributes.items():
            if isinstance(value, nn.Module) and name in _TABLES:
                found += [((name, key), one) for key, one in part.items()]
            else:
                found.append(((None, name), part))
    return found


def _set_contents(value: Any, contents: list[tuple[Any, Any]]) -> None:
    items = [(key, part) for (kind, key), part in contents if kind == _ITEMS]
    if isinstance(value, MutableMapping):
        value.clear()
        value.update(items)
    elif isinstance(value, MutableSequence):
        value.clear()
        value.extend(part for _, part in items)
    elif isinstance(value, MutableSet):
        value.clear()
        value.update(part for _, part in items)  # type: ignore[attr-defined]  # sets have it
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        kept = {key: part for (kind, key), part in contents if kind is None}
        for name in [name for name in attributes if name not in kept and name not in _TABLES]:
            del attributes[name]
        attributes.update(kept)


def _state_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object] | None] | None:
    """Return how to get and set the state of an object that hides it; None: it hides nothing."""
    if isinstance(value, torch.Generator):
        return lambda: value.get_state().numpy().tobytes(), lambda state: value.set_state(
            torch.frombuffer(bytearray(state), dtype=torch.uint8)
        )
    if isinstance(value, np.random.RandomState):
        return partial(value.get_state, legacy=False), value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, partial(setattr, bits, "state")
    if isinstance(value, np.random.BitGenerator):
        return lambda: value.state, partial(setattr, value, "state")
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    is_plain = isinstance(value, Mapping | list | tuple | set | frozenset | deque | partial)
    is_code = isinstance(value, types.FunctionType | types.MethodType)
    if is_plain or is_code or hasattr(value, "__dict__"):
        return None
    return lambda: _pickled(value), None


def _pickled(state: Any) -> bytes:
    try:
        return pickle.dumps(state)
    except Exception:
        return b""


def _copy_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return value.copy()


def _same_bytes(before: Any, now: Any) -> bool:
    if isinstance(before, bytearray):
        return bool(before == now)
    if isinstance(before, np.ndarray):
        if before.shape != now.shape or before.dtype != now.dtype:
            return False
        if before.dtype.hasobject:
            return all(map(_equal, before.ravel().tolist(), now.ravel().tolist()))
        return bool(before.tobytes() == now.tobytes())
    if before.shape != now.shape or before.dtype != now.dtype or before.layout != now.layout:
        return False
    if before.layout is not torch.strided or before.is_quantized:
        return _pickled(before.detach()) == _pickled(now.detach())
    return torch.equal(_as_bytes(before), _as_bytes(now))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat
