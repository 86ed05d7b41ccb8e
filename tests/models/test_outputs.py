"""What a module gives: a tensor, several in a tuple or by names; and what is none of these."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from sparksgd.errors import ModelError
from sparksgd.models.outputs import Output, arrays_of, outputs_of, shapes_of, tensors_of

Guess = namedtuple("Guess", ["mean", "spread"])  # as users write them

ONE, TWO = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, math.nan]])


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (TWO, [""]),
        ((ONE, TWO), ["output_0", "output_1"]),
        ([ONE], ["output_0"]),
        (Guess(ONE, TWO), ["mean", "spread"]),
        ({"b": ONE, "a": TWO}, ["b", "a"]),
        (OrderedDict(a=ONE), ["a"]),
        (torch.max(TWO, 1), ["output_0", "output_1"]),
    ],
)
def test_each_tensor_has_a_name(given: Any, names: list[str]) -> None:
    assert list(tensors_of(given)) == names
    assert all(shape[0] == 2 for shape in shapes_of(given).values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "the module gives a NoneType, but must give a tensor, a tuple of tensors, or a dictionary"),
        (3.0, "the module gives a float, but"),
        ((), "the module gives an empty tuple, but"),
        ({}, "the module gives an empty dict, but"),
        ((ONE, None), "gives a tuple with a NoneType as output_1, but must .*: leave output_1 out"),
        ({"a": (ONE,)}, "gives a dict with a tuple as a, but"),
        ({0: ONE}, "gives a dictionary with the key 0, but must give texts"),
        ({"": ONE}, "gives a dictionary with the key '', but"),
    ],
)
def test_what_holds_no_tensors_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        tensors_of(given)


FORMS: list[tuple[torch.Tensor, int | None, str, list[Any]]] = [
    (torch.tensor([1.5, math.nan]), None, "float32", [1.5, math.nan]),
    (torch.tensor([[1.5], [2.5]]), None, "float32", [1.5, 2.5]),
    (torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), 2, "float32", [[1.0, 2.0], [3.0, 4.0]]),
    (torch.zeros(2, 1, 1), 1, "float32", [[0.0], [0.0]]),
    (torch.zeros(2, 0), 0, "float32", [[], []]),
    (torch.tensor([[2**53 - 1, 2], [3, 4]]), 2, "float64", [[2**53 - 1, 2], [3, 4]]),
    (torch.tensor([True, False]), None, "float64", [1.0, 0.0]),
    (torch.tensor([1.5, 2.5], dtype=torch.bfloat16), None, "float32", [1.5, 2.5]),
    (torch.tensor([0.1, 0.2], dtype=torch.float64), None, "float64", [0.1, 0.2]),
    (torch.tensor([1 + 2j, 3 - 4j]).conj(), 2, "float32", [[1.0, -2.0], [3.0, 4.0]]),
    (torch.tensor([[0.0, 5.0], [6.0, 0.0]]).to_sparse(), 2, "float32", [[0.0, 5.0], [6.0, 0.0]]),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_numbers_of_a_row_are_those_of_the_tensor_in_its_order(number: int) -> None:
    tensor, length, dtype, expected = FORMS[number]
    outputs = outputs_of({"a": tensor})
    assert outputs == (Output(name="a", length=length, dtype=dtype),)
    (found,) = arrays_of(outputs, {"a": tensor}, 2)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.array(expected, dtype))
    one = arrays_of(outputs, {"a": tensor.to_dense()[:1]}, 1)[0]
    np.testing.assert_array_equal(one, found[:1])


def test_the_module_may_write_its_own_memory_again() -> None:
    memory = torch.ones(2)
    (found,) = arrays_of(outputs_of(memory), memory, 2)
    memory.zero_()
    assert found.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"a": TWO, "b": ONE, "c": ONE},
            "the module gives a, b, c for 2 rows, but gave a, b in the training",
        ),
        (TWO, "the module gives one tensor for 2 rows, but gave a, b in the training"),
        ({"a": TWO[:1], "b": ONE}, r"the module gives \(1, 2\) as a for 2 rows, but must give 2 numbers"),
        ({"a": TWO, "b": TWO}, r"the module gives \(2, 2\) as b for 2 rows, but must give 1 numbers"),
        ({"a": TWO, "b": torch.tensor(1.0)}, r"the module gives \(\) as b for 2 rows"),
    ],
)
def test_other_outputs_than_in_the_training_are_refused(given: Any, says: str) -> None:
    outputs = outputs_of({"a": TWO, "b": ONE})
    with pytest.raises(ModelError, match=says):
        arrays_of(outputs, given, 2)
