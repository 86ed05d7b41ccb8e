"""What forward makes of parameters and buffers in a step: the elements that changed, and their values.

    piece of a shard ── starts from the step's weights ── changed elements, by their bytes
    changes of all pieces ── united ── at most one value for each element: the step's value

Projections, norms that are held, averages of weights and counters of steps have one value: they are
functions of the step's weights.  Two values for an element are a conflict.  It is noted, not raised, because
changes are united where messages are added: in the tasks of Spark, too.

Legend: P parameters, N elements of a tensor, K changed elements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparksgd.errors import ModelError, TrainingError

__all__ = [
    "PARAMETERS",
    "ChangedElements",
    "Changes",
    "Conflict",
    "Copy",
    "Words",
    "bits",
    "constants_changed",
    "equal",
    "equal_changes",
    "most_bytes",
    "pack",
    "refuse_conflict",
    "unite",
    "unpack",
]

Words = npt.NDArray[Any]
"""The bytes of elements as whole numbers, one for each element; two for one of 16 bytes."""

PARAMETERS = ""
"""The name of the vector of all trainable parameters, where constants have their own names."""

_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _c_function() -> Callable[[int, int, int], int] | None:
    """Return C's memcmp, which takes half of the time that numpy does; None where Python finds none."""
    try:
        found = ctypes.CDLL(None).memcmp
    except (OSError, TypeError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return found


_memcmp = _c_function()


def bits(tensor: torch.Tensor) -> Words:
    """Return the bytes of a tensor, [N], in the order of its elements; a view if it is contiguous.

    Of a sparse tensor, a copy of the bytes of its indices and values.
    """
    values = tensor.detach()
    if values.layout != torch.strided:
        parts = [bits(part).view(np.int8) for part in _dense_parts(values)]
        return np.concatenate(parts)
    if values.is_conj() or values.is_neg():
        values = values.resolve_conj().resolve_neg()
    return values.contiguous().reshape(-1).view(_WORD[values.element_size()]).numpy()


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


class Copy:
    """The memory of a tensor that is channels last, and the bytes that stand there.

    Args:
        data: [O, I, H, W], channels last in memory.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self._now = bits(data.permute(0, 2, 3, 1))  # a view: in another order it would take longer to compare
        self._kept = np.empty_like(self._now)

    def keep(self) -> None:
        """Let what is there now be what stands."""
        self._kept[...] = self._now

    def is_changed(self) -> bool:
        """Return whether it has other bytes than those that stand."""
        return not equal(self._now, self._kept)

    def restore(self) -> None:
        """Let the bytes be those that stand."""
        self._now[...] = self._kept


def equal(one: Words, other: Words) -> bool:
    """Return whether two arrays of words, [N], both contiguous, have the same bytes."""
    if one.nbytes != other.nbytes:
        return False
    if _memcmp is None:
        return np.array_equal(one, other)
    return _memcmp(one.ctypes.data, other.ctypes.data, one.nbytes) == 0


@dataclass(frozen=True, kw_only=True)
class ChangedElements:
    """The changed elements of one tensor."""

    positions: npt.NDArray[np.int64] | None
    """Which elements, int64[K], ascending; None: all of them."""

    values: Words
    """Their new bytes, [K]."""

    @classmethod
    def between(cls, before: Words, after: Words) -> ChangedElements | None:
        """Return what differs between two versions of a tensor, [N]; None if nothing does."""
        positions = np.flatnonzero(before != after)
        if not len(positions):
            return None
        everything = len(positions) == len(after)
        return cls(positions=None if everything else positions, values=after[positions])

    def write(self, words: Words, start: int = 0) -> None:
        """Write the values into a tensor, or into a part of it.

        Args:
            words: the part's bytes, [n]; changed in place.
            start: the number of its first element.
        """
        if self.positions is None:
            words[...] = self.values[start : start + len(words)]
            return
        first, end = np.searchsorted(self.positions, [start, start + len(words)])
        words[self.positions[first:end] - start] = self.values[first:end]

    def __len__(self) -> int:
        return len(self.values)

    def _places(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.values)) if self.positions is None else self.positions

    def over(self, other: ChangedElements) -> tuple[ChangedElements, Conflict | None]:
        """Return the changes of both, and the first element with two values; of these, this one's counts."""
        if self.positions is None and other.positions is None:
            return self, _conflict(np.arange(len(self)), self.values, other.values)
        mine, theirs = self._places(), other._places()
        at = np.searchsorted(mine, theirs)
        both = np.zeros(len(theirs), bool)
        inside = at < len(mine)
        both[inside] = mine[at[inside]] == theirs[inside]
        conflict = _conflict(theirs[both], self.values[at[both]], other.values[both])
        if both.all():
            return self, conflict
        positions = np.concatenate([mine, theirs[~both]])
        order = np.argsort(positions, kind="stable")
        values = np.concatenate([self.values, other.values[~both]])
        return ChangedElements(positions=positions[order], values=values[order]), conflict


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """An element that two pieces of a step left with different values."""

    position: int
    """Which element of the tensor."""

    values: Words
    """Both, [2]."""


def _conflict(positions: npt.NDArray[np.int64], one: Words, other: Words) -> Conflict | None:
    different = one != other
    if not different.any():
        return None
    first = int(different.argmax())
    return Conflict(position=int(positions[first]), values=np.stack([one[first], other[first]]))


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What forward changed in a piece, or in several; nothing changes it."""

    parts: Mapping[str, ChangedElements]
    """By name of the constant, or PARAMETERS."""

    conflicts: Mapping[str, Conflict] = field(default_factory=dict)
    """The first conflict of each tensor that has one."""

    @property
    def parameters(self) -> ChangedElements | None:
        """Return the changes of the trainable parameters' vector, [P]."""
        return self.parts.get(PARAMETERS)


def constants_changed(before: Changes | None, now: Changes | None) -> Changes | None:
    """Return the changes of constants alone after a turn of one shard: of two values, the later one counts.

    Args:
        before: of the constants, in the round's earlier turns.
        now: what the turn changed.
    """
    if now is None:
        return before
    parts = {} if before is None else dict(before.parts)
    for name, part in now.parts.items():
        if name != PARAMETERS:
            parts[name] = part.over(parts[name])[0] if name in parts else part
    conflicts = {**({} if before is None else before.conflicts), **now.conflicts}
    return Changes(parts=parts, conflicts=conflicts) if parts or conflicts else None


def equal_changes(one: Changes | None, other: Changes | None) -> bool:
    """Return whether the same elements got the same values, byte by byte."""
    if one is None or other is None:
        return one is other
    return one.parts.keys() == other.parts.keys() and all(
        _same_elements(part, other.parts[name]) for name, part in one.parts.items()
    )


def _same_elements(one: ChangedElements, other: ChangedElements) -> bool:
    mine, theirs = (
        np.arange(len(part.values)) if part.positions is None else part.positions for part in (one, other)
    )
    return np.array_equal(mine, theirs) and one.values.tobytes() == other.values.tobytes()


def unite(one: Changes | None, other: Changes | None) -> Changes | None:
    """Return the changes of two pieces of a step; note where they have two values for an element."""
    if one is None or other is None:
        return other if one is None else one
    parts, conflicts = dict(one.parts), {**other.conflicts, **one.conflicts}
    for name, part in other.parts.items():
        known = parts.get(name)
        if known is None:
            parts[name] = part
            continue
        parts[name], conflict = known.over(part)
        if conflict is not None:
            conflicts.setdefault(name, conflict)
    return Changes(parts=parts, conflicts=conflicts)


# As bytes, between workers: for each tensor its number, K (or ALL), and whether it is a conflict; then the
# positions, if not all, and the values.  Nothing of it is unpickled.

_HEAD = np.dtype([("tensor", "<i4"), ("conflict", "<i4"), ("count", "<i8"), ("is_all", "<i8")])


def pack(changes: Changes, names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Return changes as bytes, uint8[n].

    Args:
        changes: of tensors that have these names.
        names: of the tensors, in an order that all workers have.
    """
    number = {name: index for index, name in enumerate(names)}
    pieces: list[npt.NDArray[Any]] = []

    def add(name: str, positions: npt.NDArray[np.int64] | None, values: Words, *, conflict: bool) -> None:
        pieces.append(np.array([(number[name], conflict, len(values), positions is None)], _HEAD))
        if positions is not None:
            pieces.append(positions)
        pieces.append(values)

    for name, part in changes.parts.items():
        add(name, part.positions, part.values, conflict=False)
    for name, found in changes.conflicts.items():
        add(name, np.full(2, found.position), found.values, conflict=True)
    return np.concatenate([np.ascontiguousarray(piece).view(np.uint8) for piece in pieces])


def unpack(packed: npt.NDArray[np.uint8], sizes: Mapping[str, tuple[int, np.dtype[Any]]]) -> Changes:
    """Return the changes that another worker packed.

    Args:
        packed: uint8[n].
        sizes: how many words each tensor has, and of which type, in the order of `pack`.

    Raises:
        TrainingError: it is none of these tensors, or of another size.
    """
    names, start = list(sizes), 0
    parts: dict[str, ChangedElements] = {}
    conflicts: dict[str, Conflict] = {}

    def take(dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        nonlocal start
        end = start + count * dtype.itemsize
        _require(count >= 0 and end <= len(packed))
        start, taken = end, packed[start:end]
        return taken.copy().view(dtype)

    while start < len(packed):
        (head,) = take(_HEAD, 1)
        _require(0 <= head["tensor"] < len(names))
        name, count = names[int(head["tensor"])], int(head["count"])
        size, word = sizes[name]
        _require(0 < count <= max(size, 2) and not (head["is_all"] and count != size))
        positions = None if head["is_all"] else take(np.dtype("<i8"), count)
        values = take(word, count)
        _require(positions is None or (positions[0] >= 0 and positions[-1] < size))
        if head["conflict"]:
            _require(positions is not None and count == 2)
            assert positions is not None
            conflicts[name] = Conflict(position=int(positions[0]), values=values)
        else:
            _require(positions is None or bool((np.diff(positions) > 0).all()))
            parts[name] = ChangedElements(positions=positions, values=values)
    return Changes(parts=parts, conflicts=conflicts)


def most_bytes(sizes: Iterable[tuple[int, np.dtype[Any]]]) -> int:
    """Return the most bytes that changes of such tensors have when they are packed."""
    return sum(
        2 * _HEAD.itemsize + (size + 2) * (np.dtype(np.int64).itemsize + word.itemsize)
        for size, word in sizes
    )


def _require(valid: bool) -> None:
    if not valid:
        raise TrainingError(
            "another worker sent changes that fit none of the module's tensors: their machines run different "
            "versions of the module"
        )


def refuse_conflict(name: str, position: int, values: Sequence[object]) -> ModelError:
    """Return the error of an element that two pieces of a step left with different values.

    Args:
        name: of the parameter or buffer.
        position: of the element, where the tensor is flat.
        values: both values.
    """
    return ModelError(
        f"forward changes {name}, and two pieces of one step leave different values in it: its element "
        f"{position} becomes {values[0]} and {values[1]}. A step has one value for each element, so forward "
        f"may change it by the weights, but not by the rows: keep it fixed, or make it a trainable parameter "
        f"(running statistics of rows are averaged for batch-norm only)"
    )
