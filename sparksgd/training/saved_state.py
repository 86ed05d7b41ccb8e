"""What of a module is saved: its state_dict, and by their paths the constants that this leaves out.

A module that is built again has other tensors, numbers and texts wherever these came from anything but the
arguments and the global generators, and its state_dict knows only parameters and persistent buffers.  Only
tensors and plain values are saved, so that `torch.load(weights_only=True)` reads them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.changes import bits
from sparksgd.arithmetic.copies import copied, parts
from sparksgd.errors import DataError, ModelError
from sparksgd.imports import shown
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.training.encoding import array_as_plain, array_of
from sparksgd.training.plain_values import is_plain, is_torchs, plain_values
from sparksgd.training.tensor_archives import (
    BoundedUnpickler,
    check_archive,
    check_tree,
    check_values,
    makes_little,
)

__all__ = [
    "SavedState",
    "check_saving",
    "differing_tensors",
    "differing_values",
    "load_state",
    "saved_state",
    "values_of",
]

_Number = bool | int | float | complex | str


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A module's values."""

    state: dict[str, Any]
    """Its state_dict: tensors, and what `get_extra_state` gave."""

    constants: dict[str, Any] = field(default_factory=dict)
    """By path: other tensors; arrays, by `array_as_plain`; plain values, as `_of_plain` gives them."""


def saved_state(module: nn.Module, drawn: frozenset[str] = frozenset()) -> SavedState:
    """Return copies of a module's values: of the plain ones, those that users' classes hold, and `drawn`.

    Args:
        module: the module.
        drawn: paths of the plain values that are others when the module is built again.
    """
    with users_torch_code("state_dict() of the module"):
        state = dict(module.state_dict())
    known = {_place(value) for value in state.values() if isinstance(value, torch.Tensor)}
    constants: dict[str, Any] = {}
    for path, value in values_of(module):
        if isinstance(value, np.ndarray):
            constants[path] = array_as_plain(value)
        elif _place(value) not in known:
            constants[path] = _cloned(value)
    for held in plain_values(module):
        if held.is_users or held.path in drawn:
            constants[held.path] = _of_plain(held.value, held.path)
    return SavedState(state={name: _cloned(value) for name, value in state.items()}, constants=constants)


def load_state(module: nn.Module, saved: SavedState) -> list[str]:
    """Give a module the values that were saved; return which plain ones were others, as sentences.

    Raises:
        ModelError: it has not the tensors that they are of.
    """
    for name, value in saved.state.items():
        _make_room(module, name, value)
    keys = module.load_state_dict(saved.state, strict=False)
    missing = [name for name in keys.missing_keys if name not in saved.constants]
    if missing or keys.unexpected_keys:
        raise ModelError(
            f"its state_dict does not fit the module: missing {', '.join(missing) or 'nothing'}; unexpected "
            f"{', '.join(keys.unexpected_keys) or 'nothing'}"
        )
    others = _load_plain(module, {p: v for p, v in saved.constants.items() if _is_of_plain(v)})
    constants = {path: value for path, value in saved.constants.items() if not _is_of_plain(value)}
    loaded = _Memory([value for name, value in values_of(module) if name in saved.state])
    for is_again in (False, True):  # what was written may have been a view of what was written before it
        held = dict(values_of(module))
        for path, saved_value in constants.items():
            value = saved_value if isinstance(saved_value, torch.Tensor) else array_of(saved_value)
            now = held.get(path)
            if now is not None and _bits(now) == _bits(value):
                continue
            apart = is_again or loaded.holds(now)  # else it would overwrite what is loaded
            if isinstance(value, torch.Tensor):
                _set_tensor(module, path, now, value, apart=apart)
            else:
                _set_array(module, path, now, value, apart=apart)
    return others


