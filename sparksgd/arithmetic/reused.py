"""Arrays that are used again as soon as nobody has them: a vector for each message, without new memory.

An array is free if only this list refers to it.  That is sound because whatever uses the memory of an array
holds a reference to it: a view, a tensor that `torch.from_numpy` made, a memoryview, a message.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ReusedArrays"]

_OWN_REFERENCES = 3  # of the list, of the loop, and of the call that counts


class ReusedArrays:
    """Gives out arrays."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []

    def __len__(self) -> int:
        return len(self._arrays)

    def take(self, shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content that nobody else has."""
        wanted = np.dtype(kind)
        for array in self._arrays:
            if array.shape == shape and array.dtype == wanted and sys.getrefcount(array) == _OWN_REFERENCES:
                return array
        made = np.empty(shape, wanted)
        self._arrays.append(made)
        return made

    def copy_of(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a copy that nobody else has."""
        made = self.take(values.shape, values.dtype)
        made[...] = values
        return made
