"""Frozen parameters and buffers: what stands of each, and what forward made of it.

Constant means that no optimiser moves them.  Forward may change them, as far as all pieces of a step give one
value (see changes.py): a counter, an average of weights, a teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from sparksgd.arithmetic.changes import ChangedElements, Copy, Words, bits, equal
from sparksgd.errors import ModelError

__all__ = ["Constants", "Slot", "decoded"]


class Slot:
    """Where a module keeps a buffer: user's code may put another tensor there.

    Args:
        holder: the module's dictionary of buffers, or of parameters.
        key: the name in it.
    """

    def __init__(self, holder: dict[str, Any], key: str) -> None:
        self._holder, self._key = holder, key
        self.tensor: torch.Tensor = holder[key]
        """The tensor that belongs there."""

    def now(self) -> torch.Tensor | None:
        """Return the tensor that is there."""
        return self._holder.get(self._key)

    def put_back(self) -> None:
        """Put the tensor there that belongs there."""
        if self._holder.get(self._key) is not self.tensor:
            self._holder[self._key] = self.tensor


class _Constant:
    """One constant."""

    def __init__(self, name: str, slot: Slot) -> None:
        self.name, self.slot = name, slot
        self.kept: Words | None = None  # the bytes that stand, where forward is watched
        self._base = slot.tensor.data
        self.bind(self._base)

    def bind(self, data: torch.Tensor, copy: Copy | None = None) -> None:
        """Note which memory it has now: the module's own, or a copy that is channels last."""
        self.data, self._copy = data, copy
        self._is_dense = data.layout == torch.strided
        self._where = _place(data) if self._is_dense else None
        self._words = bits(data) if self._is_dense and data.is_contiguous() else None

    def is_bound(self) -> bool:
        """Return whether its tensor is in its slot, in its memory."""
        tensor = self.slot.tensor
        if self.slot.now() is not tensor:
            return False
        return not self._is_dense or _place(tensor) == self._where

    def words(self) -> Words:
        """Return its bytes as they are now in its memory; a view where that is contiguous."""
        return bits(self.data) if self._words is None else self._words

    def keep(self) -> Words:
        """Return the bytes that stand; those of now, the first time."""
        if self.kept is None:
            self.kept = self.words().copy()
        return self.kept

    def write(self, words: Words) -> None:
        """Overwrite its memory, and what stands."""
        _write(self._base, words)
        if self._copy is not None:
            self.data.copy_(self._base)
            self._copy.keep()
        if self.kept is not None and self.kept is not words:
            self.kept[...] = words

    def change(self) -> ChangedElements | None:
        """Return what forward made of it."""
        kept = self.keep()
        if self.is_bound():
            if self._copy is not None and not self._copy.is_changed():
                return None
            words = self.words()
        else:
            now = self.slot.now()
            assert now is not None, "the structure was checked before"
            if _form(now) != _form(self.data):
                raise ModelError(
                    f"forward makes {self.name} {_described(now)}, but it was {_described(self.data)}: "
                    f"forward may change its values only"
                )
            words = bits(now)
        if equal(kept, words):
            return None
        if not self._is_dense:
            raise ModelError(f"forward changes {self.name}, which is sparse: only a dense tensor may change")
        return ChangedElements.between(kept, words)

    def restore(self) -> None:
        """Let it stand as it did before forward, by its binding and its bytes."""
        if not self.is_bound():
            self.slot.put_back()
            if self._is_dense:
                self.slot.tensor.data = self.data
        if self._is_dense and self.kept is not None and not equal(self.kept, self.words()):
            self.write(self.kept)


def _write(tensor: torch.Tensor, words: Words) -> None:
    if tensor.is_contiguous():
        bits(tensor)[...] = words
        return
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    bits(made)[...] = words
    tensor.copy_(made)


