"""State around a module: attributes of classes and of tensors, and the globals that its functions use."""

from __future__ import annotations

import argparse
import enum
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.engines.held import ABSENT, OPAQUE, Held, equal, held_of, is_opaque, refusal

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
        self._size = len(value) if is_whole else -1
        self._set, self._inner = setter, inner

    def now(self) -> object:
        return {name: self.value.get(name) for name, _ in self._before} | self._new()

    def _new(self) -> dict[str, Any]:
        """Return new attributes of a class or a function."""
        if self._size < 0 or len(self.value) == self._size:
            return {}
        known = {name for name, _ in self._before}
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


def around(roots: list[object], seen: set[int]) -> list[Held]:
    """Return the state of the classes of modules and a loss, and the globals that their functions use."""
    classes: dict[type, None] = {}
    functions: list[types.FunctionType] = []
    for root in roots:
        parts_of = root.modules() if isinstance(root, nn.Module) else [root]
        for part in parts_of:
            if isinstance(part, types.FunctionType):
                functions.append(part)
            classes |= dict.fromkeys(type(part).__mro__)
            attributes = getattr(part, "__dict__", {})
            functions += [one for one in attributes.values() if isinstance(one, types.FunctionType)]
    found: list[Held] = []
    waiting = list(classes)
    visited = _Visited(functions)
    watched: set[type] = set()
    while waiting:
        kinds, waiting = waiting, []
        for kind in kinds:
            if kind in watched or kind.__module__.split(".")[0] in _NOT_USERS:
                continue
            watched.add(kind)
            for one in vars(kind).values():
                inside = one.__func__ if isinstance(one, staticmethod | classmethod) else one
                inside = inside.fget if isinstance(inside, property) else inside
                functions += [inside] if isinstance(inside, types.FunctionType) else []
            namespace, path = vars(kind), f"the class {kind.__qualname__}"
            names = [name for name, value in namespace.items() if _is_data(name, value)]
            inner = _plain(path, namespace, names, seen)
            setter = partial(_set_of_class, kind)
            found.append(_Names(path, namespace, names, setter, inner, is_whole=True))
        waiting += visited.follow()
    for variables, names in visited.globals():
        for name in names:
            path = f"the global variable {name}"
            inner = _plain(path, variables, [name], seen)
            found.append(_Names(path, variables, [name], partial(_set_item, variables), inner))
    for function in visited.functions:
        found += _of_function(function, seen)
    return found


def _of_function(function: types.FunctionType, seen: set[int]) -> Iterator[Held]:
    """Yield a function's attributes and its arguments' defaults; what it closes over is told elsewhere."""
    if id(function) not in seen and _is_users(function.__module__):
        namespace, path = vars(function), f"an attribute of the function {function.__qualname__}"
        names = [name for name, value in namespace.items() if _is_data(name, value)]
        inner = _plain(path, namespace, names, seen)
        yield _Names(path, namespace, names, partial(_set_item, namespace), inner, is_whole=True)
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount]
    defaults = dict(zip(reversed(arguments), reversed(function.__defaults__ or ()), strict=False))
    defaults |= function.__kwdefaults__ or {}
    for name in defaults:
        yield from _plain(f"the default of {name} in {function.__qualname__}", defaults, [name], seen)


def of_tensors(named: list[tuple[str, torch.Tensor]], seen: set[int]) -> list[Held]:
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


def _plain(path: str, namespace: Mapping[str, Any], names: list[str], seen: set[int]) -> list[Held]:
    """Return what holds values that others may share; other objects are told apart only as such."""
    kinds = (dict, list, set, deque, bytearray, torch.Tensor, np.ndarray, torch.Generator,
             np.random.Generator, np.random.RandomState, random.Random, itertools.count, itertools.cycle,
             types.SimpleNamespace, argparse.Namespace)  # fmt: skip
    values = [namespace[name] for name in names if isinstance(namespace[name], kinds)]
    return [held for value in values if (held := held_of(path, value, seen)) is not None]


class _Visited:
    """Functions, and those that they call, if these are of the same file or of users' files.

    Args:
        functions: where to begin; more may be added before each `follow`.
    """

    def __init__(self, functions: list[types.FunctionType]) -> None:
        self._waiting = functions
        self.functions: list[types.FunctionType] = []
        self._done: set[int] = set()
        self._globals: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}

    def follow(self) -> list[type]:
        """Follow what functions name; return the users' classes among that."""
        classes: dict[type, None] = {}
        while self._waiting:
            function = self._waiting.pop()
            if id(function) in self._done or is_opaque(function):
                continue
            self._done.add(id(function))
            self.functions.append(function)
            namespace = function.__globals__
            _, names = self._globals.setdefault(id(namespace), (namespace, {}))
            for name in _names_of(function.__code__):
                value = namespace.get(name, ABSENT)
                if isinstance(value, types.FunctionType):
                    if value.__globals__ is namespace or _is_users(value.__module__):
                        self._waiting.append(value)
                elif isinstance(value, type):
                    if not issubclass(value, enum.Enum) and _is_users(value.__module__):
                        classes[value] = None
                elif value is not ABSENT and _is_data(name, value) and not callable(value):
                    names[name] = None
        return list(classes)

    def globals(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Yield the globals of the functions, with the names used."""
        for namespace, names in self._globals.values():
            yield namespace, list(names)


_NOT_USERS = frozenset((*OPAQUE, "torch", "builtins", "collections", "functools"))


def _is_users(module: str | None) -> bool:
    """Return whether a Python module is a user's file, not one of Python's or of a package."""
    root = (module or "").split(".")[0]
    if root in _NOT_USERS or root in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
