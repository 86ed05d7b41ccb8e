"""The global generators that a module may draw from: torch's, numpy's and Python's.

They are seeded for every use, so that no number depends on what ran before.  A caller
finds them as they were.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = [
    "GLOBAL_GENERATORS",
    "generators_kept",
    "generators_seeded",
    "global_generator",
    "seed_generators",
]

_lock = threading.RLock()

GLOBAL_GENERATORS: dict[str, Any] = {
    "torch": torch.default_generator,
    "numpy": np.random.random.__self__,  # type: ignore[attr-defined]  # numpy's functions are its methods
    "python": random.random.__self__,  # type: ignore[attr-defined]  # and so are those of random
}


def global_generator(name: str) -> Any:
    """Return one of the global generators."""
    return GLOBAL_GENERATORS[name]


@contextmanager
def generators_kept() -> Iterator[torch.Generator]:
    """In the block, keep the global generators for this thread alone; then restore them.

    Dropout and initialisers draw from them.  Two runs in threads of one process would mix their numbers.
    """
    with _lock:
        of_torch, of_python = torch.default_generator.get_state(), random.getstate()
        of_numpy = np.random.get_state(legacy=False)
        try:
            yield torch.default_generator
        finally:
            torch.default_generator.set_state(of_torch)
            np.random.set_state(of_numpy)
            random.setstate(of_python)


def seed_generators(seed: int) -> None:
    """Let all three draw from a seed of 32 bits; inside `generators_kept`."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def generators_seeded(seed: int) -> Iterator[None]:
    """In the block, let all three draw from a seed of 32 bits; then restore them."""
    with generators_kept():
        seed_generators(seed)
        yield