class Constants:
    """The constants of a module.

    Args:
        module: has them.
        moving: the tensors that are none, by their `id`: trained parameters, and the buffers of a batch-norm
            that trains.
    """

    def __init__(self, module: nn.Module, moving: set[int]) -> None:
        self._constants = {
            name: _Constant(name, Slot(holder, key)) for name, holder, key in _named(module, moving)
        }
        self._by_id = {id(constant.slot.tensor): constant for constant in self._constants.values()}
        self._first: dict[str, Words] = {}  # before any change, of those that changed
        self._given: Mapping[str, Words] | None = None

    @property
    def names(self) -> list[str]:
        """Return the names: frozen parameters, then buffers, in the module's order."""
        return list(self._constants)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors."""
        return ((name, constant.slot.tensor) for name, constant in self._constants.items())

    def sizes(self) -> dict[str, tuple[int, np.dtype[Any]]]:
        """Return the number of words, and their type, of each."""
        words = ((name, constant.words()) for name, constant in self._constants.items())
        return {name: (len(found), found.dtype) for name, found in words}

    def bind(self, parameter: torch.Tensor, data: torch.Tensor, copy: Copy | None) -> None:
        """Note which memory a frozen parameter has from now on; do nothing for others."""
        constant = self._by_id.get(id(parameter))
        if constant is not None:
            constant.bind(data, copy)

    def current(self, *, copy: bool) -> dict[str, Words]:
        """Return the bytes of those that have ever changed; copies, or views where they are contiguous."""
        found = {name: self._constants[name].words() for name in self._first}
        return {name: words.copy() for name, words in found.items()} if copy else found

    def load(self, given: Mapping[str, Words]) -> None:
        """Overwrite those that have ever changed; all others get their first values again."""
        if given is self._given:
            return
        for name, words in given.items():
            constant = self._touched(name)
            if not np.may_share_memory(words, constant.words()):
                constant.write(words)
        for name in self._first.keys() - given.keys():
            self._constants[name].write(self._first.pop(name))
        self._given = given

    def apply(self, parts: Mapping[str, ChangedElements]) -> None:
        """Write changes."""
        for name, part in parts.items():
            constant = self._touched(name)
            words = constant.words().copy()
            part.write(words)
            constant.write(words)
            self._given = None

    def _touched(self, name: str) -> _Constant:
        constant = self._constants[name]
        if name not in self._first:
            self._first[name] = constant.words().copy()
        return constant

    def stand(self) -> None:
        """Keep the bytes that stand, before forward runs."""
        for constant in self._constants.values():
            constant.keep()

    def rebound(self) -> dict[str, torch.Tensor]:
        """Return those that have other memory than before forward, as they are now."""
        apart = (
            (n, constant.slot.now()) for n, constant in self._constants.items() if not constant.is_bound()
        )
        return {name: tensor for name, tensor in apart if tensor is not None}

    def take(self, rebound: Iterable[str]) -> dict[str, ChangedElements]:
        """Return what forward changed, and let everything stand as before.

        Args:
            rebound: see above.
        """
        changed = {name: part for name, constant in self._constants.items() if (part := constant.change())}
        for name in {*changed, *rebound}:
            self._constants[name].restore()
        return changed

    def restore(self) -> None:
        """Let everything stand as it did before forward."""
        for constant in self._constants.values():
            constant.restore()

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of one."""
        return self._constants[name].data.dtype


def decoded(words: Words, dtype: torch.dtype) -> list[object]:
    """Return the elements that words are, as Python's numbers; of 16 bytes, the words themselves."""
    values = torch.from_numpy(np.ascontiguousarray(words))
    found: list[object] = (values if dtype == torch.complex128 else values.view(dtype)).tolist()
    return found


def _named(module: nn.Module, moving: set[int]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the name of each constant, and where it is."""
    seen = set(moving)
    for kind in ("_parameters", "_buffers"):
        for path, part in module.named_modules():
            holder = getattr(part, kind)
            if isinstance(part, torch.jit.ScriptModule):  # its dictionary makes new tensors when asked
                holder = dict(holder.items())
            for key, tensor in holder.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}{'.' if path else ''}{key}", holder, key


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.layout, tensor.device


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
