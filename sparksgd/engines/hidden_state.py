"""The state of objects that hide it from Python: generators, iterators, buffers of C, the environment."""

from __future__ import annotations

import contextvars
import gc
import os
import pickle
import queue
import random
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from sparksgd.arithmetic.generators import GLOBAL_GENERATORS
from sparksgd.arithmetic.reductions import slots

__all__ = ["CACHE", "cached_in", "hides_state", "pickled", "reduced", "state_of"]

CACHE = type(lru_cache(lambda: None))
_POINTER = 8
"""Bytes of an attribute in an object."""

_SEEDED = (*GLOBAL_GENERATORS.values(), GLOBAL_GENERATORS["numpy"]._bit_generator)
"""The global generators: they are seeded for every piece."""


def state_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object] | None] | None:
    """Return how to get and set the state of an object that hides it; None: it is none of the known kinds."""
    if any(value is one for one in _SEEDED):
        return lambda: None, None
    if isinstance(value, torch.Generator):
        return lambda: value.get_state().numpy().tobytes(), lambda state: value.set_state(
            torch.frombuffer(bytearray(state), dtype=torch.uint8)
        )
    if isinstance(value, np.random.RandomState):
        return partial(value.get_state, legacy=False), value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, partial(setattr, bits, "state")
    if isinstance(value, np.random.BitGenerator):
        return lambda: value.state, partial(setattr, value, "state")
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, memoryview):
        return value.tobytes, None
    if isinstance(value, types.GeneratorType):
        return partial(_place, value), None
    if isinstance(value, types.CellType):
        return lambda: value.cell_contents, None
    if isinstance(value, contextvars.ContextVar):
        return partial(value.get, None), None
    if isinstance(value, threading.local):
        return lambda: dict(vars(value)), None
    if isinstance(value, queue.SimpleQueue):
        return value.qsize, None
    if value is os.environ:
        return lambda: sorted(value.items()), partial(_set_to, value)
    return None


def _set_to(table: MutableMapping[str, str], items: list[tuple[str, str]]) -> None:
    """Give a table these items; what is right already is not touched, because other threads may read it."""
    before = dict(items)
    for name in table.keys() - before.keys():
        del table[name]
    table.update({name: text for name, text in items if table.get(name) != text})


def _place(generator: types.GeneratorType[Any, Any, Any]) -> tuple[int, str] | None:
    frame = generator.gi_frame
    return None if frame is None else (frame.f_lasti, repr(frame.f_locals))


def hides_state(value: object) -> bool:
    """Return whether an object has fields of C beside its attributes, as an iterator has: it is larger."""
    if isinstance(value, Mapping | list | tuple | set | frozenset | deque | partial):
        return False
    if isinstance(value, types.FunctionType | types.MethodType):
        return False
    kind = type(value)
    tables = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return kind.__basicsize__ > object.__basicsize__ + _POINTER * (len(slots(kind)) + tables)


def reduced(value: object) -> Any:
    """Return what pickle would make an object of, one level deep; None where it cannot."""
    try:
        return value.__reduce_ex__(4)
    except Exception:
        return None


def pickled(state: Any) -> bytes:
    """Return bytes that tell two states apart; none where there are none."""
    try:
        return pickle.dumps(state)
    except Exception:
        return b""


def cached_in(value: Any) -> Iterator[object]:
    """Yield the function, and the results that its cache holds; the cache's own table is left alone."""
    for part in gc.get_referents(value):
        if part is vars(value):
            continue
        if not isinstance(part, dict):
            yield part
        elif value.cache_parameters()["maxsize"] is None:
            yield from part.values()
        elif part and not all(type(one).__name__ == "_lru_list_elem" for one in part.values()):
            yield part
