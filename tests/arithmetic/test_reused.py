"""Arrays are used again when nobody has them, and never before."""

from __future__ import annotations

import importlib.util
import sys
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from sparksgd.arithmetic import reused
from sparksgd.arithmetic.reused import ReusedArrays

N = 1024
"""Values of an array that is large enough to be kept."""


def test_an_array_that_nobody_has_is_given_again() -> None:
    arrays = ReusedArrays()
    one = arrays.take((N,), np.float32)
    one[...] = 7
    other = arrays.take((N,), np.float32)
    assert other is not one
    place = one.ctypes.data
    del one
    again = arrays.copy_of(np.arange(N, dtype=np.float32))
    assert again.ctypes.data == place
    assert again.tolist() == list(range(N))
    assert len(arrays) == 2


@pytest.mark.parametrize(
    "kept",
    [
        lambda array: array[1:],
        lambda array: array.reshape(1, -1),
        lambda array: array.view(np.uint8),
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[1:],
        memoryview,
        lambda array: memoryview(array).cast("B")[2:],
        lambda array: array.view(np.uint8).data,
        lambda array: {"gradient": array},
        lambda array: array.T,
        lambda array: np.asarray(array),
        lambda array: lambda: array,
    ],
)
def test_whatever_uses_its_memory_keeps_it(kept: Any) -> None:
    arrays = ReusedArrays()
    user = kept(arrays.take((N,), np.float32))
    assert arrays.take((N,), np.float32) is not None
    assert len(arrays) == 2
    del user
    arrays.take((N,), np.float32)
    assert len(arrays) == 2


def test_one_of_another_shape_or_type_is_another_one() -> None:
    arrays = ReusedArrays()
    for shape, kind in (((N,), np.float32), ((N + 1,), np.float32), ((N,), np.float64), ((N, 1), np.float32)):
        assert arrays.take(shape, kind).shape == shape
    assert len(arrays) == 4


def test_how_many_references_a_free_one_has_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    count = sys.getrefcount  # Python 3.14 borrows what 3.11 counts
    monkeypatch.setattr(sys, "getrefcount", lambda array: count(array) - 2)
    spec = importlib.util.find_spec(reused.__name__)
    assert spec is not None
    assert spec.loader is not None
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    arrays = there.ReusedArrays()
    used = arrays.take((N,), np.float32)
    assert arrays.take((N,), np.float32) is not used
    place = used.ctypes.data
    del used
    assert place in {arrays.take((N,), np.float32).ctypes.data for _ in range(2)}


def test_only_large_ones_of_shapes_that_come_again_are_kept() -> None:
    arrays = ReusedArrays({(N,), (3,)})
    for number in range(100):
        assert arrays.take((3, N + number), np.float64).shape == (3, N + number)
        assert arrays.take((3,), np.float64).shape == (3,)
    assert len(arrays) == 0
    arrays.take((N,), np.float32)
    assert len(arrays) == 1


def test_the_one_that_was_given_longest_ago_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, count, looks = ReusedArrays(), sys.getrefcount, []

    def counted(array: Any) -> int:
        looks.append(1)
        return count(array) - 2  # of this function's own

    shards: dict[int, Any] = {shard: arrays.take((N,), np.float32) for shard in range(50)}
    monkeypatch.setattr(sys, "getrefcount", counted)
    monkeypatch.setattr(reused, "_OF_A_FREE_ONE", reused._references_of_first(deque([np.empty(0)])))
    looks.clear()
    for shard in range(50):
        del shards[shard]  # its message is used, and the next one comes
        shards[shard] = arrays.take((N,), np.float32)
    assert len(looks) == 50
    assert len(arrays) == 50
