"""What stands while forward runs: every piece starts from it, and what forward changes is found by its bytes.

`w.data.clamp_()` does not move a tensor's version, `w.data = ...` moves its memory, and a buffer may be
replaced: only a comparison of bytes finds all of it.  The bytes of parameters that a solver writes in place
are a copy (`_Kept`), or the solver's own, where the system tells what was written (mapped_twice.py).

Legend: P parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.autograd.graph import increment_version

from sparksgd.arithmetic.changes import (
    PARAMETERS,
    ChangedElements,
    Changes,
    Copy,
    bits,
    equal,
    refuse_conflict,
)
from sparksgd.arithmetic.constants import Constants, decoded
from sparksgd.arithmetic.mapped_twice import MappedTwice
from sparksgd.arithmetic.structure import Structure
from sparksgd.errors import ModelError

__all__ = ["Piece", "Standing", "extent"]


class Piece:
    """What a piece's forward made."""

    changes: Changes | None = None
    """What it changed in parameters and constants; None if nothing.  Known after the block."""


class _Kept:
    """One vector that the module has and the solver writes, and the bytes that stand, which may be a copy.

    Args:
        vector: float[P].
    """

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector
        self.words = self.stands = bits(vector)
        self._copy: torch.Tensor | None = None

    def stand_at(self, point: torch.Tensor) -> None:
        """Let a point, float[P], be what stands, and what the module has; the vector itself is copied."""
        if point.data_ptr() == self.vector.data_ptr():
            if self._copy is None:
                self._copy = torch.empty_like(self.vector)
            point = self._copy.copy_(self.vector)
        else:
            self.vector.copy_(point)
        self.stands = bits(point)

    def is_changed(self) -> bool:
        """Return whether the module has other bytes than those that stand."""
        return not equal(self.words, self.stands)

    def restore(self) -> None:
        """Let the module have the bytes that stand."""
        if self.is_changed():
            self.words[...] = self.stands


