"""The digest of the code of modules and losses that were given in Python, so that other code is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any

from sparksgd.imports.sources import code_digest

__all__ = ["NOT_THE_USERS", "given_code_digest", "told_of_code"]

NOT_THE_USERS = ("builtins", "sparksgd", "torch")


def given_code_digest(given: Iterable[type | Callable[..., Any]]) -> str | None:
    """Return the digest of the code of classes and functions.

    Of a file it is that of its source, and of what that imports, see `code_digest`.  Of a notebook, or of
    another place without a source, it is that of what Python has compiled, and of the functions, classes and
    constants there that it names.

    Args:
        given: classes, functions, and objects of other types, which count by these.

    Returns:
        64 hexadecimal digits; None: all are of torch, of Python or of this package.
    """
    owners = {each if isinstance(each, type | FunctionType) else type(each) for each in given}
    modules = {str(owner.__module__) for owner in owners}
    users = {module for module in modules if module.partition(".")[0] not in NOT_THE_USERS}
    of_source = {module: code_digest(f"{module}:") for module in users}  # once: it may read a whole package
    lines = {f"{module} {digest}" for module, digest in of_source.items() if digest is not None}
    live = _Live()
    for owner in owners:
        if of_source.get(str(owner.__module__), "") is None:
            live.add(owner)
    lines |= set(live.lines())
    if not lines:
        return None
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


class _Live:
    """Code that is in memory alone, and what it names of the same place."""

    def __init__(self) -> None:
        self._waiting: list[Any] = []
        self._seen: set[int] = set()

    def add(self, owner: Any) -> None:
        """Add a class or a function, once."""
        if id(owner) not in self._seen:
            self._seen.add(id(owner))
            self._waiting.append(owner)

    def lines(self) -> Iterator[str]:
        """Yield what tells each from another."""
        while self._waiting:
            owner = self._waiting.pop()
            told = self._of_class(owner) if isinstance(owner, type) else self._of_function(owner)
            text = "\n".join(told)
            yield f"{owner.__qualname__} {hashlib.sha256(text.encode()).hexdigest()}"

    def _of_class(self, owner: type) -> Iterator[str]:
        for base in owner.__bases__:
            if base.__module__ == owner.__module__:
                self.add(base)
        for name, value in sorted(vars(owner).items()):
            parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
            for part in parts:
                function = getattr(part, "__func__", part)  # of a static method, or one of the class
                if isinstance(function, FunctionType):
                    yield from (f"{name}: {line}" for line in self._of_function(function))
                elif _is_plain(part) and not name.startswith("__"):
                    yield f"{name} = {part!r}"

    def _of_function(self, function: FunctionType) -> Iterator[str]:
        yield from _of_code(function.__code__)
        yield repr([value for value in function.__defaults__ or () if _is_plain(value)])
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # it is empty
                yield from self._named("a closure", cell.cell_contents, function)
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                yield from self._named(name, function.__globals__[name], function)

    def _named(self, name: str, value: Any, by: FunctionType) -> Iterator[str]:
        if _is_plain(value):
            yield f"{name} = {value!r}"
        elif isinstance(value, type | FunctionType) and value.__module__ == by.__module__:
            self.add(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def told_of_code(code: CodeType) -> str:
    """Return what tells compiled code from another's: what it does, not where it stands."""
    return "\n".join(_of_code(code))


def _of_code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
