"""Carry what an optimiser and its schedule of the user's own keep, to others that were made alike.

What torch's state_dict leaves out travels, too: attributes such as slow weights or a counter.  One pickle
holds all attributes of both: what two of them share, an object, a tensor or a variable that functions close
over, is one again.  Three kinds of things are not copied, but found again among those of the other:

    anchors     the parameters, the optimiser, the schedule
    memory      a tensor that shares memory with the parameters' vector shares it with the other's vector
    code        of functions that it kept when it was made; what they close over is carried

All else is pickled as copies of modules are (see arithmetic/reductions.py): tensors of any type become bytes,
and come back in torch's own memory.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import sys
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparksgd.arithmetic.believed import believed
from sparksgd.arithmetic.copies import parts
from sparksgd.arithmetic.reductions import reducing

__all__ = ["CannotCarry", "Carrier", "holds_code"]

_CONTAINERS = (list, dict, set, deque, bytearray, Counter, OrderedDict, defaultdict)
_CLOSED = (type, types.ModuleType, types.CodeType, logging.Logger)


class CannotCarry(Exception):
    """An attribute that cannot be copied; the message begins with its name."""


class Carrier:
    """Makes bytes of what its owners keep, and gives them what others kept that were made alike."""

    def __init__(self) -> None:
        self._owners: list[Any] = []
        self._functions: dict[str, types.FunctionType] = {}

    def add(self, owner: object) -> None:
        """Carry what an optimiser or a schedule keeps, too; it was just made."""
        self._owners.append(owner)
        for function in _functions_in(_attributes(owner)):
            self._functions.setdefault(_key(function), function)

    def packed(self, anchors: Sequence[object], memory: torch.Tensor | None = None) -> bytes:
        """Return what the owners keep as bytes.

        Args:
            anchors: what is not copied; the other carrier must be given as many, in the same order.
            memory: the vector that parameters are views of.

        Raises:
            CannotCarry: an attribute cannot be copied.
        """
        kept = [_attributes(owner) for owner in self._owners]
        try:
            return self._dumped(kept, kept, anchors, memory)
        except Exception as error:
            for attributes in kept:
                for name, value in attributes.items():
                    try:
                        self._dumped(value, kept, anchors, memory)
                    except Exception as own:
                        raise CannotCarry(f"{name} ({type(own).__name__}: {own})") from own
            raise CannotCarry(str(error)) from error

    def unpack(self, data: bytes, anchors: Sequence[object], memory: torch.Tensor | None = None) -> None:
        """Give the owners what `packed` made bytes of.

        Args:
            data: the bytes.
            anchors: see `packed`.
            memory: see `packed`.
        """
        kept = _Unpickler(io.BytesIO(data), self._functions, anchors, memory).load()
        if [type(attributes) for attributes in kept] != [dict] * len(self._owners):
            raise pickle.UnpicklingError(f"it is not of {len(self._owners)} owners")
        for owner, attributes in zip(self._owners, kept, strict=True):
            for name in _attributes(owner).keys() - attributes.keys():
                delattr(owner, name)
            vars(owner).update(attributes)
            for name, hooks in attributes.items():
                if _is_table_of_hooks(name) and hooks:
                    RemovableHandle.next_id = max(RemovableHandle.next_id, *(key + 1 for key in hooks))

    def _dumped(
        self,
        what: object,
        kept: Sequence[Mapping[str, Any]],
        anchors: Sequence[object],
        memory: torch.Tensor | None,
    ) -> bytes:
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, self._functions, anchors, memory)
        pickler.dump(what)
        if pickler.weakly_held:
            held = {id(one) for one in (*anchors, *_all_in(kept))}
            lost = [one for one in pickler.weakly_held if one is not None and id(one) not in held]
            if lost:
                raise TypeError(
                    f"it refers weakly to a {type(lost[0]).__name__} that no attribute holds, and that would "
                    f"be gone in another process"
                )
        return buffer.getvalue()


def holds_code(value: object) -> bool:
    """Return whether an object holds functions or what can be called like one."""
    return any(callable(one) for one in _all_in(value))


def _attributes(owner: Any) -> dict[str, Any]:
    """Return what an optimiser or a schedule keeps, without what torch adds itself."""
    return {
        name: value
        for name, value in vars(owner).items()
        if name != "_zero_grad_profile_name"
        and not (_is_table_of_hooks(name) and not value)
        and not (name == "step" and hasattr(value, "_wrapped_by_lr_sched"))  # each schedule wraps its own
    }


def _is_table_of_hooks(name: str) -> bool:
    return name.startswith("_optimizer_") and name.endswith("_hooks")


def _all_in(value: object) -> Iterator[object]:
    """Yield an object and all that it holds, but not weakly, each once."""
    seen, left = set[int](), [value]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, _CLOSED):
            continue
        seen.add(id(one))
        yield one
        left += (part for _, part in parts(one))


def _functions_in(value: object) -> Iterator[types.FunctionType]:
    for one in _all_in(value):
        function = one.__func__ if isinstance(one, types.MethodType) else one
        if isinstance(function, types.FunctionType):
            yield function


def _key(function: types.FunctionType) -> str:
    """Return what two functions of the same code have in common, in any process."""
    digest = hashlib.sha256(_text_of(function.__code__).encode("utf-8", "backslashreplace")).hexdigest()
    return f"{function.__module__}.{function.__qualname__}:{digest[:16]}"


def _text_of(constant: Any) -> str:
    if isinstance(constant, types.CodeType):
        names = constant.co_names, constant.co_varnames, constant.co_freevars
        inner = ",".join(map(_text_of, constant.co_consts))
        return f"{constant.co_code.hex()} {names} {constant.co_argcount} {constant.co_flags} ({inner})"
    if isinstance(constant, frozenset):  # in any order
        return f"{{{sorted(map(repr, constant))}}}"
    return repr(constant)


def _has_a_name(function: types.FunctionType) -> bool:
    """Return whether a name leads to a function: it is one of its file then, and carried by its name."""
    found: object = sys.modules.get(function.__module__)
    try:
        for name in function.__qualname__.split("."):
            found = getattr(found, name)
    except AttributeError:
        return False
    return found is function


class _Code:
    """The code of a function; no pickle can call it."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function


