"""Whether a module that was imported is as its source says, or the file was changed, or something was set."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.machinery import SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal
from zipimport import zipimporter

from sparksgd.imports.given_code import told_of_code
from sparksgd.imports.sources import compiling_quietly, parsed

__all__ = ["Difference", "attributes_set", "code_of_source", "difference"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CACHED = type(lru_cache(len))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_HAS_DOCSTRING = 0x4000000
"""A flag of code, since Python 3.13; until then, a function has its docstring, or None, as first constant."""
_NOT_COMPILED = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Difference:
    """What of a module is not as its source says."""

    told: str
    kind: Literal["older", "replaced", "set"]
    """older: it is as the file was before.  replaced: a class or method of `__main__` is in its
    place.  set: a constant has another value, or a function of `__main__` is in the place of one."""


@cache
def code_of_source(source: str) -> str:
    """Return the digest of what a source does: comments, lines and docstrings do not count.

    Args:
        source: of a module.
    """
    try:
        tree = parsed(source)
    except _NOT_COMPILED:
        return hashlib.sha256(source.encode()).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def difference(module: object, source: str, are_set: Set[str] = frozenset()) -> Difference | None:
    """Return what of a module is not as a source says; None: nothing is.

    Functions and methods are compared, and plain constants of the module and of its classes.  What is bound
    more than once, decorated, or set by functions of the source is left out; so are functions that the source
    lacks, which a module that was reloaded keeps; functions that another module put in the place of one, as
    it may do wherever it is imported; and modules that another loader has compiled, which may have added to
    them.

    Args:
        module: as it is now; some put another object in their place.
        source: of its file.
        are_set: names of constants that code may set wherever it is imported.
    """
    spec = getattr(module, "__spec__", None) if isinstance(module, ModuleType) else None
    if spec is None or spec.origin is None or type(spec.loader) not in (SourceFileLoader, zipimporter):
        return None
    assert isinstance(module, ModuleType)
    try:
        tree = parsed(source)
        with compiling_quietly():
            written = _functions(compile(source, spec.origin, "exec", dont_inherit=True))
    except _NOT_COMPILED as error:
        return Difference(f"it cannot be compiled: {type(error).__name__}", "older")
    decorated = set(_decorated(tree))
    for code in _live(module, spec.origin):
        name, told = code.co_qualname, _told(code)
        if name not in decorated and told not in written.get(name, {told}):
            return Difference(f"{name} was another function", "older")
    if any(map(_may_bind_anything, ast.walk(tree))):
        return None
    return min(_set_since(tree, module, are_set), key=lambda one: one.kind, default=None)  # "replaced" first


@cache
def attributes_set(source: str) -> frozenset[str]:
    """Return the names of the attributes that code sets of others than `self`."""
    try:
        tree = parsed(source)
    except _NOT_COMPILED:
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and not _is_self(node.value)
    )


def _decorated(node: ast.AST, prefix: str = "", is_within: bool = False) -> Iterator[str]:
    """Yield the qualified names of functions that are decorated, or within what is: tools compile them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            name = prefix + getattr(child, "name", "<lambda>")
            is_decorated = is_within or bool(getattr(child, "decorator_list", ()))
            if is_decorated:
                yield name
            inner = "." if isinstance(child, ast.ClassDef) else ".<locals>."
            yield from _decorated(child, name + inner, is_decorated)
        else:
            yield from _decorated(child, prefix, is_within)


def _functions(code: CodeType) -> dict[str, set[str]]:
    """Return what tells functions from each other, by their qualified names."""
    found: dict[str, set[str]] = defaultdict(set)
    waiting = [code]
    while waiting:
        inner = [constant for constant in waiting.pop().co_consts if isinstance(constant, CodeType)]
        for function in inner:
            found[function.co_qualname].add(_told(function))
        waiting += inner
    return found


def _told(code: CodeType) -> str:
    """Return what tells functions from each other, without their docstrings."""
    return told_of_code(_without_docstrings(code))


def _without_docstrings(code: CodeType) -> CodeType:
    constants = list(code.co_consts)
    is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
    has_docstring = code.co_flags & _HAS_DOCSTRING if sys.version_info >= (3, 13) else is_function
    if has_docstring and constants and isinstance(constants[0], str):
        constants[0] = None
    inner = (_without_docstrings(each) if isinstance(each, CodeType) else each for each in constants)
    return code.replace(co_consts=tuple(inner))


def _may_bind_anything(node: ast.AST) -> bool:
    """Return whether names of a module may be bound that its source does not show."""
    if isinstance(node, ast.ImportFrom):
        return node.names[0].name == "*"
    return isinstance(node, ast.Name) and node.id in ("exec", "globals", "setattr", "vars")


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
                waiting += list(vars(value).values())
        elif issubclass(kind, property):
            waiting += (value.fget, value.fset, value.fdel)
        elif issubclass(kind, staticmethod | classmethod):
            waiting.append(value.__func__)
        elif issubclass(kind, cached_property):
            waiting.append(value.func)
        elif kind is _CACHED:
            waiting.append(value.__wrapped__)


def _set_since(tree: ast.Module, module: ModuleType, are_set: Set[str]) -> Iterator[Difference]:
    """Yield the functions and constants that the module binds once, and that are others now."""
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
                if _is_of_main(now):
                    is_of_class = bool(prefix) or isinstance(value, ast.ClassDef)
                    told = f"{path} is {now.__qualname__} of __main__"
                    yield Difference(told, "replaced" if is_of_class else "set")
                elif isinstance(value, _FUNCTIONS) and _has_other_defaults(now, value):
                    yield Difference(f"{path} has other defaults here than in the file", "set")
            elif _is_plain(now) and repr(now) != repr(value):
                yield Difference(f"{path} is {now!r} here, and {value!r} in the file", "set")


def _is_of_main(value: Any) -> bool:
    """Return whether a function or class is of `__main__`, also if it took the names of another."""
    if issubclass(type(value), FunctionType):
        return "__main__" in (value.__module__, value.__globals__.get("__name__"))
    return issubclass(type(value), type) and value.__module__ == "__main__"


def _has_other_defaults(now: Any, written: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function has other plain values as defaults than its source says."""
    if not issubclass(type(now), FunctionType):
        return False
    named = dict(zip((each.arg for each in written.args.kwonlyargs), written.args.kw_defaults, strict=True))
    pairs: list[tuple[Any, ast.expr | None]] = list(
        zip(now.__defaults__ or (), written.args.defaults, strict=False)
    )
    pairs += [(value, named.get(name)) for name, value in (now.__kwdefaults__ or {}).items()]
    if len(now.__defaults__ or ()) != len(written.args.defaults):
        return True
    return any(
        is_literal and _is_plain(value) and repr(value) != repr(constant)
        for value, node in pairs
        for is_literal, constant in [_literal(node)]
    )


def _is_plain(value: Any) -> bool:
    """Return whether nobody can change a value in place."""
    return all(map(_is_plain, value)) if type(value) is tuple else type(value) in _PLAIN


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _literal(node: ast.expr | None) -> tuple[bool, Any]:
    """Return whether an expression is a plain value, and the value."""
    try:
        value = None if node is None else ast.literal_eval(node)
    except (TypeError, *_NOT_COMPILED):
        return False, None
    return node is not None and _is_plain(value), value


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
            is_plain, constant = _literal(value)
            if is_plain:
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