class _Memory:
    """The storages of some tensors and arrays."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._ranges = [found for found in map(_addresses, values) if found is not None]

    def holds(self, value: Any) -> bool:
        """Return whether a tensor or an array lies in one of them."""
        mine = _addresses(value)
        return mine is not None and any(mine.start < r.stop and r.start < mine.stop for r in self._ranges)


def _load_plain(module: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    held = {each.path: each for each in plain_values(module)} if saved else {}
    others = []
    for path, kept in saved.items():
        value = _plain_of(kept)
        if path in held:
            if held[path].differs(value):
                others.append(f"{path} is {shown(value)}, but was built as {shown(held[path].value)}")
                held[path].put(value)
        elif path.endswith("]"):
            raise ModelError(f"the module has no {path}, which was saved as {shown(value)}")
        else:
            owner, name = _owner(module, path)
            vars(owner)[name] = value
    return others


def differing_tensors(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the paths of the tensors and arrays that two modules have not both, to the bit."""
    values, others = dict(values_of(one)), dict(values_of(other))
    return [
        path
        for path in {**values, **others}
        if path not in values or path not in others or _bits(values[path]) != _bits(others[path])
    ]


def differing_values(one: nn.Module, other: nn.Module) -> frozenset[str]:
    """Return the paths of the plain values that are others in another module, or not there."""
    held = {each.path: each for each in plain_values(other)}
    return frozenset(
        each.path
        for each in plain_values(one)
        if each.path not in held or held[each.path].differs(each.value)
    )


def check_saving(module: nn.Module) -> None:
    """Refuse a module whose state_dict cannot be saved, or not be loaded again.

    Args:
        module: not changed; a copy is saved and loaded.

    Raises:
        ModelError: which key, and why.
    """
    original = copied(module)
    saved = saved_state(original)
    for name, value in saved.state.items():
        if _is_ordinary(value):
            continue
        stream = io.BytesIO()
        try:
            torch.save({name: value}, stream)
            check_archive(stream.getvalue())
            stream.seek(0)
            check_values(torch.load(stream, weights_only=True), len(stream.getvalue()))
        except Exception as error:
            why = (str(error).strip().splitlines() or [""])[0]
            raise ModelError(
                f"state_dict() of the module gives {name} as a {type(value).__name__}, which cannot be saved "
                f"safely ({type(error).__name__}: {why}): give tensors and plain numbers, texts, lists or "
                f"dictionaries of them"
            ) from error
    other = copied(module)
    try:
        for _, value in values_of(other):
            _disturb(value)
        load_state(other, saved)
    except Exception as error:
        raise ModelError(
            f"the module cannot load what its own state_dict() gives, so no model could be saved: "
            f"{type(error).__name__}: {error}"
        ) from error
    if different := differing_tensors(original, other):
        raise ModelError(
            f"{different[0]} is another tensor after load_state_dict() of what state_dict() gave: the saved "
            f"model would not be the trained one; look at the module's hooks of both"
        )


def _is_ordinary(value: object) -> bool:
    """Return whether an object is a tensor as torch always saves and loads them."""
    return (
        type(value) is torch.Tensor
        and value.dtype in (torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested or value.requires_grad or vars(value))
    )


def values_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the tensors and arrays of a module, each once, with its path."""
    seen: set[int] = set()
    named = [*module.named_parameters(), *module.named_buffers()]
    for prefix, part in module.named_modules():
        attributes = ((name, value) for name, value in vars(part).items() if not is_torchs(name))
        named += [(f"{prefix}.{name}" if prefix else name, value) for name, value in attributes]
    for path, value in named:
        yield from _values_in(path, value, seen)


def _values_in(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen or isinstance(value, nn.Module):
        return
    if isinstance(value, torch.Tensor):
        seen.add(id(value))
        if not (nn.parameter.is_lazy(value) or value.is_meta or value.is_nested):
            yield path, value
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        seen.add(id(value))
        yield path, value
    elif isinstance(value, list | tuple | dict) and not is_plain(value):  # a vocabulary may be long
        seen.add(id(value))
        for step, part in parts(value):
            yield from _values_in(path + step, part, seen)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the submodule that has a parameter, buffer or attribute, and its name there."""
    *parents, name = path.split(".")
    try:
        owner = module.get_submodule(".".join(parents))
    except AttributeError as error:
        raise ModelError(f"the module has no {path}, of which there is a saved value") from error
    hides_code = name not in vars(owner) and callable(getattr(type(owner), name, None))
    if is_torchs(name) or name.startswith("__") or hides_code:
        raise ModelError(f"{path} is no value of the module: its class or torch uses that name")
    return owner, name


