"""Arrays that are used again as soon as nobody has them: a vector for each message, without new memory.

An array is free if only this list refers to it.  That is sound because whatever uses the memory of an array
holds a reference to it: a view, a tensor that `torch.from_numpy` made, a memoryview, a message.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ReusedArrays"]

_LEAST_BYTES = 4096  # memory for less costs nothing, and there may be very many of them


class ReusedArrays:
    """Gives out arrays, and keeps them: as many of each shape as were in use at once.

    Args:
        shapes: the shapes that come again and again, which are kept; None: all.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]] | None = None) -> None:
        self._shapes = shapes
        self._kept: dict[tuple[tuple[int, ...], np.dtype[Any]], deque[npt.NDArray[Any]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def take(self, shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content that nobody else has."""
        wanted = np.dtype(kind)
        comes_again = self._shapes is None or shape in self._shapes
        if not comes_again or math.prod(shape) * wanted.itemsize < _LEAST_BYTES:
            return np.empty(shape, wanted)
        kept = self._kept.setdefault((shape, wanted), deque())
        for _ in range(len(kept)):
            is_free = _references_of_first(kept) == _OF_A_FREE_ONE
            kept.rotate(-1)  # so that the one that was given longest ago is looked at first
            if is_free:
                return kept[-1]
        made = np.empty(shape, wanted)
        kept.append(made)
        return made

    def copy_of(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a copy that nobody else has."""
        made = self.take(values.shape, values.dtype)
        made[...] = values
        return made


def _references_of_first(kept: deque[npt.NDArray[Any]]) -> int:
    return sys.getrefcount(kept[0])


_OF_A_FREE_ONE = _references_of_first(deque([np.empty(0)]))  # which Pythons count differently
