"""Objects of any kind that move at each call, and count so; what they do to a module shows late."""

from __future__ import annotations

import array
import contextvars
import enum
import io
import itertools
import queue
import random
import threading
import types
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.distributions import Normal

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


class Bag(enum.Enum):
    LIST = [1]  # noqa: RUF012  # that its value can change is the point
    TABLE = {"n": 1}  # noqa: RUF012


class Access(enum.Flag):
    READ = 1
    WRITE = 2


Access.seen = 0


def counts_in_its_value(one: enum.Enum) -> int:
    one.value["n"] += 1
    return int(one.value["n"])


def gains_in_its_class(one: enum.Enum) -> int:
    kind: Any = type(one)
    kind.seen += 1
    return int(kind.seen)


class Suit(enum.Enum):
    CLUBS = 1


def adds_to_its_class(one: enum.Enum) -> int:
    kind: Any = type(one)
    kind.times = getattr(kind, "times", 0) + 1
    return int(kind.times)


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
    "the list of a member": (lambda: Bag.LIST, lambda one: one.value.append(1) or len(one.value)),
    "the table of a member": (lambda: Bag.TABLE, counts_in_its_value),
    "a combination of flags": (lambda: Access.READ | Access.WRITE, gains),
    "the class of a member": (lambda: Access.READ, gains_in_its_class),
    "a new attribute of the class of a member": (lambda: Suit.CLUBS, adds_to_its_class),
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


def moving(kind: str) -> Holder:
    """Return a new object of a kind."""
    start, move = KINDS[kind]
    return Holder(start(), move)
