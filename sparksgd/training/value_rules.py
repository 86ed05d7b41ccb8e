"""What values that were read from a file must be: rules for tables, lists, numbers, texts and arrays.

A rule is called with a value and its path.  It raises a DataError that names the path, the value and what it
must be.

>>> rule = Table({"step": WHOLE, "losses": ListOf(NUMBER)})
>>> rule({"step": 3, "losses": [0.5]}, "run")
>>> rule({"step": -1, "losses": []}, "run")
Traceback (most recent call last):
sparksgd.errors.DataError: run.step is -1, but must be a whole number from 0
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any

import numpy as np
import torch

from sparksgd.errors import DataError
from sparksgd.imports import shortened, shown

__all__ = [
    "BOOL",
    "BYTES",
    "FINITE",
    "NUMBER",
    "TEXT",
    "WHOLE",
    "Array",
    "Like",
    "ListOf",
    "MapOf",
    "Rule",
    "Table",
    "is_whole",
    "of_fields",
    "optional",
    "whole",
]

_MOST = 2**62

Rule = Callable[[Any, str], None]


def _refused(value: object, path: str, words: str) -> DataError:
    if isinstance(value, np.ndarray | torch.Tensor):
        told = f"{value.dtype} of shape {tuple(value.shape)}"
    else:
        told = shown(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return DataError(f"{path} is {told}, but must be {words}")


@dataclass(frozen=True)
class _Plain:
    is_right: Callable[[Any], bool]
    words: str

    def __call__(self, value: Any, path: str) -> None:
        if not self.is_right(value):
            raise _refused(value, path, self.words)


def is_whole(value: object, least: int = 0, most: int = _MOST) -> bool:
    """Return whether a value is a whole number within these bounds; True and False are none."""
    return type(value) is int and least <= value <= most


def whole(least: int, most: int) -> Rule:
    """Return the rule of a whole number within these bounds."""
    return _Plain(lambda value: is_whole(value, least, most), f"a whole number from {least} to {most}")


def _is_number(value: object) -> bool:
    return type(value) is float or is_whole(value, -_MOST)


WHOLE: Rule = _Plain(is_whole, "a whole number from 0")
NUMBER: Rule = _Plain(_is_number, "a number")
FINITE: Rule = _Plain(lambda value: _is_number(value) and math.isfinite(value), "a finite number")
TEXT: Rule = _Plain(lambda value: type(value) is str, "a text")
BOOL: Rule = _Plain(lambda value: type(value) is bool, "true or false")
BYTES: Rule = _Plain(lambda value: type(value) is bytes, "bytes")


def optional(rule: Rule) -> Rule:
    """Return the rule of a value that may be None."""

    def check(value: Any, path: str) -> None:
        if value is not None:
            rule(value, path)

    return check


@dataclass(frozen=True)
class Table:
    """A dictionary of these keys."""

    rules: Mapping[str, Rule]

    def __call__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _refused(value, path, "a table")
        for key in self.rules:
            if key not in value:
                raise DataError(f"{path} has no {key}")
        for key, one in value.items():
            if key not in self.rules:
                raise DataError(f"{path} has the unknown key {shortened(repr(key), 80)}")
            self.rules[key](one, f"{path}.{key}")


@dataclass(frozen=True)
class MapOf:
    """A dictionary of any keys that follow a rule."""

    keys: Rule
    values: Rule

    def __call__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _refused(value, path, "a table")
        for key, one in value.items():
            self.keys(key, f"a key of {path}")
            self.values(one, f"{path}.{shortened(str(key), 80)}")


@dataclass(frozen=True)
class ListOf:
    """A list or a tuple, of a length if one is given."""

    values: Rule
    length: int | None = None
    least: int = 0

    def __call__(self, value: Any, path: str) -> None:
        if type(value) not in (list, tuple):
            raise _refused(value, path, "a list")
        if len(value) != self.length if self.length is not None else len(value) < self.least:
            wanted = f"at least {self.least}" if self.length is None else self.length
            raise DataError(f"{path} has {len(value)} values, but must have {wanted}")
        for number, one in enumerate(value):
            self.values(one, f"{path}[{number}]")


@dataclass(frozen=True)
class Array:
    """A numpy array of this type and shape."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __call__(self, value: Any, path: str) -> None:
        is_right = isinstance(value, np.ndarray) and (value.dtype, value.shape) == (self.dtype, self.shape)
        if not is_right:
            raise _refused(value, path, f"{self.dtype} of shape {self.shape}")


@dataclass(frozen=True)
class Like:
    """A plain value or a container of such, like that of an object that was just made.

    Numbers must be finite where they were; a number may stand for another one, and None for anything plain.
    """

    made: Any

    def __call__(self, value: Any, path: str) -> None:
        made = self.made
        if isinstance(made, bool) or isinstance(value, bool):
            (optional(BOOL) if made is None else BOOL)(value, path)
        elif isinstance(made, int | float):
            (FINITE if math.isfinite(made) else NUMBER)(value, path)
        elif isinstance(made, dict):
            if not isinstance(value, dict) or value.keys() != made.keys():
                raise _refused(value, path, f"a table of {', '.join(map(str, made))}")
            for key, one in value.items():
                Like(made[key])(one, f"{path}.{key}")
        elif isinstance(made, list | tuple):
            if type(value) is not type(made) or len(value) != len(made):
                raise _refused(value, path, f"a {type(made).__name__} of {len(made)} values")
            for number, (one, other) in enumerate(zip(made, value, strict=True)):
                Like(one)(other, f"{path}[{number}]")
        elif isinstance(made, torch.Tensor | np.ndarray):
            if type(value) is not type(made) or (value.dtype, value.shape) != (made.dtype, made.shape):
                raise _refused(value, path, f"{made.dtype} of shape {tuple(made.shape)}")
        elif made is not None and type(value) is not type(made):
            raise _refused(value, path, f"a {type(made).__name__}")
        elif made is None and not (value is None or type(value) is str or _is_number(value)):
            raise _refused(value, path, "a number, a text or nothing")


def of_fields(kind: type[Any], without: Container[str] = ()) -> Rule:
    """Return the rule of a dataclass of numbers, texts and other such ones, as `asdict` gives it.

    Args:
        kind: the dataclass.
        without: fields that earlier versions did not write.
    """
    hints = typing.get_type_hints(kind)
    return Table({one.name: _of_hint(hints[one.name]) for one in fields(kind) if one.name not in without})


def _of_hint(hint: Any) -> Rule:
    if isinstance(hint, UnionType):
        (inner,) = (part for part in typing.get_args(hint) if part is not NoneType)
        return optional(_of_hint(inner))
    if typing.get_origin(hint) is Mapping:
        return MapOf(*map(_of_hint, typing.get_args(hint)))
    simple: dict[Any, Rule] = {int: WHOLE, float: NUMBER, str: TEXT, bool: BOOL}
    return simple[hint] if hint in simple else of_fields(hint)