class Standing:
    """The parameters and constants of a module, as they stand before forward.

    Args:
        module: has them.
        trainable: its trained parameters by name, each a view of the vector.
        vector: float[P].
        constants: its frozen parameters and buffers.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        vector: torch.Tensor,
        constants: Constants,
    ) -> None:
        self._names, self._trainable = list(trainable), list(trainable.values())
        self._constants, self._structure = constants, Structure(module)
        self._ends = list(accumulate(parameter.numel() for parameter in self._trainable))
        self.hold(_Kept(vector))
        self._number = {id(parameter): number for number, parameter in enumerate(self._trainable)}
        self._last: dict[int, Copy] = {}  # those that are channels last now, by number
        self.moves_versions = True
        """Whether forward sees other versions of the parameters in each piece."""

    def hold(self, memory: _Kept | MappedTwice) -> None:
        """Note which memory the parameters have from now on; `at` comes next."""
        self._memory, self._has_point = memory, False
        self._homes = [parameter.data for parameter in self._trainable]  # the memory of each
        self._places = [_place(home) for home in self._homes]

    def at(self, point: npt.NDArray[np.floating]) -> None:
        """Give the module the parameters of a point, float[P]: pieces start from there until the next call.

        Args:
            point: not changed by anyone in the meantime.  If it is the vector itself, it may change between
                pieces only with a new call.
        """
        self._memory.stand_at(torch.from_numpy(point))
        self._has_point = True
        self._constants.stand()

    @contextmanager
    def piece(self) -> Iterator[Piece]:
        """In the block, let forward and backward of a piece run; then all stands as before.

        Yields:
            What has the changes after the block.  `at` says what stands.

        Raises:
            ModelError: a submodule or parameter was made, removed or replaced; or a tensor has another shape
                or type.
        """
        assert self._has_point, "at() comes first"
        self._count_version()
        made = Piece()
        try:
            yield made
            self._structure.check()
            moved, rebound = self._moved(), self._constants.rebound()
            if moved or rebound:
                self._refuse_sharing({self._names[n]: self._trainable[n] for n in moved} | rebound)
            parts = self._constants.take(rebound)
            part = self._changed_parameters(moved)
            if part is not None:
                parts[PARAMETERS] = part
            made.changes = Changes(parts=parts) if parts else None
        except BaseException:
            self._structure.restore()
            self._stand_again()
            self._constants.restore()
            raise

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let everything that the block changes stand again as before: an evaluation leaves no trace.

        Raises:
            ModelError: a submodule or parameter was made, removed or replaced.
        """
        assert self._has_point, "at() comes first"
        self._count_version()
        try:
            yield
            self._structure.restore_buffers()
            self._structure.check("evaluation")
        finally:
            self._structure.restore()
            self._stand_again()
            self._constants.restore()

    def _count_version(self) -> None:
        """Let each parameter say that it has changed: torch does not know who writes its bytes."""
        for parameter in self._trainable if self.moves_versions else ():
            increment_version(parameter)

    def _moved(self) -> list[int]:
        """Return which parameters have other memory than before forward."""
        placed = zip(self._trainable, self._places, strict=True)
        return [number for number, (parameter, place) in enumerate(placed) if _place(parameter) != place]

    def _refuse_sharing(self, rebound: Mapping[str, torch.Tensor]) -> None:
        """Refuse a tensor whose new memory is another one's: in one process, both would change from now on.

        Raises:
            ModelError: their names.
        """
        held = [(name, tensor) for name, tensor in self._structure.tensors() if extent(tensor)]
        for name, tensor in rebound.items():
            mine = extent(tensor)
            for other, shared in held:
                theirs = extent(shared)
                if shared is not tensor and mine.start < theirs.stop and theirs.start < mine.stop:
                    raise ModelError(
                        f"forward gives {name} the memory of {other}, so that whoever changes one of them "
                        f"changes both: give it a copy, by .clone()"
                    )

    def _changed_parameters(self, moved: Sequence[int]) -> ChangedElements | None:
        """Return what forward changed, and let the parameters stand as before.

        Args:
            moved: those that have other memory.
        """
        is_changed = self._memory.is_changed() or any(copy.is_changed() for copy in self._last.values())
        if not moved and not is_changed:
            return None
        now = self._memory.words.copy()
        for number in {*moved, *self._last}:
            now[self._span(number)] = bits(self._checked(number))
        part = ChangedElements.between(self._memory.stands, now)
        self._stand_again()
        return part

    def _checked(self, number: int) -> nn.Parameter:
        """Return a parameter, if it has the shape and type that it had."""
        parameter, home = self._trainable[number], self._homes[number]
        if (parameter.shape, parameter.dtype) != (home.shape, home.dtype):
            raise ModelError(
                f"forward makes parameter {self._names[number]} {tuple(parameter.shape)} of "
                f"{parameter.dtype}, but it was {tuple(home.shape)} of {home.dtype}: forward may change its "
                f"values only"
            )
        return parameter

    def _span(self, number: int) -> slice:
        end = self._ends[number]
        return slice(end - self._homes[number].numel(), end)

    def _stand_again(self) -> None:
        """Let all parameters be in their memory, with the bytes that stand.

        Raises:
            ModelError: that memory is elsewhere now.
        """
        for number, (parameter, place) in enumerate(zip(self._trainable, self._places, strict=True)):
            if _place(parameter) != place:
                parameter.data = self._homes[number]
                if _place(parameter) != place:
                    raise ModelError(
                        f"forward moves the memory of parameter {self._names[number]}, as share_memory_() "
                        f"does: leave it where it is, and share a .clone()"
                    )
        self._memory.restore()
        for copy in self._last.values():
            if copy.is_changed():
                copy.restore()

    def apply(self, changes: Changes | None, strip: range | None = None) -> None:
        """Let what forward made of parameters and constants be the weights.

        Args:
            changes: of all pieces of a step; None if nothing was changed.
            strip: which parameters to write; None: all.

        Raises:
            ModelError: pieces left different values in an element; nothing is written.
        """
        if changes is None:
            return
        for name, conflict in changes.conflicts.items():
            position, dtype = conflict.position, self._memory.vector.dtype
            if name == PARAMETERS:
                number = bisect_right(self._ends, position)
                name, position = self._names[number], position - self._span(number).start
            else:
                dtype = self._constants.dtype(name)
            raise refuse_conflict(name, position, decoded(conflict.values, dtype))
        if changes.parameters is not None:
            words = bits(self._memory.vector)
            part = range(len(words)) if strip is None else strip
            changes.parameters.write(words[part.start : part.stop], part.start)
        self.apply_constants(changes)

    def apply_constants(self, changes: Changes) -> None:
        """Let what forward made of the constants alone be theirs."""
        self._constants.apply({name: part for name, part in changes.parts.items() if name != PARAMETERS})

    def sizes(self) -> dict[str, tuple[int, np.dtype[Any]]]:
        """Return how many words, and of which type, the parameters and each constant have."""
        words = self._memory.words
        return {PARAMETERS: (len(words), words.dtype), **self._constants.sizes()}

    def bind(self, weight: nn.Parameter, data: torch.Tensor, copy: Copy | None = None) -> None:
        """Note which memory a parameter has from now on; a copy if it is channels last."""
        number = self._number.get(id(weight))
        if number is None:
            self._constants.bind(weight, data, copy)
            return
        self._homes[number], self._places[number] = data, _place(data)
        if copy is None:
            self._last.pop(number, None)
        else:
            self._last[number] = copy


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Return where a tensor lies in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def extent(tensor: torch.Tensor) -> range:
    """Return the addresses from the first byte that a tensor uses to the last; none of a sparse one."""
    if tensor.is_nested:
        storage = tensor.untyped_storage()
        return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
    if tensor.layout != torch.strided or not tensor.numel():
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())
