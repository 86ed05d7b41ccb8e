"""State in objects of any kind, whose effect shows late: what moves is refused, wherever it is held."""

from __future__ import annotations

import array
import contextvars
import enum
import io
import itertools
import os
import queue
import random
import threading
import types
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from os import environ as table_of_names
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal
from torch.optim.lr_scheduler import LRScheduler
from two_workers import train_here

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.engines.trial.outside import watch_steps
from sparksgd.engines.watch import Watch
from sparksgd.errors import ModelError
from sparksgd.solvers.torch_optimizers import another_optimizer
from tests.engines.trials import refused, tried

LATE = 10_000


class Counts:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


class InSlots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class BesideSlots(InSlots):
    """It has a dictionary, too."""


@dataclass
class InData:
    count: int = 0


class ByProperty:
    def __init__(self) -> None:
        self._counts = [0]

    @property
    def count(self) -> int:
        return self._counts[0]

    @count.setter
    def count(self, count: int) -> None:
        self._counts[0] = count


class Colour(enum.Enum):
    RED = 1


class OfMeta(type):
    kept: ClassVar = [0]

    @property
    def count(cls) -> int:
        return cls.kept[0]

    @count.setter
    def count(cls, count: int) -> None:
        cls.kept[0] = count


class Meta(metaclass=OfMeta):
    @property
    def count(self) -> int:
        return Meta.count

    @count.setter
    def count(self, count: int) -> None:
        Meta.count = count


class Describes:
    def __init__(self) -> None:
        self.count = 0

    def __get__(self, owner: object, kind: type | None = None) -> int:
        self.count += 1
        return self.count


class Described:
    next = Describes()


class Inner:
    class Deep:
        count = 0


class Key:
    pass


KEY = Key()


def gains(one: Any) -> int:
    one.count = getattr(one, "count", 0) + 1
    return int(one.count)


def gains_first(one: Any) -> int:
    one[0] += 1
    return int(one[0])


def gains_item(one: Any) -> int:
    one["a"] = one.get("a", 0) + 1
    return int(one["a"])


def gains_key(one: Any) -> int:
    one[KEY] = one.get(KEY, 0) + 1
    return int(one[KEY])


def turns(one: Any) -> int:
    one.move_to_end(next(iter(one)))
    return 0


def sets_next(one: Any) -> int:
    one.set(one.get(0) + 1)
    return int(one.get())


def steps(one: Any) -> float:
    (parameter,) = one.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    one.step()
    return float(-parameter)


def deepens(one: Any) -> int:
    one.Deep.count += 1
    return int(one.Deep.count)


def generated() -> Any:
    yield from range(LATE)


def closed() -> Callable[[], int]:
    count = 0

    def up() -> int:
        nonlocal count
        count += 1
        return count

    return up


@lru_cache
def cached(width: int) -> list[int]:
    return [0] * width


def gains_cached(one: Any) -> int:
    cached(2)[0] += 1
    return cached(2)[0]


def optimizer(kind: Any) -> Any:
    return kind([nn.Parameter(torch.zeros(1))], lr=1.0)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.zeros(()))


