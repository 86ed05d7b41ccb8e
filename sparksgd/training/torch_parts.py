"""Modules that consist of torch.nn's own parts alone: described by plain values, and put together again.

A description names classes of torch.nn, and the numbers and texts that their objects hold.  Building a module
from it runs no code that a file names, and no layer's own `__init__`: each layer is an empty object that is
given its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from sparksgd.errors import DataError
from sparksgd.imports import shown
from sparksgd.training.plain_values import is_torchs

__all__ = ["assembled", "described_parts"]

_DEEPEST = 16
_OWN_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
_EMPTY = vars(nn.Module())


def described_parts(module: nn.Module) -> dict[str, Any] | None:
    """Return a module's parts by their paths, as JSON can hold them.

    Returns:
        None: it has a part of another class, a hook, or a value that is neither a number nor a text.
    """
    names: dict[int, str] = {}
    for path, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), path)
    paths = {id(part): path for path, part in module.named_modules()}
    try:
        return {
            path: _described(part, f"{path}." if path else "", names, paths)
            for path, part in module.named_modules()
        }
    except _OtherPart:
        return None


def assembled(parts: object, state: Mapping[str, Any], where: str) -> nn.Module:
    """Return the module that `described_parts` described, its tensors empty and of the shapes of a state.

    Args:
        parts: not believed.
        state: the module's state_dict.
        where: what errors call the description.

    Raises:
        DataError: the description is not of a module, or the state is not of it.
    """
    if not isinstance(parts, dict) or "" not in parts:
        raise DataError(f"{where} is {shown(parts)}, but must be a table with the part ''")
    made = {path: _made(part, f"{where}[{path!r}]") for path, part in parts.items()}
    tensors: dict[str, torch.Tensor] = {}
    for path, part in parts.items():
        _fill(made[path], path, part, made, tensors, state, f"{where}[{path!r}]")
    held = {id(part) for part in made[""].modules()}
    if loose := [path for path, part in made.items() if id(part) not in held]:
        raise DataError(f"{where} has the part {shown(loose[0])}, which no other part holds")
    return made[""]


class _OtherPart(Exception):  # it never leaves this file
    """A module has a part that cannot be described."""


def _described(
    part: nn.Module, prefix: str, names: Mapping[int, str], paths: Mapping[int, str]
) -> dict[str, Any]:
    kind = type(part)
    if getattr(nn, kind.__name__, None) is not kind or isinstance(part, LazyModuleMixin):
        raise _OtherPart
    held = vars(part)
    for name, empty in _EMPTY.items():
        if name not in _OWN_TABLES and held.get(name, empty) != empty:  # a hook
            raise _OtherPart
    parameters: dict[str, Any] = {}
    for name, parameter in part._parameters.items():
        if parameter is None:
            parameters[name] = None
            continue
        if type(parameter) is not nn.Parameter or vars(parameter) or parameter._backward_hooks:
            raise _OtherPart
        parameters[name] = {"of": names[id(parameter)], "trains": parameter.requires_grad}
    buffers: dict[str, Any] = {}
    for name, buffer in part._buffers.items():
        if buffer is None:
            buffers[name] = None
            continue
        if type(buffer) is not torch.Tensor or vars(buffer) or buffer.requires_grad:
            raise _OtherPart
        persists = name not in part._non_persistent_buffers_set
        buffers[name] = {"of": names[id(buffer)], "persists": persists}
    return {
        "class": kind.__name__,
        "values": {name: _coded(value) for name, value in held.items() if not is_torchs(name)},
        "parameters": parameters,
        "buffers": buffers,
        "modules": {name: None if m is None else paths[id(m)] for name, m in part._modules.items()},
    }


def _coded(value: Any, depth: int = 0) -> Any:
    """Return a plain value as JSON holds it: tables for what JSON has not."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth < _DEEPEST and type(value) in (list, tuple):
        return {type(value).__name__: [_coded(each, depth + 1) for each in value]}
    raise _OtherPart


def _value(coded: Any, where: str) -> Any:
    """Return the value that `_coded` wrote."""
    if coded is None or type(coded) in (bool, int, float, str):
        return coded
    if isinstance(coded, dict) and len(coded) == 1:
        ((kind, values),) = coded.items()
        if kind in ("list", "tuple") and isinstance(values, list):
            found = [_value(each, where) for each in values]
            return found if kind == "list" else tuple(found)
    raise DataError(f"{where} is {shown(coded)}, but must be a number, a text, or a list or tuple of them")


def _made(part: Any, where: str) -> nn.Module:
    """Return an object of a part's class, with its values."""
    keys = {"class", "values", "parameters", "buffers", "modules"}
    if not isinstance(part, dict) or part.keys() != keys:
        raise DataError(f"{where} is {shown(part)}, but must be a table of {', '.join(sorted(keys))}")
    for key in keys - {"class"}:
        if not isinstance(part[key], dict):
            raise DataError(f"{where}: {key} is {shown(part[key])}, but must be a table")
    name = part["class"]
    kind = getattr(nn, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or issubclass(kind, LazyModuleMixin):
        raise DataError(f"{where}: class is {shown(name)}, but must be a module of torch.nn")
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for attribute, coded in part["values"].items():
        if is_torchs(attribute) or attribute.startswith("__") or callable(getattr(kind, attribute, None)):
            raise DataError(f"{where} has a value named {shown(attribute)}, but its class uses that name")
        vars(module)[attribute] = _value(coded, f"{where}.{attribute}")
    return module


def _fill(
    module: nn.Module,
    path: str,
    part: Mapping[str, Any],
    made: Mapping[str, nn.Module],
    tensors: dict[str, torch.Tensor],
    state: Mapping[str, Any],
    where: str,
) -> None:
    """Give a part what it holds: parts, parameters and buffers; what has one name is one tensor."""
    for name, other in part["modules"].items():
        if not (other is None or (isinstance(other, str) and other in made)):
            raise DataError(f"{where} holds {shown(other)}, which is no part")
        _check_name(module, name, where)
        module._modules[name] = None if other is None else made[other]
    for key, flag in (("parameters", "trains"), ("buffers", "persists")):
        for name, told in part[key].items():
            tensor = None
            if told is not None:
                if not (isinstance(told, dict) and told.keys() == {"of", flag} and type(told[flag]) is bool):
                    raise DataError(f"{where}: {key} has {shown(name)} as {shown(told)}, which is no tensor")
                saved = state.get(f"{path}.{name}" if path else name)
                tensor = tensors.setdefault(str(told["of"]), _empty(saved, told.get("trains")))
            _check_name(module, name, where)
            if key == "parameters":
                module._parameters[name] = tensor if isinstance(tensor, nn.Parameter) else None
            else:
                module.register_buffer(name, tensor, persistent=told is None or told["persists"])


def _check_name(module: nn.Module, name: str, where: str) -> None:
    """Refuse the name of a part or a tensor that a module cannot have, or has already."""
    if not name or "." in name or hasattr(module, name):
        raise DataError(f"{where} has {shown(name)} as the name of a part or tensor, but cannot have that")


def _empty(saved: Any, trains: bool | None) -> torch.Tensor:
    """Return a tensor of the shape of a saved one; a buffer that no state has gets its values later.

    Args:
        saved: of the state.
        trains: whether it is a parameter that trains; None: it is a buffer.
    """
    empty = torch.empty_like(saved) if type(saved) is torch.Tensor else torch.empty(0)
    return empty if trains is None else nn.Parameter(empty, requires_grad=trains)
