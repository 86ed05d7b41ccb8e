"""Keyed randomness: every random number follows from (seed, purpose, place).

No generator lives on from step to step, so that every worker would draw the same numbers.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

__all__ = ["permutation", "seed32"]


def _digest(seed: int, purpose: str, place: tuple[int, ...], size: int) -> bytes:
    text = "/".join([str(seed), purpose, *map(str, place)])
    return blake2b(text.encode(), digest_size=size).digest()


def seed32(seed: int, purpose: str, *place: int) -> int:
    """Return the 32-bit seed of one use (torch's CPU generator ignores any higher bits).

    >>> seed32(1, "dropout", 3, 500) == seed32(1, "dropout", 3, 500)
    True
    """
    return int.from_bytes(_digest(seed, purpose, place, 4), "little")


def permutation(rows: int, seed: int, purpose: str, *place: int) -> npt.NDArray[np.uint32]:
    """Return a permutation of range(rows): argsort of Philox's raw bits, keyed by the place.

    Raw bits are all that numpy promises not to change between its versions.

    >>> sorted(permutation(4, 1, "shuffle").tolist())
    [0, 1, 2, 3]
    """
    key = np.frombuffer(_digest(seed, purpose, place, 16), dtype="<u8")
    bits = np.random.Philox(key=key).random_raw(rows)
    return np.argsort(bits, kind="stable").astype(np.uint32)
