"""Arrays are used again when nobody has them, and never before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sparksgd.arithmetic.reused import ReusedArrays


def test_an_array_that_nobody_has_is_given_again() -> None:
    arrays = ReusedArrays()
    one = arrays.take((3,), np.float32)
    one[...] = 7
    other = arrays.take((3,), np.float32)
    assert other is not one
    place = one.ctypes.data
    del one
    again = arrays.copy_of(np.arange(3, dtype=np.float32))
    assert again.ctypes.data == place
    assert again.tolist() == [0, 1, 2]
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
    user = kept(arrays.take((4,), np.float32))
    assert arrays.take((4,), np.float32) is not None
    assert len(arrays) == 2
    del user
    arrays.take((4,), np.float32)
    assert len(arrays) == 2


def test_one_of_another_shape_or_type_is_another_one() -> None:
    arrays = ReusedArrays()
    for shape, kind in (((3,), np.float32), ((4,), np.float32), ((3,), np.float64), ((3, 1), np.float32)):
        assert arrays.take(shape, kind).shape == shape
    assert len(arrays) == 4
