"""Copies of a module, a loss, or anything that holds some: in this process, or pickled for another.

`copy.deepcopy` and pickle lose what training needs: hooks on parameters, parameters' own attributes and
classes.  They refuse parametrized and pruned modules, and tensors that have a graph.  Here one set of
reducers (reductions.py) makes both kinds of copy, so that what can be copied can travel, and the same things
are kept:

    parameters, tensors    class, attributes, hooks, requires_grad, strides; shared storage stays shared
    a tensor with a graph  its values alone: forward computes it anew
    parametrized modules   a class of their own, as torch gives them
    bound methods, functions with closures, weak references   they refer to the copy
    classes, modules of Python, functions without closures    themselves; pickled: by name, or by value
    functions that torch.jit has scripted                     themselves; pickled: scripted again

What cannot be copied is refused with the path of the attribute.
"""

from __future__ import annotations

import io
import pickle
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sparksgd.arithmetic.reductions import HOOKS, reduced, reducing, slots
from sparksgd.errors import ModelError, SparkSGDError

__all__ = ["copied", "parts", "pickled"]

T = TypeVar("T")

_SCALARS = frozenset((bool, int, float, complex, str, bytes, type(None)))
_COPIED = frozenset((dict, list, tuple, set, OrderedDict, torch.Tensor, nn.Parameter))
"""With `_SCALARS` the types of most of what a module holds, which are made again; not their subclasses."""
_TABLES = frozenset((list, dict, set, deque, OrderedDict, Counter))
_MANY = 100
_ATOMS = (
    type, types.ModuleType, types.CodeType, torch.dtype, torch.device, torch.layout, torch.jit.ScriptFunction,
)  # fmt: skip


def copied(value: T, named: Mapping[str, object] | None = None) -> T:
    """Return a deep copy of a module, a loss, or both: what refers to the one then refers to its copy.

    Args:
        value: not changed.
        named: its parts that users made, by the name that errors call them; an empty one is that of the
            module, whose attributes are then named alone.  None: the value is the module.

    Raises:
        ModelError: a part of it cannot be copied.
    """
    return cast(T, _or_refused(_copy, value, {"": value} if named is None else named))


def pickled(
    value: object,
    named: Mapping[str, object],
    pickler: type[pickle.Pickler] = pickle.Pickler,
) -> bytes:
    """Return a value as bytes for `pickle.loads`.

    Args:
        value: what to pickle.
        named: its parts that users made, by the name that errors call them; see `copied`.
        pickler: pickles what `reduced` leaves to it, for example classes of a notebook by value.

    Raises:
        ModelError: a part of it cannot be pickled.
    """
    return _or_refused(partial(_dumps, pickler=pickler), value, named)


def _or_refused(attempt: Callable[[Any], T], value: object, named: Mapping[str, object]) -> T:
    try:
        return attempt(value)
    except SparkSGDError:
        raise
    except Exception as error:
        for name, part in named.items():
            if not _succeeds(attempt, part):
                raise _refusal(part, name, attempt, error) from error
        raise


# Copies in this process


class _Copier(pickle.Pickler):
    """Pickles what must be made again, and keeps aside what both copies share, and the bytes of tensors."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self.kept: list[object] = []
        self._storages: dict[int, int] = {}
        self._tables: dict[int, tuple[Any, int]] = {}

    def persistent_id(self, value: Any) -> int | None:
        kind = type(value)
        if kind in _SCALARS:
            return None
        if kind in _TABLES and _is_long(value):
            if id(value) not in self._tables:
                self._tables[id(value)] = value, self._keep(value.copy())  # else another could get its id
            return self._tables[id(value)][1]
        if kind in _COPIED:
            return None
        if isinstance(value, _ATOMS) or _is_function_by_name(value):
            return self._keep(value)
        if type(value) is _Itself:
            return self._keep(value.value)
        if isinstance(value, torch.UntypedStorage) and value.device.type == "cpu":
            pointer = value.data_ptr()
            if not pointer or pointer not in self._storages:
                self._storages[pointer] = self._keep(value.clone())  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return self._storages[pointer]
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            cells = value.__closure__ or ()
            state = [cell.cell_contents if _is_full(cell) else _Itself(_EMPTY) for cell in cells]
            defaults = (value.__defaults__, value.__kwdefaults__) if _is_local(value) else None
            return _closed_anew, (_Itself(value), len(cells)), (state, defaults), None, None, _fill_function
        return NotImplemented if (made := reduced(value)) is None else made

    def _keep(self, value: object) -> int:
        self.kept.append(value)
        return len(self.kept) - 1


class _Copied(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, kept: list[object]) -> None:
        super().__init__(stream)
        self._kept = kept

    def persistent_load(self, number: int) -> Any:
        return self._kept[number]


class _Itself:
    """Something that a copy refers to as it is."""

    def __init__(self, value: object) -> None:
        self.value = value


_EMPTY = object()


def _copy(value: object) -> object:
    stream = io.BytesIO()
    copier = _Copier(stream)
    copier.dump(value)
    stream.seek(0)
    return _Copied(stream, copier.kept).load()


def _is_long(table: Any) -> bool:
    """Return whether a table has many entries that need no copies: it is then copied by C."""
    if len(table) < _MANY or getattr(table, "__dict__", None):
        return False
    return _are_scalars(table) and (not isinstance(table, dict) or _are_scalars(table.values()))


def _are_scalars(values: Iterable[Any]) -> bool:
    """Return whether values are scalars, or tuples of them."""
    kinds = set(map(type, values))
    if tuple not in kinds:
        return kinds <= _SCALARS
    inner = chain.from_iterable(value for value in values if type(value) is tuple)
    return kinds - {tuple} <= _SCALARS and _are_scalars(list(inner))


def _is_function_by_name(value: object) -> bool:
    if isinstance(value, types.FunctionType):
        return not value.__closure__ and not (_is_local(value) and _has_defaults(value))
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    return False


def _is_local(function: types.FunctionType) -> bool:
    """Return whether no name leads to a function: a lambda, or one that was made in another."""
    return "<" in function.__qualname__


def _has_defaults(function: types.FunctionType) -> bool:
    """Return whether a function's arguments have defaults that a copy must have copies of."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(not isinstance(one, str | int | float | complex | bytes | type(None)) for one in defaults)


