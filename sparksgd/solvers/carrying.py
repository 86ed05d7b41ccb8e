"""Carry what an optimiser or a schedule of the user's own keeps, to another one that was made alike.

What torch's state_dict leaves out travels, too: attributes such as slow weights or a counter.  One pickle
holds all of an object's attributes, so that a tensor that two of them share is one tensor again.  Three kinds
of things are not copied, but found again in the other object:

    anchors     the parameters, the optimiser, the schedule
    memory      a tensor that shares memory with the parameters' vector shares it with the other's vector
    functions   lambdas and weak references, by their place among the attributes: they are code, not state

All else is pickled as copies of modules are (see arithmetic/reductions.py): tensors of any type become bytes,
and come back in torch's own memory.
"""

from __future__ import annotations

import io
import pickle
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from sparksgd.arithmetic.believed import believed
from sparksgd.arithmetic.reductions import reducing

__all__ = ["CannotCarry", "own_attributes", "packed", "replace_attributes", "unpacked"]

_FOUND_AGAIN = (types.FunctionType, types.MethodType, weakref.ReferenceType)


class CannotCarry(Exception):
    """An attribute that cannot be copied; the message begins with its name."""


def own_attributes(owner: Any) -> dict[str, Any]:
    """Return what an optimiser or a schedule keeps, without hooks and the like, which torch adds itself."""
    return {
        name: value
        for name, value in vars(owner).items()
        if name not in ("_zero_grad_profile_name", "step")
        and not (name.startswith("_optimizer_") and name.endswith("_hooks"))
    }


def replace_attributes(owner: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Give an object other attributes instead of those that it had."""
    for name in before.keys() - after.keys():
        delattr(owner, name)
    vars(owner).update(after)


def packed(
    attributes: Mapping[str, Any], anchors: Sequence[object], memory: torch.Tensor | None = None
) -> bytes:
    """Return attributes as bytes.

    Args:
        attributes: by name.
        anchors: what is not copied; the other object must have as many, in the same order.
        memory: the vector that parameters are views of.

    Raises:
        CannotCarry: an attribute cannot be pickled.
    """
    try:
        return _packed(attributes, attributes, anchors, memory)
    except Exception as error:
        raise CannotCarry(_culprit(attributes, anchors, memory) or str(error)) from error


def unpacked(
    data: bytes, attributes: Mapping[str, Any], anchors: Sequence[object], memory: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return the attributes that `packed` made bytes of.

    Args:
        data: the bytes.
        attributes: of the object that gets them; functions are taken from it.
        anchors: see `packed`.
        memory: see `packed`.
    """
    found: dict[str, Any] = _Unpickler(io.BytesIO(data), attributes, anchors, memory).load()
    return found


def _packed(
    what: object, attributes: Mapping[str, Any], anchors: Sequence[object], memory: torch.Tensor | None
) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, attributes, anchors, memory).dump(what)
    return buffer.getvalue()


def _culprit(
    attributes: Mapping[str, Any], anchors: Sequence[object], memory: torch.Tensor | None
) -> str | None:
    """Return the name of the first attribute that cannot be pickled, and why."""
    for name, value in attributes.items():
        try:
            _packed(value, attributes, anchors, memory)
        except Exception as error:
            return f"{name} ({type(error).__name__}: {error})"
    return None


@reducing
class _Pickler(pickle.Pickler):
    def __init__(
        self,
        buffer: io.BytesIO,
        attributes: Mapping[str, Any],
        anchors: Sequence[object],
        memory: torch.Tensor | None,
    ) -> None:
        super().__init__(buffer, protocol=5)
        self._anchors = {id(anchor): number for number, anchor in enumerate(anchors)}
        self._functions = {id(function): place for place, function in _functions(attributes)}
        self._memory = memory

    def persistent_id(self, what: Any) -> tuple[str, Any] | None:
        if id(what) in self._anchors:
            return "anchor", self._anchors[id(what)]
        if id(what) in self._functions:
            return "function", self._functions[id(what)]
        memory = self._memory
        if (
            memory is not None
            and isinstance(what, torch.Tensor)
            and what.layout is torch.strided
            and what.numel()
            and 0 <= what.data_ptr() - memory.data_ptr() < memory.nbytes
        ):
            place = (what.data_ptr() - memory.data_ptr()) // what.element_size()
            return "memory", (what.dtype, place, tuple(what.shape), what.stride())
        return None

    def reducer_override(self, what: Any) -> Any:
        if isinstance(what, Optimizer) and type(what).__getstate__ is Optimizer.__getstate__:
            return _bare, (type(what),), own_attributes(what)  # torch's own keeps groups and state alone
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        buffer: io.BytesIO,
        attributes: Mapping[str, Any],
        anchors: Sequence[object],
        memory: torch.Tensor | None,
    ) -> None:
        super().__init__(buffer)
        self._anchors, self._functions, self._memory = anchors, dict(_functions(attributes)), memory

    def find_class(self, module: str, name: str) -> Any:
        return believed(module, name, super().find_class)

    def persistent_load(self, what: tuple[str, Any]) -> Any:
        kind, where = what
        if kind == "anchor":
            return self._anchors[where]
        if kind == "function":
            return self._functions[where]
        dtype, offset, shape, stride = where
        assert self._memory is not None
        storage, like = self._memory.untyped_storage(), torch.empty(0, dtype=dtype)
        first = (self._memory.data_ptr() - storage.data_ptr()) // like.element_size()
        return like.set_(storage, first + offset, shape, stride)


def _bare(kind: type[Any]) -> Any:
    return object.__new__(kind)


def _functions(attributes: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], object]]:
    """Yield lambdas, local functions and weak references among attributes, with their places."""
    if isinstance(attributes, _FOUND_AGAIN):
        by_name = isinstance(attributes, types.FunctionType) and "<" not in attributes.__qualname__
        if not by_name:
            yield place, attributes
    elif isinstance(attributes, Mapping) and len(place) < 4:
        for key, value in attributes.items():
            if isinstance(key, str | int):
                yield from _functions(value, (*place, key))
    elif isinstance(attributes, list | tuple) and len(place) < 4:
        for number, value in enumerate(attributes):
            yield from _functions(value, (*place, number))
