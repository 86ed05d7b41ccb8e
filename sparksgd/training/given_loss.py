"""A loss that is given in Python: a function, a class or an instance, instead of what loss.name names.

What other processes can import is taken by its import path, and is then as any loss that is named so.  Any
other loss travels by value, as a module does that is given in Python.  Its name is then a digest of what it
is: so a run does not go on, is not replayed and shares no checkpoints with another loss.
"""

from __future__ import annotations

import hashlib
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.copies import parts
from sparksgd.config import Config
from sparksgd.config.sections import GIVEN
from sparksgd.errors import ConfigError
from sparksgd.imports import import_path, shown
from sparksgd.models.losses import Loss, given_kind, known_name, loss_of
from sparksgd.training.composition import code_told, name_of, value_told
from sparksgd.training.plain_values import is_plain, is_torchs

__all__ = ["given_name", "with_loss"]

_DIGITS = 16
_LIBRARIES = ("torch", "numpy", "builtins", "functools", "collections")


def with_loss(config: Config, loss: object) -> tuple[Config, Loss | None]:
    """Return a configuration that names a loss, and the loss itself where its name does not lead to it.

    Args:
        config: its other keys of [loss] are the loss's arguments, and its kind.
        loss: as `sparksgd.train` takes it; None: the configuration names it.

    Raises:
        ConfigError: it cannot be called, takes no such arguments, or is of another kind; or the configuration
            names another one.
    """
    if loss is None:
        return config, None
    if not callable(loss):
        raise ConfigError(
            f"loss is {shown(loss)}, but must be a function (output, label), an nn.Module, or a class of such"
        )
    if (path := known_name(loss) or import_path(loss)) is not None:
        return replace(config, loss=replace(config.loss, name=path)), None
    named = replace(config.loss, name=given_name(loss), kind=given_kind(config.loss, loss))
    return replace(config, loss=named), loss_of(named, loss, config.train.seed)


def given_name(loss: object) -> str:
    """Return the name of a loss that is given in Python: a digest of its code, and of all that it holds.

    >>> given_name(lambda output, label: output[:, 0]) == given_name(lambda output, label: output[:, 1])
    False
    """
    digest = hashlib.sha256("\n".join(_told(loss)).encode())
    return f"{GIVEN} {digest.hexdigest()[:_DIGITS]}"


def _told(loss: object) -> Iterator[str]:
    """Yield what a loss is: values, and code, also that of its classes and of what its functions call."""
    seen: dict[int, object] = {}
    waiting: deque[tuple[str, Any]] = deque([("", loss)])
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, torch.Tensor | np.ndarray) or is_plain(value):
            yield f"{path}: {value_told(value).text} {value_told(value).digest}"
            continue
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield f"{path}: {name_of(value)}"
        if isinstance(value, set | frozenset):
            yield f"{path}: {sorted(map(repr, value))}"
            continue
        if isinstance(value, types.FunctionType):
            yield f"{path}: {code_told(value.__code__)}"
            waiting += ((f"{path} defaults", each) for each in (value.__defaults__, value.__kwdefaults__))
            waiting += ((f"{path} {name}", each) for name, each in _globals(value))
        kind = value if isinstance(value, type) else type(value)
        for base in [each for each in kind.__mro__ if each.__module__.partition(".")[0] not in _LIBRARIES]:
            own = [(name, each) for name, each in vars(base).items() if isinstance(each, types.FunctionType)]
            waiting += ((f"{path} {name}", each) for name, each in own)
        held = parts(value)
        is_module = isinstance(value, nn.Module)
        waiting += ((path + step, part) for step, part in held if not (is_module and is_torchs(step[1:])))


def _globals(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """Yield the globals of a function that are of its own module: other cells' functions, and numbers."""
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        is_own = isinstance(value, types.FunctionType | type) and value.__module__ == function.__module__
        if is_own or isinstance(value, bool | int | float | str):
            yield name, value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