def adds(one: Any) -> float:
    one.number += 1
    return float(one.number)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "an object": (Counts, gains),
    "a callable": (Counts, lambda one: one()),
    "slots": (InSlots, gains),
    "slots and a dictionary": (BesideSlots, gains),
    "a dataclass": (InData, gains),
    "a property": (ByProperty, gains),
    "a member of an enum": (lambda: Colour.RED, gains),
    "a metaclass": (Meta, gains),
    "a descriptor": (Described, lambda one: one.next),
    "an inner class": (Inner, deepens),
    "a deque": (deque, lambda one: one.append(1) or len(one)),
    "a deque that turns": (lambda: deque([1, 2, 3]), lambda one: one.rotate(1) or one[0]),
    "itertools.count": (itertools.count, next),
    "itertools.cycle": (lambda: itertools.cycle([1, 2, 3]), next),
    "a generator": (generated, next),
    "an iterator": (lambda: iter(list(range(LATE))), next),
    "a long iterator": (lambda: iter(list(range(20 * LATE))), next),
    "zip": (lambda: zip(range(LATE), range(LATE), strict=True), lambda one: next(one)[0]),
    "map": (lambda: map(abs, range(LATE)), next),
    "chain": (lambda: itertools.chain(range(LATE)), next),
    "an array": (lambda: array.array("i", [0]), gains_first),
    "a defaultdict": (lambda: defaultdict(int), gains_item),
    "a Counter": (Counter, gains_item),
    "an order": (lambda: OrderedDict(a=1, b=2), turns),
    "a UserDict": (UserDict, gains_item),
    "a ChainMap": (ChainMap, gains_item),
    "a context variable": (lambda: contextvars.ContextVar("kept"), sets_next),
    "thread-local": (threading.local, gains),
    "weak keys": (weakref.WeakKeyDictionary, gains_key),
    "a queue": (queue.Queue, lambda one: one.put(1) or one.qsize()),
    "a simple queue": (queue.SimpleQueue, lambda one: one.put(1) or one.qsize()),
    "a bytearray": (lambda: bytearray(1), lambda one: one.append(1) or len(one)),
    "a memoryview": (lambda: memoryview(bytearray(1)), gains_first),
    "random.Random": (lambda: random.Random(1), lambda one: one.random()),
    "a distribution": (lambda: Normal(torch.zeros(1), torch.ones(1)), lambda one: float(one.loc.add_(1))),
    "a distribution's attribute": (lambda: Normal(0.0, 1.0), gains),
    "SGD": (lambda: optimizer(torch.optim.SGD), steps),
    "Adam": (lambda: optimizer(torch.optim.Adam), steps),
    "a cache of a function": (int, gains_cached),
    "a namespace": (types.SimpleNamespace, gains),
    "an object in a tuple": (lambda: (Counts(),), lambda one: one[0]()),
    "an object in an array": (lambda: np.array([Counts(), None], object), lambda one: one[0]()),
    "an array in an object": (lambda: types.SimpleNamespace(a=np.zeros(1)), lambda one: gains_first(one.a)),
    "a partial": (lambda: partial(Counts()), lambda one: one()),
    "a bound method": (lambda: Counts().__call__, lambda one: one()),
    "a closure": (closed, lambda one: one()),
    "a file in memory": (io.BytesIO, lambda one: one.write(b"a") and one.tell()),
    "a module's attribute": (Plain, gains),
    "a module's buffer": (Plain, adds),
}  # fmt: skip


class Holder:
    """What moves, and how."""

    def __init__(self, kept: Any, move: Callable[[Any], Any]) -> None:
        self.kept, self.move = kept, move

    def number(self) -> float:
        """Return a number that is LATE after many calls."""
        return float(self.move(self.kept))


GLOBAL: Any = None


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class ByAttribute(Linear):
    def __init__(self, holder: Holder) -> None:
        super().__init__()
        self.holder = holder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (self.holder.number() > LATE)


class ByGlobal(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (GLOBAL.number() > LATE)


class ByClass(Linear):
    holder: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (self.holder.number() > LATE)


def by_loss(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output.flatten() - label) ** 2 + (GLOBAL.number() > LATE)


PLACES: dict[str, Callable[[Holder], tuple[nn.Module, Any]]] = {
    "an attribute": lambda holder: (ByAttribute(holder), None),
    "a global": lambda holder: (ByGlobal(), None),
    "a class": lambda holder: (ByClass(), None),
    "a global of the loss": lambda holder: (Linear(), by_loss),
}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Holder]:
    def make(kind: str) -> Holder:
        start, move = KINDS[kind]
        holder = Holder(start(), move)
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


