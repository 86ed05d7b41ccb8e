"""The global generators that a module may draw from: torch's, numpy's and Python's.

They are seeded for every use, so that no number depends on what ran before.  A caller
finds them as they were.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["generators_kept", "generators_seeded", "seed_generators"]

_lock = threading.RLock()


@contextmanager
def generators_kept() -> Iterator[torch.Generator]:
    """In the block, keep the global generators for this thread alone; then restore them.

    Dropout and initialisers draw from them.  Two runs in threads of one process would mix their numbers.
    """
    with _lock:
        of_torch, of_numpy, of_python = torch.default_generator.get_state(), _numpys.get(), random.getstate()
        try:
            yield torch.default_generator
        finally:
            torch.default_generator.set_state(of_torch)
            _numpys.set(of_numpy)
            random.setstate(of_python)


def seed_generators(seed: int) -> None:
    """Let all three draw from a seed of 32 bits; inside `generators_kept`."""
    torch.default_generator.manual_seed(seed)
    _numpys.seed(seed)
    random.seed(seed)


@contextmanager
def generators_seeded(seed: int) -> Iterator[None]:
    """In the block, let all three draw from a seed of 32 bits; then restore them."""
    with generators_kept():
        seed_generators(seed)
        yield


def _bit_generator() -> Any:
    return np.random.get_bit_generator()  # type: ignore[attr-defined]  # its stubs do not export it


class _Numpys:
    """numpy's global generator.

    To read its state takes numpy 40 us, and to set it another 40.  A state that has not moved since it was
    last read is not read again: its bytes are compared.
    """

    def __init__(self) -> None:
        self._known: tuple[bytes, Any] | None = None
        self._generator: Any = None
        self._address: int | None = None

    def get(self) -> Any:
        """Return the state."""
        before = self._bytes()
        if self._known is not None and before == self._known[0]:
            return self._known[1]
        state: Any = np.random.get_state(legacy=False)
        # The half of a pair of normal numbers that is still to come is not among these bytes.
        self._known = (before, state) if before is not None and not state["has_gauss"] else None
        return state

    def set(self, state: Any) -> None:
        """Return to a state."""
        if self._known is None or state is not self._known[1] or self._bytes() is None:
            np.random.set_state(state)
        elif self._bytes() != self._known[0]:
            np.random.seed(0)  # forgets half a pair
            assert self._address is not None
            ctypes.memmove(self._address, self._known[0], _STATE_BYTES)

    def seed(self, seed: int) -> None:
        """Draw from a seed of 32 bits."""
        try:
            np.random.seed(seed)
        except TypeError:  # the caller has made it one of another kind
            generator = _bit_generator()
            generator.state = type(generator)(seed).state

    def _bytes(self) -> bytes | None:
        """Return the bytes of the state: 624 words and a position; None if it is of another kind."""
        generator = _bit_generator()
        if generator is not self._generator:
            self._generator, self._address, self._known = generator, None, None
            if type(generator) is np.random.MT19937:
                address = generator.ctypes.state_address
                state = generator.state["state"]
                words = np.append(state["key"].astype("=u4"), np.uint32(state["pos"]))
                if ctypes.string_at(address, _STATE_BYTES) == words.tobytes():
                    self._address = address
        return None if self._address is None else ctypes.string_at(self._address, _STATE_BYTES)


_STATE_BYTES = 625 * 4
_numpys = _Numpys()
