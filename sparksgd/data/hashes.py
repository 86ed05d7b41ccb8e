"""Hashes of rows as numbers of 64 bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["leading_words", "stirred"]


def leading_words(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the first 8 bytes of each key, uint8[B, K], as a number, uint64[B]."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0].astype(np.uint64, copy=False)


def stirred(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the values mixed by SplitMix64's finaliser, a bijection (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