def _is_full(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty cell raises
    except ValueError:
        return False
    return True


def _closed_anew(function: types.FunctionType, cells: int) -> types.FunctionType:
    """Return a function with empty cells, to be filled when what they hold is made."""
    made = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(types.CellType() for _ in range(cells)),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__dict__.update(function.__dict__)
    return made


def _fill_function(function: types.FunctionType, state: tuple[list[object], Any]) -> None:
    values, defaults = state
    for cell, value in zip(function.__closure__ or (), values, strict=True):
        if value is not _EMPTY:
            cell.cell_contents = value
    if defaults is not None:
        function.__defaults__, function.__kwdefaults__ = defaults


# Pickles


def _dumps(value: object, pickler: type[pickle.Pickler]) -> bytes:
    stream = io.BytesIO()
    reducing(pickler)(stream, protocol=5).dump(value)
    return stream.getvalue()


# Paths


def parts(value: Any) -> Iterator[tuple[str, object]]:
    """Yield what an object consists of, each with what its path goes on by: ".name", "[0]"."""
    if isinstance(value, nn.Module):
        for name, held in vars(value).items():
            if name in ("_parameters", "_buffers", "_modules"):
                yield from ((f".{key}", part) for key, part in held.items())
            else:
                yield f".{name}", held
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in list(value.items()))
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{number}]", part) for number, part in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from (("{}", part) for part in value)
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        cells = value.__closure__ or ()
        yield from (
            (f"'s variable {name}", cell.cell_contents)
            for name, cell in zip(names, cells, strict=True)
            if _is_full(cell)
        )
        yield from ((f".{name}", part) for name, part in value.__dict__.items())
        if _is_local(value):
            yield from _defaults(value)
    elif isinstance(value, partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, torch.Tensor):
        yield from ((f".{name}", held) for name, held in value.__dict__.items())
        if value.is_leaf:
            yield from ((f".{name}", held) for name in HOOKS if (held := getattr(value, name)))
    elif not isinstance(value, _ATOMS):
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict):
            yield from ((f".{name}", part) for name, part in held.items())
        yield from ((f".{name}", getattr(value, name)) for name in slots(type(value)) if hasattr(value, name))


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    defaults = dict(zip(reversed(names), reversed(function.__defaults__ or ()), strict=False))
    defaults |= function.__kwdefaults__ or {}
    yield from ((f"'s default of {name}", value) for name, value in defaults.items())


def _refusal(value: object, name: str, attempt: Callable[[Any], object], error: Exception) -> ModelError:
    """Return the error that names the deepest part that cannot be copied by itself."""
    path, culprit, seen = name, value, {id(value)}
    while True:
        for step, part in parts(culprit):
            if id(part) not in seen and not _succeeds(attempt, part):
                seen.add(id(part))
                path, culprit = path + step, part
                break
            seen.add(id(part))
        else:
            break
    kind = type(culprit)
    if isinstance(culprit, torch.jit.ScriptFunction):
        return ModelError(
            f"{path.lstrip('.')} was traced by torch.jit, or scripted where no name leads to it, and cannot "
            "be copied to workers: script a function of a file that workers import"
        )
    if isinstance(culprit, torch.jit.ScriptModule | torch.ScriptModule):
        return ModelError(
            f"{path.removesuffix('._c').lstrip('.') or 'the module'} is scripted by torch.jit, and cannot be "
            f"copied to workers: give the module as it was before torch.jit.script"
        )
    named = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return ModelError(
        f"{path.lstrip('.') or 'the module'} is a {named}, which cannot be copied to workers "
        f"({type(error).__name__}: {_line(error)}): make it in forward, or leave it out in __getstate__"
    )


def _succeeds(attempt: Callable[[Any], object], value: object) -> bool:
    try:
        attempt(value)
    except Exception:
        return False
    return True


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
