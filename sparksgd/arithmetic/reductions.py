"""How pickle takes modules and tensors apart, so that a copy of a module is the module.

One set of reducers serves copies in this process and pickles for others (see copies.py).
"""

from __future__ import annotations

import importlib
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from sparksgd.arithmetic.generators import GLOBAL_GENERATORS, global_generator

__all__ = ["HOOKS", "reduced", "reducing", "slots"]

T = TypeVar("T")
Reduced = tuple[Any, ...]

_MOST_VERSIONS = 100_000
HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def reduced(value: Any) -> Reduced | None:
    """Return how pickle makes a value again, as `__reduce__` does; None: as it does anyway."""
    if isinstance(value, torch.Tensor):
        return _reduced_tensor(value)
    if isinstance(value, _Storage):
        return _storage_of, (_bytes_of(value.storage).numpy().tobytes(),)
    if isinstance(value, nn.Module):
        return _reduced_module(value)
    if isinstance(value, types.MethodType):
        return _bound, (value.__func__, value.__self__)
    if isinstance(value, np.random.RandomState | random.Random | torch.Generator):
        for name, generator in GLOBAL_GENERATORS.items():  # its copy would not be seeded
            if value is generator:
                return global_generator, (name,)
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType, (dict(value),)
    if isinstance(value, torch.finfo | torch.iinfo):
        return type(value), (getattr(torch, value.dtype),)
    if isinstance(value, torch.jit.ScriptFunction):
        return _reduced_scripted(value)
    if type(value) is weakref.ref and value.__callback__ is None:
        return _weak_reference, (value(),)
    return None


def reducing(pickler: type[Any]) -> type[Any]:
    """Return a class of pickler that reduces as `reduced` does, else as the given one.

    What tensors share in memory they share again, once for each pickler.
    """

    class Reducing(pickler):  # type: ignore[misc]  # mypy knows no class that is an argument
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self._storages: dict[int, _Storage] = {}

        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, torch.UntypedStorage) and value.device.type == "cpu":
                pointer = value.data_ptr()
                one = self._storages.setdefault(pointer, _Storage(value)) if pointer else _Storage(value)
                return _identity, (one,)
            made = reduced(value)
            if made is not None:
                return made
            override = getattr(super(), "reducer_override", None)
            return NotImplemented if override is None else override(value)

    return Reducing


