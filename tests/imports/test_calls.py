"""Arguments are compared with what a call takes; where that is not known, nothing is refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from sparksgd.imports import wrong_call

NARROW = inspect.signature(lambda self, width: None)


class OfInit:
    def __init__(self, *args: Any, **more: Any) -> None: ...


class OfNew:
    def __new__(cls, *args: Any, **more: Any) -> OfNew:
        return super().__new__(cls)


class OfCall:
    def __call__(self, *args: Any, **more: Any) -> None: ...


def anything(*args: Any, **more: Any) -> None: ...


for said in (OfInit.__init__, OfNew.__new__, OfCall.__call__, anything):
    said.__signature__ = NARROW  # type: ignore[attr-defined]


class Strict:
    """Refuses attributes that it does not know, with an error of its own."""

    def __call__(self, width: int) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


@pytest.mark.parametrize(
    "function",
    [OfInit, OfNew, OfCall(), anything, functools.partial(anything, 1), functools.partial(OfInit)],
)
def test_what_a_call_takes_is_not_known(function: Callable[..., Any]) -> None:
    assert wrong_call(function, {"depth": 3}) is None


def test_an_object_that_refuses_the_question_is_not_refused() -> None:
    assert wrong_call(Strict(), {"depth": 3}) is None


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


class Plain:
    def __call__(self, width: int) -> None: ...

    def method(self, width: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "right"),
    [
        (Net, {"width": 3}),
        (nn.Linear, {"in_features": 2, "out_features": 3}),
        (nn.ReLU, {"inplace": True}),
        (functools.partial(Net), {"width": 3}),
        (functools.partial(nn.Linear, 2), {"out_features": 3}),
        (lambda width: width, {"width": 3}),
        (Plain(), {"width": 3}),
        (Plain().method, {"width": 3}),
        (Plain, {}),
    ],
)
def test_wrong_names_are_told_of_ordinary_callables(function: Callable[..., Any], right: Any) -> None:
    assert wrong_call(function, right) is None
    assert isinstance(wrong_call(function, {**right, "depth": 3}), TypeError)