def _make_room(module: nn.Module, name: str, value: Any) -> None:
    """Make a buffer that is still None, and that forward had made, before it is loaded."""
    *parents, last = name.split(".")
    try:
        buffers = module.get_submodule(".".join(parents))._buffers
    except AttributeError:
        return  # load_state_dict says it better
    if last in buffers and buffers[last] is None and isinstance(value, torch.Tensor):
        buffers[last] = value.clone()


def _set_tensor(module: nn.Module, path: str, held: Any, value: torch.Tensor, *, apart: bool) -> None:
    """Give a tensor a value: in its memory, or, apart, in memory of its own."""
    fits = isinstance(held, torch.Tensor) and (held.shape, held.dtype) == (value.shape, value.dtype)
    if fits and not apart and held.layout is torch.strided is value.layout:
        with torch.no_grad():
            held.detach().copy_(value)
        return
    if path.endswith("]"):
        what = "in memory of its own" if fits else f"of shape {tuple(value.shape)}"
        raise ModelError(f"the module has no tensor {path} {what}, as was saved")
    owner, name = _owner(module, path)
    if isinstance(held, nn.Parameter):
        held.data = value
    elif name in owner._buffers:
        owner._buffers[name] = value
    else:
        vars(owner)[name] = value


def _set_array(module: nn.Module, path: str, held: Any, value: np.ndarray[Any, Any], *, apart: bool) -> None:
    fits = isinstance(held, np.ndarray) and (held.shape, held.dtype) == (value.shape, value.dtype)
    if fits and not apart:
        held[...] = value
    elif path.endswith("]"):
        raise ModelError(f"the module has no array {path} of shape {value.shape}, as was saved")
    else:
        setattr(*_owner(module, path), value)


def _of_plain(value: Any, path: str) -> Any:
    """Return a plain value so that it is told from a tensor or an array, and a long one is read quickly."""
    if isinstance(value, np.generic):
        return array_as_plain(np.asarray(value)) | {"scalar": True}
    if isinstance(value, _Number):
        return value
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol=4).dump(value)
    pickled = stream.getvalue()
    try:
        if not makes_little(pickled):
            _PlainUnpickler(pickled).load()
    except DataError as error:
        raise ModelError(f"{path} cannot be saved, because nobody could read it: {error}") from error
    return {"plain": True, "bytes": torch.frombuffer(bytearray(pickled), dtype=torch.uint8)}


def _is_of_plain(saved: Any) -> bool:
    if isinstance(saved, Mapping):
        return "plain" in saved or "scalar" in saved
    return isinstance(saved, _Number)


def _plain_of(saved: Any) -> Any:
    if isinstance(saved, _Number):
        return saved
    if "scalar" in saved:
        return array_of(saved)[()]
    data = saved["bytes"].numpy().tobytes()
    value = _PlainUnpickler(data).load()
    check_tree([value], len(data))
    if not is_plain(value):
        raise ModelError(f"a saved value is a {type(value).__name__}, which is no plain value")
    return value


class _PlainUnpickler(BoundedUnpickler):
    """Reads plain values alone, so that no file runs code."""

    dispatch: ClassVar[dict[int, Callable[[pickle.Unpickler], None]]] = {
        code: load
        for code, load in BoundedUnpickler.dispatch.items()
        if code not in (*pickle.EMPTY_SET, *pickle.FROZENSET)  # an empty one takes 200 bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "complex"):
            return complex
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def _cloned(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().resolve_conj().resolve_neg()


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return id(tensor), tensor.layout
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _addresses(value: Any) -> range | None:
    """Return the addresses of a tensor's storage, or of an array's first element; None if there are none."""
    if isinstance(value, np.ndarray):
        first = value.__array_interface__["data"][0]
        return range(first, first + value.itemsize) if value.size else None
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or not value.numel():
        return None
    storage = value.untyped_storage()
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def _bits(value: Any) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value.dtype, tuple(value.shape), bits(value).tobytes()


def _disturb(value: Any) -> None:
    """Change every element of a tensor or an array."""
    if isinstance(value, np.ndarray):
        if value.flags.writeable:
            value[...] = np.zeros_like(value)
    elif value.layout is torch.strided and not value.is_quantized:
        with torch.no_grad():
            value.detach().zero_()
