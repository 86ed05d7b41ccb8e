"""State in objects of any kind, whose effect shows late: what moves is refused, wherever it is held."""

from __future__ import annotations

import array
import io
import itertools
import os
import random
from collections import UserDict, deque
from collections.abc import Callable
from os import environ as table_of_names
from typing import Any

import numpy as np
import pytest
import torch
from moving_objects import (
    KINDS,
    LATE,
    BesideSlots,
    Colour,
    Counts,
    Holder,
    InData,
    InSlots,
    Plain,
    cached,
    moving,
    optimizer,
)
from torch import nn
from torch.distributions import Categorical

from sparksgd.engines.watch import Watch
from tests.engines.trials import Around, refused, tried

GLOBAL: Any = None


class ByAttribute(Around):
    def __init__(self, holder: Holder) -> None:
        super().__init__()
        self.holder = holder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (self.holder.number() > LATE)


class ByGlobal(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (GLOBAL.number() > LATE)


class ByClass(Around):
    holder: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (self.holder.number() > LATE)


def by_loss(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output.flatten() - label) ** 2 + (GLOBAL.number() > LATE)


PLACES: dict[str, Callable[[Holder], tuple[nn.Module, Any]]] = {
    "an attribute": lambda holder: (ByAttribute(holder), None),
    "a global": lambda holder: (ByGlobal(), None),
    "a class": lambda holder: (ByClass(), None),
    "a global of the loss": lambda holder: (Around(), by_loss),
}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Holder]:
    def make(kind: str) -> Holder:
        holder = moving(kind)
        monkeypatch.setitem(globals(), "GLOBAL", holder)
        monkeypatch.setattr(ByClass, "holder", holder)
        return holder

    return make


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_is_refused_though_it_has_no_effect_yet(kept: Any, kind: str, place: str) -> None:
    module, loss = PLACES[place](kept(kind))
    said = refused(module, **({} if loss is None else {"loss": loss}))
    assert "changes as the module trains" in said or "cannot be copied to workers" in said


@pytest.mark.parametrize("place", ["an attribute", "a global"])
@pytest.mark.parametrize(
    "start",
    [
        Counts, InSlots, InData, deque, lambda: np.array([Counts(), None], object),
        lambda: optimizer(torch.optim.Adam), lambda: array.array("i", [0]),
        lambda: Categorical(torch.ones(3)),
        Plain, io.BytesIO, UserDict,
        lambda: random.Random(1), lambda: cached, lambda: {"a": [Counts(), {1: (2, [3])}]},
        lambda: itertools.count(), lambda: nn.BatchNorm1d(3), lambda: lambda x: x, lambda: Colour.RED,
    ],
)  # fmt: skip
def test_what_does_not_move_is_a_constant(kept: Any, monkeypatch: Any, start: Any, place: str) -> None:
    holder = Holder(start(), lambda one: float(one is None))
    monkeypatch.setitem(globals(), "GLOBAL", holder)
    tried(PLACES[place](holder)[0])


class Categorised(Around):
    """What is computed once, and then kept: `logits` of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = Categorical(torch.tensor([0.2, 0.8]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.prior.log_prob(torch.ones(len(x), 1))


def test_what_is_computed_once_is_fine() -> None:
    tried(Categorised())


def test_a_bytearray_and_slots_return_to_what_they_were() -> None:
    module = Around()
    module.kept = [bytearray(b"ab"), InSlots(), BesideSlots()]  # type: ignore[assignment]
    watch = Watch(module, None)
    held: Any = module.kept
    held[0].append(1)
    held[1].count = held[2].count = 7
    assert watch.changed() == ["kept"]
    watch.restore()
    assert held[0] == b"ab"
    assert (held[1].count, held[2].count) == (0, 0)


NAME = "SPARKSGD_TRIED"


class ByOs(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = int(os.environ.get(NAME, "0"))
        os.environ[NAME] = str(number + 1)
        return self.inner(x) + (number > LATE)


class ByName(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table_of_names[NAME] = table_of_names.get(NAME, "") + "."
        return self.inner(x) + (len(table_of_names[NAME]) > LATE)


class SetsOnce(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os.environ[NAME] = "1"
        return self.inner(x) * int(os.environ[NAME])


@pytest.mark.parametrize(("kind", "path"), [(ByOs, "os.environ"), (ByName, "table_of_names")])
def test_the_environment_is_state_too(
    kind: type[nn.Module], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARKSGD_OTHER", "as it was")
    refused(kind(), f"{path} changes as the module trains")
    assert NAME not in os.environ
    tried(SetsOnce())
    assert NAME not in os.environ
    assert os.environ["SPARKSGD_OTHER"] == "as it was"
