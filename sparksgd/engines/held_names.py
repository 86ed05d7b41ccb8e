"""State around a module: attributes of classes and of tensors, and the globals that its functions use."""

from __future__ import annotations

import dis
import enum
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sparksgd.arithmetic.scripted import SCRIPTED
from sparksgd.engines.held import ABSENT, OPAQUE, Held, Seen, equal, held_of, is_opaque, refusal

__all__ = ["around", "of_tensors"]


class _Names(Held):
    """Variables of a namespace: a class's attributes, or the globals that functions use.

    Args:
        path: what it is.
        value: the namespace.
        names: which of its variables.
        setter: sets one of them.
        inner: what they hold.
        is_whole: whether new variables count, too.
    """

    def __init__(
        self,
        path: str,
        value: Mapping[str, Any],
        names: list[str],
        setter: Callable[[str, Any], object],
        inner: list[Held],
        *,
        is_whole: bool = False,
    ) -> None:
        super().__init__(path, value)
        self._before = [(name, value[name]) for name in names]
        self._known = frozenset(value) if is_whole else None
        self._set, self._inner = setter, inner

    def now(self) -> object:
        own = {name: self.value.get(name) for name, _ in self._before} | self._new()
        return own, *(one.now() for one in self._inner)

    def _new(self) -> dict[str, Any]:
        """Return new attributes of a class or a function."""
        known = self._known
        if known is None or len(self.value) == len(known):
            return {}
        return {name: part for name, part in self.value.items() if name not in known and _is_data(name, part)}

    def is_changed(self) -> bool:
        now = self.value
        for name, before in self._before:
            if now.get(name, ABSENT) is not before and not equal(before, now.get(name, ABSENT)):
                return True
        return bool(self._new()) or any(one.is_changed() for one in self._inner)

    def restore(self) -> None:
        for name, before in self._before:
            if self.value.get(name, ABSENT) is not before:
                self._set(name, before)
        for name in self._new():
            self._set(name, ABSENT)
        for one in self._inner:
            if one.is_changed():
                one.restore()


def _is_data(name: str, value: object) -> bool:
    """Return whether a variable is no class, function or other definition."""
    defined = (types.FunctionType, types.ModuleType, type, property, staticmethod, classmethod)
    is_torchs = name.startswith(("_torch", "_dynamo"))
    is_special = name.startswith("__") and name.endswith("__")
    return not is_special and not is_torchs and not isinstance(value, defined)


def around(roots: list[object], seen: Seen) -> list[Held]:
    """Return the state of classes and functions around modules and a loss, and of the globals that these use.

    Args:
        roots: what is tried.
        seen: what is told elsewhere, with the classes and functions that were met there.
    """
    roots = [one for root in roots for one in (root.modules() if isinstance(root, nn.Module) else [root])]
    kinds = dict.fromkeys(kind for root in roots for kind in type(root).__mro__)
    functions: list[types.FunctionType] = []
    for root in roots:
        attributes = getattr(root, "__dict__", {}).values()
        functions += [one for one in (root, *attributes) if isinstance(one, types.FunctionType)]
    found: list[Held] = []
    visited, watched = _Visited(functions), set[type]()
    while True:
        for kind in seen.kinds:
            kinds |= dict.fromkeys(one for one in (*kind.__mro__, type(kind)) if _is_users(one.__module__))
        functions += [one for one in seen.functions if _is_users(one.__module__)]
        seen.kinds.clear()
        seen.functions.clear()
        kinds |= visited.kinds
        new = [one for one in kinds if one not in watched and one.__module__.split(".")[0] not in _NOT_USERS]
        if not new and not functions:
            break
        for kind in new:
            watched.add(kind)
            found += _of_class(kind, functions, seen)
        for function in visited.follow():
            seen.followed.append(function)
            found += _of_function(function, seen)
        for path, namespace, name in visited.names():
            inner = [] if (held := held_of(path, namespace[name], seen)) is None else [held]
            found.append(_Names(path, namespace, [name], partial(_set_item, namespace), inner))
    return found