class _Storage:
    """A storage on its way; tensors that share it refer to one of these, so that pickle knows it again."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage


# Tensors


def _reduced_tensor(tensor: torch.Tensor) -> Reduced | None:
    kind = type(tensor)
    if not tensor.is_leaf and isinstance(tensor._base, nn.Parameter):
        raise TypeError("it is a view of a parameter, and a copy would have values of its own")
    is_ordinary = (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
        and not nn.parameter.is_lazy(tensor)
        and kind.__reduce_ex__ in (torch.Tensor.__reduce_ex__, nn.Parameter.__reduce_ex__)
        and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )
    if not is_ordinary:
        if not tensor.is_leaf:
            return _identity, (tensor.detach(),)
        return None
    with torch.no_grad():
        arguments = (
            kind,
            tensor.untyped_storage(),
            tensor.dtype,
            tensor.storage_offset(),
            tuple(tensor.size()),
            tensor.stride(),
            tensor.is_leaf and tensor.requires_grad,
            tensor.is_conj(),
            tensor.is_neg(),
            tensor._version if isinstance(tensor, nn.Parameter) else 0,
        )
    hooks = [getattr(tensor, name) if tensor.is_leaf else None for name in HOOKS]
    attributes = {**tensor.__dict__}
    for name in slots(kind):
        if hasattr(tensor, name):
            attributes[name] = getattr(tensor, name)
    if not attributes and not any(hooks):
        return _tensor_of, arguments
    return _tensor_of, arguments, (attributes, hooks), None, None, _set_tensor_state


def slots(kind: type) -> list[str]:
    """Return the names of the attributes that objects of a class have beside their dictionary."""
    return [name for part in kind.__mro__ for name in _names(part.__dict__.get("__slots__", ()))]


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else [name for name in slots if name != "__weakref__"]


def _tensor_of(
    kind: type[torch.Tensor],
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    is_conj: bool,
    is_neg: bool,
    version: int = 0,
) -> torch.Tensor:
    with torch.no_grad():
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, size, stride)
        if is_conj:
            torch._C._set_conj(tensor, True)
        if is_neg:
            torch._C._set_neg(tensor, True)
    if kind is torch.Tensor:
        return tensor.requires_grad_(requires_grad)
    made = torch.Tensor._make_subclass(kind, tensor, requires_grad)
    for _ in range(
        min(version, _MOST_VERSIONS) - made._version
    ):  # its module may have noted which one it saw
        increment_version(made)
    return made


def _set_tensor_state(tensor: torch.Tensor, state: tuple[dict[str, Any], list[Any]]) -> None:
    attributes, hooks = state
    assert isinstance(tensor, torch.Tensor)  # and no class, whose attributes all its objects would get
    for name, value in attributes.items():
        setattr(tensor, name, value)
    for name, held in zip(HOOKS, hooks, strict=True):
        if held:
            setattr(tensor, name, held)
            _claim(held)


def _claim(hooks: Mapping[int, object]) -> None:
    """Let torch number no later hook like one of these: it would take its place."""
    RemovableHandle.next_id = max(RemovableHandle.next_id, *(number + 1 for number in hooks))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def _storage_of(values: bytes) -> torch.UntypedStorage:
    """Return the values in torch's own memory, because bits depend on the alignment."""
    tensor = torch.empty(len(values), dtype=torch.uint8, device="cpu")
    if values:
        tensor.copy_(torch.frombuffer(bytearray(values), dtype=torch.uint8))
    return tensor.untyped_storage()


def _identity(value: T) -> T:
    return value


# Modules


def _reduced_module(module: nn.Module) -> Reduced | None:
    parametrized = parametrize.is_parametrized(module)
    if not parametrized and not any(_hook_tables(module)):
        return None
    if not parametrized:
        made = module.__reduce_ex__(4)
        if isinstance(made, str) or len(made) < 3:
            return None
        return *made, *[None] * (5 - len(made)), _set_module_state
    (base, *_) = type(module).__bases__
    own = getattr(base, "__getstate__", None)
    state = module.__dict__ if own in (None, getattr(object, "__getstate__", None)) else own(module)
    return base.__new__, (base,), state, None, None, _set_parametrized_state


def _hook_tables(module: nn.Module) -> Iterator[Mapping[int, object]]:
    return (
        table
        for name, table in vars(module).items()
        if name.endswith("_hooks") and isinstance(table, dict) and table
    )


def _set_module_state(module: nn.Module, state: Any) -> None:
    module.__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for table in _hook_tables(module):
        _claim(table)


def _set_parametrized_state(module: nn.Module, state: Any) -> None:
    _set_module_state(module, state)
    parametrize._inject_new_class(module)
    for name in cast(nn.ModuleDict, module.parametrizations):
        parametrize._inject_property(module, name)


def _bound(function: Callable[..., Any], to: object) -> types.MethodType:
    return types.MethodType(function, to)


def _reduced_scripted(value: Any) -> Reduced | None:
    """Return how a scripted function is made again: found by its name, or scripted from what has the name."""
    written = getattr(value, "_torchdynamo_inline", None)  # as torch.jit.script leaves it
    if not isinstance(written, types.FunctionType) or written.__module__ == "__main__":
        return None
    named = getattr(sys.modules.get(written.__module__), written.__qualname__, None)
    if named is value:
        return _named, (written.__module__, written.__qualname__)
    if named is written and torch.jit.script(written).qualified_name == value.qualified_name:  # not traced
        return torch.jit.script, (written,)
    return None


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _weak_reference(target: object) -> weakref.ref[Any]:
    return weakref.ref(set() if target is None else target)  # that of a new set is dead at once
