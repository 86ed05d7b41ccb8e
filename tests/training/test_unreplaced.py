"""What no solver's state replaces in a module: its digests, and what checkpoints hold of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.errors import DataError
from sparksgd.training.encoding import of_plain
from sparksgd.training.unreplaced import check_constants, take_up, unreplaced_of


class Held(nn.Module):
    """A parameter, and what a test gives it."""

    def __init__(self, **held: object) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.ones(2))
        vars(self).update(held)


def graph(value: float) -> torch.Tensor:
    """Return a sparse tensor whose dense form no machine holds."""
    return torch.sparse_coo_tensor([[1, 5], [2, 7]], [1.0, value], (3_000_000, 3_000_000))


def test_a_large_sparse_attribute_is_compared_without_its_dense_form() -> None:
    one, same, other = (unreplaced_of(FlatModule(Held(graph=graph(value)))) for value in (2.0, 2.0, 3.0))
    assert one.attributes == same.attributes != other.attributes


@pytest.mark.parametrize(
    "value",
    [
        np.matrix([[1.0]]),
        np.ma.masked_array([1.0, 2.0]),
        graph(1.0),
        np.broadcast_to(np.ones(1), (4,)),
    ],
    ids=["matrix", "masked", "sparse", "read-only"],
)
def test_what_no_module_could_take_up_is_told_at_the_start(
    value: object, caplog: pytest.LogCaptureFixture
) -> None:
    found = unreplaced_of(FlatModule(Held(drawn=value)), frozenset({"drawn"}))
    assert not found.constants
    assert "the module draws drawn anew whenever it is built, which checkpoints cannot hold" in caplog.text


def test_what_forward_writes_is_not_compared_unless_it_is_drawn() -> None:
    def of(value: float, *drawn: str) -> object:
        module = Held(cache={"last": torch.tensor(value), "table": torch.tensor(value)})
        return unreplaced_of(FlatModule(module), frozenset(drawn), frozenset({"cache"})).attributes

    assert of(1.0) == of(2.0)
    assert of(1.0, "cache['table']") != of(2.0, "cache['table']")


def test_a_module_takes_up_what_a_checkpoint_holds(caplog: pytest.LogCaptureFixture) -> None:
    drawn = frozenset({"table", "row"})
    then = unreplaced_of(FlatModule(Held(table=torch.full((3,), 2.0), row=np.full(2, 5))), drawn)
    values = of_plain(then.constants)
    check_constants(values)
    now = FlatModule(Held(table=torch.zeros(3), row=np.zeros(2, int)))
    take_up(now, values["tensors"])
    assert now.module.table.tolist() == [2, 2, 2]
    assert now.module.row.tolist() == [5, 5]
    assert unreplaced_of(now, drawn).attributes == then.attributes


@pytest.mark.parametrize(
    "values", [{}, {"tensors": {"a": 1}}, {"tensors": {1: torch.ones(1)}}, {"tensors": []}]
)
def test_strange_constants_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(DataError, match="constants"):
        check_constants(values)
