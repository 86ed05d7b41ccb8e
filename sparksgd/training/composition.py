"""Which classes and functions a module consists of: what no saved value can tell."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from sparksgd.arithmetic.changes import bits
from sparksgd.arithmetic.copies import parts
from sparksgd.imports import shown
from sparksgd.training.plain_values import is_plain, is_torchs

__all__ = [
    "Told",
    "code_told",
    "first_difference",
    "name_of",
    "other_structure",
    "structure",
    "value_told",
]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is told of an object."""

    text: str
    """As errors show it."""

    digest: str = ""
    """Of what the text leaves out."""

    def __str__(self) -> str:
        return self.text


def structure(module: nn.Module) -> dict[str, str]:
    """Return the names of a module's classes and functions, by their paths.

    Submodules come first, in their order; then the objects and functions that they hold.
    """
    modules = {path: name_of(part) for path, part in module.named_modules()}
    seen = {id(part) for part in module.modules()}
    held: dict[str, str] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if not is_torchs(name):
                held |= _names_in(f"{path}.{name}" if path else name, value, seen)
    return modules | dict(sorted(held.items()))


def other_structure(module: nn.Module, saved: Mapping[str, str] | None) -> str | None:
    """Return how a module is built otherwise than one whose `structure` was saved.

    Returns:
        A sentence; None: it is the same, or no structure was saved.
    """
    if saved is None:
        return None
    built = structure(module)
    if (found := first_difference(saved, built)) is not None:
        return found
    for path, place in zip(saved, built, strict=True):
        if path != place:
            return f"{place} is in the place of {path} when it is built again"
    return None


def first_difference(one: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """Return where what is told by path of two modules differs, the second one built again; None: nowhere."""
    for path in {**one, **other}:
        mine, theirs = one.get(path), other.get(path)
        if mine != theirs:
            was, now = ("nothing" if told is None else str(told) for told in (mine, theirs))
            return f"{path or 'the module'} was {was}, but is {now} when it is built again"
    return None


def name_of(value: Any) -> str:
    """Return the name of a class or a function; of any other object, that of its class."""
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return value.__name__
    kind = type(value)
    if isinstance(value, LazyModuleMixin) and kind.cls_to_become is not None:
        kind = kind.cls_to_become  # at the first forward
    return kind.__qualname__


def code_told(code: types.CodeType) -> str:
    """Return what code does, wherever it was written."""
    constants = [code_told(each) if isinstance(each, types.CodeType) else each for each in code.co_consts]
    plain = [sorted(map(repr, each)) if isinstance(each, frozenset) else each for each in constants]
    return repr((code.co_code, code.co_names, plain))


def value_told(value: Any) -> Told:
    """Return what is told of a tensor, an array, or a value that Python writes as it is."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.is_nested or value.layout is not torch.strided:
            return Told(text="a tensor")
        return Told(text=shown(value), digest=hashlib.sha256(bits(value).tobytes()).hexdigest())
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return Told(text=shown(value), digest=hashlib.sha256(value.tobytes()).hexdigest())
    return Told(text=shown(value), digest=hashlib.sha256(repr(value).encode()).hexdigest())


def _names_in(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, str]]:
    if id(value) in seen or isinstance(value, torch.Tensor | np.ndarray) or is_plain(value):
        return
    seen.add(id(value))
    if isinstance(value, Mapping | list | tuple):  # a set has another order in another process
        for step, part in parts(value):
            yield from _names_in(path + step, part, seen)
    else:
        yield path, name_of(value)