@reducing
class _Pickler(pickle.Pickler):
    def __init__(
        self,
        buffer: io.BytesIO,
        functions: Mapping[str, types.FunctionType],
        anchors: Sequence[object],
        memory: torch.Tensor | None,
    ) -> None:
        super().__init__(buffer, protocol=5)
        self._anchors = {id(anchor): number for number, anchor in enumerate(anchors)}
        self._functions, self._memory = functions, memory
        self.weakly_held: list[object] = []

    def persistent_id(self, what: Any) -> tuple[str, Any] | None:
        if id(what) in self._anchors:
            return "anchor", self._anchors[id(what)]
        kind = type(what)
        if kind is _Code:
            return "code", _key(what.function)
        if kind is types.FunctionType and _has_a_name(what) and (key := _key(what)) in self._functions:
            return "function", key
        if kind is weakref.ref:
            self.weakly_held.append(what())
        elif kind in weakref.ProxyTypes:
            raise TypeError("it is a weak proxy; keep the object, or a weakref.ref of it")
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
            return _bare, (type(what),), _attributes(what)  # torch's own keeps groups and state alone
        if isinstance(what, types.FunctionType) and not _has_a_name(what):
            if _key(what) not in self._functions:
                raise TypeError(
                    f"it is the function {what.__qualname__}, which was not there when the optimiser and the "
                    f"schedule were made: make it in __init__, or in a file of its own name"
                )
            state = what.__defaults__, what.__kwdefaults__, what.__dict__
            return _function, (_Code(what), what.__closure__ or ()), state, None, None, _fill_function
        if isinstance(what, types.CellType):
            return _cell, (), _held_by(what), None, None, _fill_cell
        if isinstance(what, types.BuiltinMethodType) and type(what.__self__) in _CONTAINERS:
            return _method, (what.__self__, what.__name__)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        buffer: io.BytesIO,
        functions: Mapping[str, types.FunctionType],
        anchors: Sequence[object],
        memory: torch.Tensor | None,
    ) -> None:
        super().__init__(buffer)
        self._functions, self._anchors, self._memory = functions, anchors, memory

    def find_class(self, module: str, name: str) -> Any:
        return believed(module, name, super().find_class)

    def persistent_load(self, what: tuple[str, Any]) -> Any:
        kind, where = what
        if kind == "anchor":
            return self._anchors[where]
        if kind in ("code", "function"):
            if where not in self._functions:
                raise pickle.UnpicklingError(f"it keeps {where}, which is not there when it is made anew")
            function = self._functions[where]
            return _Code(function) if kind == "code" else function
        dtype, offset, shape, stride = where
        assert self._memory is not None
        storage, like = self._memory.untyped_storage(), torch.empty(0, dtype=dtype)
        first = (self._memory.data_ptr() - storage.data_ptr()) // like.element_size()
        return like.set_(storage, first + offset, shape, stride)


def _bare(kind: type[Any]) -> Any:
    return object.__new__(kind)


def _held_by(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def _cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, held: tuple[Any, ...]) -> None:
    assert type(cell) is types.CellType
    for value in held:
        cell.cell_contents = value


def _function(code: _Code, closure: tuple[types.CellType, ...]) -> types.FunctionType:
    """Return a function of this code that closes over these variables."""
    like = code.function
    made = types.FunctionType(like.__code__, like.__globals__, like.__name__, None, closure or None)
    made.__qualname__, made.__module__ = like.__qualname__, like.__module__
    return made


def _fill_function(function: types.FunctionType, state: tuple[Any, Any, dict[str, Any]]) -> None:
    assert type(function) is types.FunctionType
    assert not _has_a_name(function)  # that one is its file's, and of all who use it
    function.__defaults__, function.__kwdefaults__ = state[:2]
    function.__dict__.update(state[2])


def _method(owner: Any, name: str) -> Any:
    """Return a method of a container, such as append of a list."""
    if type(owner) not in _CONTAINERS or name.startswith("_"):
        raise pickle.UnpicklingError(f"{name} of a {type(owner).__name__} is not carried")
    return getattr(owner, name)