def _of_class(kind: type, functions: list[types.FunctionType], seen: Seen) -> list[Held]:
    """Return the state of a class; add its methods to the functions."""
    namespace, path = vars(kind), f"the class {kind.__qualname__}"
    for one in namespace.values():
        if isinstance(one, type):
            seen.kinds[one] = None
        inside = one.__func__ if isinstance(one, staticmethod | classmethod) else one
        if isinstance(inside, SCRIPTED):
            seen.scripted.append(inside)
        accessors = (one.fget, one.fset) if isinstance(one, property) else (inside,)
        functions += [inside for inside in accessors if isinstance(inside, types.FunctionType)]
    names = [name for name, value in namespace.items() if _is_data(name, value)]
    if issubclass(kind, enum.Enum):
        names = [name for name in names if name not in kind.__members__ and not name.startswith("_")]
    inner, setter = _inside(path, namespace, names, seen), partial(_set_of_class, kind)
    found: list[Held] = [_Names(path, namespace, names, setter, inner, is_whole=True)]
    for member in _members(kind):
        own, at = vars(member), f"{path}.{member.name}"
        parts_of = _inside(at, own, [*own], seen)
        found.append(_Names(at, own, [*own], partial(_set_item, own), parts_of, is_whole=True))
    return found


def _members(kind: type) -> list[enum.Enum]:
    """Return the members of an enum, with the combinations of its flags that were made before."""
    if not issubclass(kind, enum.Enum):
        return []
    made = [*kind.__members__.values(), *kind._value2member_map_.values()]
    return list({id(one): one for one in made}.values())


def _of_function(function: types.FunctionType, seen: Seen) -> Iterator[Held]:
    """Yield a function's attributes, its arguments' defaults, and what it closes over."""
    if id(function) not in seen and _is_users(function.__module__):
        namespace, path = vars(function), f"an attribute of the function {function.__qualname__}"
        names = [name for name, value in namespace.items() if _is_data(name, value)]
        inner = _inside(path, namespace, names, seen)
        yield _Names(path, namespace, names, partial(_set_item, namespace), inner, is_whole=True)
        if (
            held := held_of(f"what the function {function.__qualname__} closes over", function, seen)
        ) is not None:
            yield held
    if id(function) in seen.carried:
        return
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount]
    defaults = dict(zip(reversed(arguments), reversed(function.__defaults__ or ()), strict=False))
    defaults |= function.__kwdefaults__ or {}
    for name in defaults:
        yield from _inside(f"the default of {name} in {function.__qualname__}", defaults, [name], seen)


def of_tensors(named: list[tuple[str, torch.Tensor]], seen: Seen) -> list[Held]:
    """Return the attributes and hooks of parameters and buffers."""
    found: list[Held] = []
    for path, tensor in named:
        attributes = vars(tensor)
        for name in attributes:
            inner = [held] if (held := held_of(f"{path}.{name}", attributes[name], seen)) is not None else []
            setter = partial(_set_item, attributes)
            found.append(_Names(f"{path}.{name}", attributes, [name], setter, inner))
        for hook in (hook for table in _hooks_of(tensor) for hook in table.values()):
            if (held := held_of(f"a hook of {path}", hook, seen)) is not None:
                found.append(held)
    if named:
        found.append(_OfTensors("a new attribute or hook of a parameter or buffer", named))
    return found


def _hooks_of(tensor: torch.Tensor) -> list[dict[int, Any]]:
    if not tensor.is_leaf or not tensor.requires_grad:
        return []
    return [tensor._backward_hooks or {}, getattr(tensor, "_post_accumulate_grad_hooks", None) or {}]


class _OfTensors(Held):
    """How many attributes and hooks there are."""

    def __init__(self, path: str, named: list[tuple[str, torch.Tensor]]) -> None:
        super().__init__(path, named)
        self._tensors = [tensor for _, tensor in named]
        self._trained = [tensor for tensor in self._tensors if tensor.is_leaf and tensor.requires_grad]
        self._before = self._count()
        self._names = [set(vars(tensor)) for tensor in self._tensors]

    def now(self) -> object:
        new = [
            {name: value for name, value in vars(tensor).items() if name not in names}
            for tensor, names in zip(self._tensors, self._names, strict=True)
        ]
        return self._count()[1], new

    def _count(self) -> tuple[list[int], list[int]]:
        return (
            [len(vars(tensor)) for tensor in self._tensors],
            [len(tensor._backward_hooks or ()) for tensor in self._trained],
        )

    def is_changed(self) -> bool:
        return self._count() != self._before

    def restore(self) -> None:
        for tensor, names in zip(self._tensors, self._names, strict=True):
            for name in set(vars(tensor)) - names:
                if not name.startswith("_dynamo"):
                    delattr(tensor, name)
        if self._count()[1] != self._before[1]:
            raise refusal(self.path)
        self._before = self._count()


