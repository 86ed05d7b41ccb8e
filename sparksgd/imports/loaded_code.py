"""Whether a module that was imported is as its source says, or the file was changed, or something was set."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.machinery import SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal
from zipimport import zipimporter

from sparksgd.imports.given_code import told_of_code

__all__ = ["Difference", "attributes_set", "difference"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CACHED = type(lru_cache(len))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Difference:
    """What of a module is not as its source says."""

    told: str
    kind: Literal["older", "replaced", "set"]
    """A function is of the file as it was before; or one of `__main__`, or a class, is in its place; or a
    constant has another value."""


def difference(module: ModuleType, source: str, are_set: Set[str] = frozenset()) -> Difference | None:
    """Return what of a module is not as a source says; None: nothing is.

    Functions and methods are compared, and plain constants of the module and of its classes.  What is bound
    more than once, decorated, or set by functions of the source is left out; so are functions that the source
    lacks, which a module that was reloaded keeps; functions that another module put in the place of one, as
    it may do wherever it is imported; and modules that another loader has compiled, which may have added to
    them.

    Args:
        module: as it is now.
        source: of its file.
        are_set: names of constants that code may set wherever it is imported.
    """
    spec = module.__spec__
    if spec is None or spec.origin is None or type(spec.loader) not in (SourceFileLoader, zipimporter):
        return None
    try:
        tree = ast.parse(source)
        written = _functions(compile(source, spec.origin, "exec", dont_inherit=True))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Difference(f"it cannot be compiled ({type(error).__name__})", "older")
    for code in _live(module, spec.origin):
        if told_of_code(code) not in written.get(code.co_qualname, {told_of_code(code)}):
            return Difference(f"{code.co_qualname} was another function", "older")
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in tree.body):
        return None  # anything may be bound again by it
    return _set_since(tree, module, are_set)


def attributes_set(source: str) -> set[str]:
    """Return the names of the attributes that code sets of others than `self`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and not _is_self(node.value)
    }


def _functions(code: CodeType) -> dict[str, set[str]]:
    """Return what tells functions from each other, by their qualified names."""
    found: dict[str, set[str]] = defaultdict(set)
    waiting = [code]
    while waiting:
        inner = [constant for constant in waiting.pop().co_consts if isinstance(constant, CodeType)]
        for function in inner:
            found[function.co_qualname].add(told_of_code(function))
        waiting += inner
    return found


def _live(module: ModuleType, origin: str) -> Iterator[CodeType]:
    """Yield the code of the functions, and of the methods of classes, that a module defines."""
    waiting: list[Any] = list(vars(module).values())
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = type(value)  # isinstance would ask the value, which may warn
        if issubclass(kind, FunctionType):
            if value.__code__.co_filename == origin:
                yield value.__code__
            waiting.append(getattr(value, "__wrapped__", None))
        elif issubclass(kind, type):
            if value.__module__ == module.__name__:
                waiting += vars(value).values()
        elif issubclass(kind, property):
            waiting += (value.fget, value.fset, value.fdel)
        elif issubclass(kind, staticmethod | classmethod):
            waiting.append(value.__func__)
        elif issubclass(kind, cached_property):
            waiting.append(value.func)
        elif kind is _CACHED:
            waiting.append(value.__wrapped__)


def _set_since(tree: ast.Module, module: ModuleType, are_set: Set[str]) -> Difference | None:
    """Return a function or a constant that the module binds once, and that is another one now."""
    excluded = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    excluded |= are_set
    places: list[tuple[str, list[ast.stmt], Any]] = [("", tree.body, module)]
    for node in tree.body:
        made = vars(module).get(node.name) if isinstance(node, ast.ClassDef) else None
        if isinstance(node, ast.ClassDef) and isinstance(made, type) and not node.decorator_list:
            places.append((f"{node.name}.", node.body, made))
    for prefix, body, owner in places:
        bound = Counter(_bound(body))
        for name, value in _written_in(body):
            if bound[name] > 1 or name in excluded or name not in vars(owner) or name.startswith("__"):
                continue
            now, path = vars(owner)[name], f"{prefix}{name}"
            if isinstance(value, ast.AST):
                if getattr(now, "__module__", None) == "__main__" and hasattr(now, "__qualname__"):
                    return Difference(f"{path} is {now.__qualname__} of __main__", "replaced")
            elif type(now) in _PLAIN and repr(now) != repr(value):
                return Difference(f"{path} is {now!r} here, and {value!r} in the file", "set")
    return None


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _written_in(body: Iterable[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Yield by their names what of a module or class nothing decorates, as nodes, and plain constants."""
    for node in body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            if not node.decorator_list:
                yield node.name, node
            continue
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if isinstance(target, ast.Name):
            try:
                constant = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
            if type(constant) in _PLAIN:
                yield target.id, constant


def _bound(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Yield each name as often as a module or class binds it; names within functions are theirs."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield node.name
            waiting += node.decorator_list
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield (alias.asname or alias.name).partition(".")[0]
        waiting += ast.iter_child_nodes(node)