class Categorised(Linear):
    """What is computed once, and then kept: `logits` of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = Categorical(torch.tensor([0.2, 0.8]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.prior.log_prob(torch.ones(len(x), 1))


def test_what_is_computed_once_is_fine() -> None:
    tried(Categorised())


def test_a_bytearray_and_slots_return_to_what_they_were() -> None:
    module = Linear()
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


class ByOs(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = int(os.environ.get(NAME, "0"))
        os.environ[NAME] = str(number + 1)
        return self.inner(x) + (number > LATE)


class ByName(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table_of_names[NAME] = table_of_names.get(NAME, "") + "."
        return self.inner(x) + (len(table_of_names[NAME]) > LATE)


class SetsOnce(Linear):
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


# Optimisers and schedules: their attributes are carried, what is outside is not


class Moves(torch.optim.SGD):
    kind = ""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        if GLOBAL.number() > LATE:
            self.param_groups[0]["lr"] = 0.0


class Moved(LRScheduler):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [base * (1 + (GLOBAL.number() > LATE)) for base in self.base_lrs]


class CountsOnItsClass(torch.optim.SGD):
    count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        CountsOnItsClass.count += 1


def named(kind: type) -> OptimizerConfig:
    return OptimizerConfig(name=f"{__name__}:{kind.__name__}", arguments={"lr": 0.1})


@pytest.mark.parametrize("kind", ["an object", "itertools.count", "a bytearray", "a cache of a function"])
def test_what_an_optimiser_or_a_schedule_moves_outside_is_refused(kept: Any, kind: str) -> None:
    kept(kind)
    refused(Linear(), "changes as the optimiser or the schedule makes a step", optimizer=named(Moves))
    kept(kind)
    schedule = ScheduleConfig(name=f"{__name__}:Moved")
    refused(Linear(), "changes as the optimiser or the schedule makes a step", schedule=schedule)


def test_so_is_what_its_class_holds() -> None:
    refused(
        Linear(), "CountsOnItsClass", "keep it in an attribute of self", optimizer=named(CountsOnItsClass)
    )


class MovesLate(torch.optim.SGD):
    """It keeps its own count, and moves what is outside from the tenth step on."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps > 10:
            GLOBAL.number()


class MovedLate(LRScheduler):
    def get_lr(self) -> list[float]:  # type: ignore[override]
        if self.last_epoch > 10:
            GLOBAL.number()
        return list(self.base_lrs)


def test_so_is_what_they_move_after_some_steps_only(kept: Any) -> None:
    words = "GLOBAL changes as the optimiser or the schedule makes a step"
    kept("an object")
    refused(Linear(), words, optimizer=named(MovesLate))
    kept("an object")
    refused(Linear(), words, schedule=ScheduleConfig(name=f"{__name__}:MovedLate"))


class MovesVeryLate(torch.optim.SGD):
    """The trial does not see it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps == 70:
            GLOBAL.number()


def test_what_one_moves_after_the_trial_is_refused_at_that_step(kept: Any, tmp_path: Path) -> None:
    kept("an object")
    optimizer = {"name": f"{__name__}:MovesVeryLate", "lr": 0.01}
    with pytest.raises(ModelError, match="GLOBAL changes as the optimiser or the schedule makes a step"):
        train_here(tmp_path, module=nn.Linear(4, 1), optimizer=optimizer, train={"epochs": 20})


def test_what_others_move_between_its_steps_is_their_business(kept: Any) -> None:
    kept("an object")
    optimizer = another_optimizer(FlatModule(nn.Linear(4, 1)), named(MovesVeryLate))
    watch_steps([optimizer])
    for step in range(69):
        GLOBAL.number()
        optimizer.step(optimizer.new_gradient().fill_(1), None, step)
    with pytest.raises(ModelError, match="GLOBAL changes as the optimiser or the schedule makes a step"):
        optimizer.step(optimizer.new_gradient().fill_(1), None, 69)


class ByModule(LRScheduler):
    def get_lr(self) -> list[float]:  # type: ignore[override]
        if self.last_epoch < LATE:
            return list(self.base_lrs)
        return [base / float(GLOBAL.inner.weight.norm()) for base in self.base_lrs]


def test_a_schedule_that_refers_to_the_caller_s_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Linear()
    monkeypatch.setitem(globals(), "GLOBAL", module)
    refused(module, "reach parameters by param_groups", schedule=ScheduleConfig(name=f"{__name__}:ByModule"))