def _set_of_class(kind: type, name: str, value: object) -> None:
    if value is ABSENT:
        delattr(kind, name)
    else:
        setattr(kind, name, value)


def _set_item(namespace: dict[str, Any], name: str, value: object) -> None:
    if value is ABSENT:
        namespace.pop(name, None)
    else:
        namespace[name] = value


def _inside(path: str, namespace: Mapping[str, Any], names: list[str], seen: Seen) -> list[Held]:
    """Return what tells whether the objects of some variables changed inside."""
    return [held for name in names if (held := held_of(path, namespace[name], seen)) is not None]


class _Visited:
    """Functions, and those that they call, if these are of the same file or of users' files.

    Args:
        functions: where to begin; more may be added before each `follow`.
    """

    def __init__(self, functions: list[types.FunctionType]) -> None:
        self._waiting = functions
        self._done: set[int] = set()
        self._told: set[tuple[int, str]] = set()
        self._names: list[tuple[str, dict[str, Any], str]] = []
        self.kinds: dict[type, None] = {}

    def follow(self) -> list[types.FunctionType]:
        """Follow what functions name; return the functions that were met for the first time."""
        met = []
        while self._waiting:
            function = self._waiting.pop()
            if id(function) in self._done or is_opaque(function):
                continue
            self._done.add(id(function))
            met.append(function)
            if isinstance(wrapped := getattr(function, "__wrapped__", None), types.FunctionType):
                self._waiting.append(wrapped)
            names = list(dict.fromkeys(_names_of(function.__code__)))
            if "environ" in names and _writes_items(function.__code__):
                self._tell("os.environ", vars(os), "environ")
            for name in names:
                self._look(function.__globals__, name, names)
        return met

    def _look(self, namespace: dict[str, Any], name: str, names: list[str]) -> None:
        """Look at what a name means among globals, or in a user's file that functions import."""
        value = namespace.get(name, sys.modules.get(name, ABSENT))
        if isinstance(value, types.FunctionType):
            if value.__globals__ is namespace or _is_users(value.__module__):
                self._waiting.append(value)
        elif isinstance(value, type):
            if _is_users(value.__module__):
                self.kinds[value] = None
        elif isinstance(value, types.ModuleType):
            inner = vars(value)
            if inner is not namespace and _is_users(value.__name__):
                for one in names:
                    if one in inner and (id(inner), one) not in self._told:
                        self._look(inner, one, names)
        elif name in namespace and _is_data(name, value) and (id(namespace), name) not in self._told:
            self._tell(f"the global variable {name}", namespace, name)
            if isinstance(wrapped := getattr(value, "__wrapped__", None), types.FunctionType):
                self._waiting.append(wrapped)

    def _tell(self, path: str, namespace: dict[str, Any], name: str) -> None:
        if (id(namespace), name) not in self._told:
            self._told.add((id(namespace), name))
            self._names.append((path, namespace, name))

    def names(self) -> list[tuple[str, dict[str, Any], str]]:
        """Return globals that the functions use and that were not returned before: path, namespace, name."""
        found, self._names = self._names, []
        return found


_NOT_USERS = frozenset((*OPAQUE, "torch", "builtins", "collections", "functools"))


def _is_users(module: object) -> bool:
    """Return whether a Python module is a user's file, not one of Python's or of a package."""
    root = module.split(".")[0] if isinstance(module, str) else "builtins"
    if root in _NOT_USERS or root in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(str(module)), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def _writes_items(code: types.CodeType) -> bool:
    """Return whether code sets or removes items of something."""
    for one in dis.get_instructions(code):
        if one.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") or one.argval in _WRITERS:
            return True
    return any(_writes_items(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))


_WRITERS = ("setdefault", "update", "pop", "popitem", "clear", "__setitem__", "__delitem__")


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
