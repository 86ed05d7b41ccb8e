"""Optimisers and schedules that keep objects and code that belong together, as people write them.

What they keep shows in the parameters from the sixth step on only: after the steps of the trial.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

LATE = 5


class Count:
    """An object that counts."""

    shared: Any = None

    def __init__(self) -> None:
        self.n = 0
        self.calls: Any = None

    def up(self, by: int = 1) -> int:
        self.n += by
        return self.n

    def hooked(self, optimizer: Any, *_: Any) -> None:
        self.up()
        optimizer.rate = self.n

    def __call__(self, by: int = 1) -> int:
        return self.up(by)


REGISTRY: dict[str, Any] = {}
NUMBERS = itertools.count()


def up_by_attribute() -> int:
    up_by_attribute.n = getattr(up_by_attribute, "n", 0) + 1  # type: ignore[attr-defined]  # as people do
    return int(up_by_attribute.n)  # type: ignore[attr-defined]  # as above


def up_by_default(seen: list[int] = []) -> int:  # noqa: B006  # that is the kind
    seen.append(1)
    return len(seen)


def plainly(count: Count) -> int:
    return count.up()


def counted(function: Callable[[], int]) -> Callable[[], int]:
    calls = 0

    @functools.wraps(function)
    def wrapper() -> int:
        nonlocal calls
        calls += 1
        return calls

    return wrapper


@counted
def decorated() -> int:
    return 0


class Late(torch.optim.SGD):
    """SGD that shrinks the parameters by a number that it keeps, from the sixth step on."""

    def __init__(self, params: Any, lr: float = 0.05, **kept: Any) -> None:
        super().__init__(params, lr=lr)
        self.keep(**kept)

    def keep(self) -> None:
        raise NotImplementedError

    def number(self) -> float:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # takes no closure
        super().step()
        number = float(self.number())
        if number > LATE:
            for p in self.param_groups[0]["params"]:
                p.mul_(1 - 0.01 * (number % 7))


class ItsMethod(Late):
    def keep(self) -> None:
        self.ema = Count()
        self.update = self.ema.up

    def number(self) -> float:
        self.update()
        return self.ema.n


class OnlyItsMethod(Late):
    def keep(self) -> None:
        self.update = Count().up

    def number(self) -> float:
        return self.update()


class TwoMethods(Late):
    def keep(self) -> None:
        ema = Count()
        self.first, self.second = [ema.up], {"call": ema.__call__}

    def number(self) -> float:
        return self.first[0]() + self.second["call"]()


class MethodInside(Late):
    """An object that keeps a method of its own, and one of another."""

    def keep(self) -> None:
        self.ema, self.other = Count(), Count()
        self.ema.calls = (self.ema.up, self.other.up)

    def number(self) -> float:
        self.ema.calls[0]()
        self.ema.calls[1](2)
        return self.ema.n + self.other.n


class OwnMethod(Late):
    def keep(self) -> None:
        self.n = 0
        self.rule = self.more

    def more(self) -> int:
        self.n += 1
        return self.n

    def number(self) -> float:
        return self.rule()


class Partial(Late):
    def keep(self) -> None:
        self.ema = Count()
        self.update = partial(self.ema.up, 2)
        self.named = partial(plainly, count=self.ema)

    def number(self) -> float:
        self.update()
        return self.named()


class MethodOfAList(Late):
    def keep(self) -> None:
        self.seen: list[int] = []
        self.append = self.seen.append

    def number(self) -> float:
        self.append(1)
        return len(self.seen)


class Containers(Late):
    def keep(self) -> None:
        self.last: deque[int] = deque(maxlen=3)
        self.tables = {"last": self.last, "all": defaultdict(list, last=self.last)}

    def number(self) -> float:
        self.last.append(sum(self.tables["all"]["last"]) + 1)
        return sum(self.tables["last"])


class ListInAClosure(Late):
    def keep(self) -> None:
        self.n = n = [0]

        def update() -> int:
            n[0] += 1
            return n[0]

        self.update = update

    def number(self) -> float:
        self.update()
        return self.n[0]


class TwoClosures(Late):
    """Two functions share a variable that is a number."""

    def keep(self) -> None:
        n = 0

        def update() -> None:
            nonlocal n
            n += 1

        self.update, self.forms = update, {"number": lambda: n}

    def number(self) -> float:
        self.update()
        return self.forms["number"]()


class RecursiveClosure(Late):
    def keep(self) -> None:
        n = 0

        def update(times: int) -> int:
            nonlocal n
            n += 1
            return update(times - 1) if times else n

        self.update = update

    def number(self) -> float:
        return self.update(2)


class ClosesOverItself(Late):
    def keep(self) -> None:
        self.n = 0
        self.update = lambda: setattr(self, "n", self.n + 1)

    def number(self) -> float:
        self.update()
        return self.n


class ClosesOverAnObject(Late):
    def keep(self) -> None:
        ema = self.ema = Count()
        self.ema.calls = [lambda: ema.up()]

    def number(self) -> float:
        self.ema.calls[0]()
        return self.ema.n


class MadeInALoop(Late):
    """Functions of one code, and one of them is chosen as it goes."""

    def keep(self) -> None:
        self.n = 0
        self.rules = [lambda n, i=i: n * i for i in (1, 2, 3)]
        self.rule = self.rules[0]

    def number(self) -> float:
        self.n += 1
        self.rule = self.rules[self.n % 3]
        return self.rule(self.n)


class AnotherRule(Late):
    """One attribute changes its function as it goes."""

    def keep(self) -> None:
        self.n = 0
        self.rules = {"first": lambda n: n, "then": lambda n: 2 * n + 1}
        self.rule = self.rules["first"]

    def number(self) -> float:
        self.n += 1
        if self.n == 3:
            self.rule = self.rules["then"]
        return self.rule(self.n)


class DefaultOfALambda(Late):
    def keep(self) -> None:
        self.ema = Count()
        self.update = lambda ema=self.ema: ema.up()

    def number(self) -> float:
        self.update()
        return self.ema.n


class AttributeOfALambda(Late):
    def keep(self) -> None:
        self.update = lambda: self.update.__dict__
        self.update.__dict__["n"] = 0

    def number(self) -> float:
        self.update()["n"] += 1
        return self.update()["n"]


class Weakly(Late):
    def keep(self) -> None:
        self.ema = Count()
        self.seen = weakref.ref(self.ema)

    def number(self) -> float:
        self.seen().up()  # type: ignore[union-attr]  # it is held beside
        return self.ema.n


class ItsHook(Late):
    def keep(self) -> None:
        self.rate, self.ema = 0, Count()
        self.register_step_pre_hook(self.ema.hooked)

    def number(self) -> float:
        return self.rate + self.ema.n


class OwnStep(Late):
    def keep(self) -> None:
        self.ema = Count()
        plain = super().step

        def step(closure: Any = None) -> None:
            self.ema.up()
            plain()

        self.step = step  # type: ignore[method-assign]  # as people do

    def number(self) -> float:
        return self.ema.n


class Inner(Late):
    def keep(self) -> None:
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.01, momentum=0.9)
        self.go = self.inner.step
        self.n = 0

    def number(self) -> float:
        self.n += 1
        self.go()
        return self.n


class TensorAndView(Late):
    def keep(self) -> None:
        self.sums = torch.zeros(3)
        self.add, self.last = {"row": self.sums[1:]}, self.sums[2]

    def number(self) -> float:
        self.add["row"] += 1
        return float(self.last)


class NamedFunction(Late):
    def keep(self) -> None:
        self.ema, self.update = Count(), plainly

    def number(self) -> float:
        return self.update(self.ema)


class CountInAClosure(Late):
    def keep(self) -> None:
        numbers = itertools.count(1)
        self.next = lambda: next(numbers)

    def number(self) -> float:
        return self.next()


# What is outside


class SharedWithAGlobal(Late):
    def keep(self) -> None:
        self.ema = REGISTRY["ema"] = Count()

    def number(self) -> float:
        REGISTRY["ema"].up()
        return self.ema.n


class SharedWithAClass(Late):
    def keep(self) -> None:
        self.ema = Count.shared = Count()

    def number(self) -> float:
        Count.shared.up()
        return self.ema.n


class AGlobal(Late):
    def keep(self) -> None:
        pass

    def number(self) -> float:
        return next(NUMBERS)


class OnItsClass(Late):
    n = 0

    def keep(self) -> None:
        OnItsClass.n = 0

    def number(self) -> float:
        OnItsClass.n += 1
        return OnItsClass.n


class AttributeOfAFunction(Late):
    def keep(self) -> None:
        self.update = up_by_attribute

    def number(self) -> float:
        return self.update()


class DefaultOfAFunction(Late):
    def keep(self) -> None:
        self.update = up_by_default

    def number(self) -> float:
        return self.update()


class Decorated(Late):
    def keep(self) -> None:
        self.update = decorated

    def number(self) -> float:
        return self.update()


class ItsArgument(Late):
    def keep(self, seen: list[int]) -> None:  # type: ignore[override]  # more than the others
        self.seen = seen

    def number(self) -> float:
        self.seen[0] += 1
        return self.seen[0]


class AttributeOfAParameter(Late):
    def keep(self) -> None:
        self.first = self.param_groups[0]["params"][0]
        self.notes = getattr(self.first, "notes", [0])

    def number(self) -> float:
        self.notes[0] += 1
        return self.notes[0]


# What no process could make again


class MadeInStep(Late):
    def keep(self) -> None:
        self.n = 0
        self.rule: Any = None

    def number(self) -> float:
        self.n += 1
        if self.n == LATE:
            self.rule = lambda: 3
        return self.n + (self.rule() if self.rule else 0)


class WeaklyOutside(Late):
    def keep(self) -> None:
        REGISTRY["outside"] = Count()
        self.seen = weakref.ref(REGISTRY["outside"])

    def number(self) -> float:
        return self.seen().n  # type: ignore[union-attr]  # it is held by the global


class Generated(Late):
    def keep(self) -> None:
        self.numbers = (number for number in range(1000))

    def number(self) -> float:
        return next(self.numbers)


class AProxy(Late):
    def keep(self) -> None:
        self.ema = Count()
        self.seen = weakref.proxy(self.ema)

    def number(self) -> float:
        return self.seen.up()


# Schedules


class Counting(LambdaLR):
    """It counts in a closure."""

    def __init__(self, optimizer: Any) -> None:
        n = [0]

        def factor(_: int) -> float:
            n[0] += 1
            return 1.0 if n[0] <= LATE else 1 / n[0]

        super().__init__(optimizer, factor)


class CountingByName(LambdaLR):
    """Two functions count one number."""

    def __init__(self, optimizer: Any) -> None:
        n = 0

        def up() -> None:
            nonlocal n
            n += 1

        def factor(_: int) -> float:
            up()
            return 1.0 if n <= LATE else 1 / n

        self.up = up
        super().__init__(optimizer, factor)


class CallsAnObject(LambdaLR):
    def __init__(self, optimizer: Any) -> None:
        self.count = Count()
        super().__init__(optimizer, self.factor)

    def factor(self, _: int) -> float:
        return 1 / (1 + max(0, self.count() - LATE))


class WithItsOptimiser(LRScheduler):
    """It shares an object with its optimiser, an `ItsMethod`."""

    def __init__(self, optimizer: Any) -> None:
        self.ema, self.update = optimizer.ema, optimizer.ema.up
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]  # torch allows tensors, too
        self.update()
        return [base / (1 + max(0, self.ema.n - LATE)) for base in self.base_lrs]


class ClosesOverItsOptimiser(LambdaLR):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda _: 1 / (1 + max(0, optimizer.ema.n - LATE)))


RIGHT: dict[str, dict[str, Any]] = {
    "an object and its bound method": {"optimizer": ItsMethod},
    "a bound method alone": {"optimizer": OnlyItsMethod},
    "two methods of one object, in containers": {"optimizer": TwoMethods},
    "methods that objects keep": {"optimizer": MethodInside},
    "its own bound method": {"optimizer": OwnMethod},
    "functools.partial": {"optimizer": Partial},
    "a list and its append": {"optimizer": MethodOfAList},
    "containers that share one": {"optimizer": Containers},
    "a closure over a list": {"optimizer": ListInAClosure},
    "two closures over one number": {"optimizer": TwoClosures},
    "a closure that calls itself": {"optimizer": RecursiveClosure},
    "a closure over the optimiser": {"optimizer": ClosesOverItself},
    "a lambda within an object": {"optimizer": ClosesOverAnObject},
    "a closure over itertools.count": {"optimizer": CountInAClosure},
    "lambdas made in a loop": {"optimizer": MadeInALoop},
    "another lambda as it goes": {"optimizer": AnotherRule},
    "a default of a lambda": {"optimizer": DefaultOfALambda},
    "an attribute of a lambda": {"optimizer": AttributeOfALambda},
    "a weak reference to what it keeps": {"optimizer": Weakly},
    "a bound method as a hook": {"optimizer": ItsHook},
    "step as an attribute": {"optimizer": OwnStep},
    "an optimiser within, and its step": {"optimizer": Inner},
    "a tensor and views of it": {"optimizer": TensorAndView},
    "a function of its file": {"optimizer": NamedFunction},
    "LambdaLR that counts in a closure": {"schedule": Counting},
    "LambdaLR, two closures": {"schedule": CountingByName},
    "LambdaLR by an object": {"schedule": CallsAnObject},
    "a schedule that shares an object with its optimiser": {
        "optimizer": ItsMethod,
        "schedule": WithItsOptimiser,
    },
    "a schedule that closes over its optimiser": {
        "optimizer": ItsMethod,
        "schedule": ClosesOverItsOptimiser,
    },
}
"""What is carried as one."""

OUTSIDE: dict[str, tuple[type[Late], str]] = {
    "an object that a global has, too": (SharedWithAGlobal, "the global variable REGISTRY changes"),
    "an object that a class has, too": (SharedWithAClass, "the class Count changes"),
    "a global": (AGlobal, "the global variable NUMBERS changes"),
    "an attribute of its class": (OnItsClass, "the class OnItsClass changes"),
    "an attribute of a function of its file": (AttributeOfAFunction, "the function up_by_attribute changes"),
    "a default of a function of its file": (DefaultOfAFunction, "default of seen in up_by_default changes"),
    "a decorated function of its file": (Decorated, "the function decorated closes over changes"),
    "an argument that it changes": (ItsArgument, r"optimizer.seen changes"),
    "an attribute of a parameter": (AttributeOfAParameter, "the attribute 'notes' of parameter 0 changes"),
}
"""What is refused at the step that changes it."""

NOT_CARRIED: dict[str, tuple[type[Late], str]] = {
    "a function that a step made": (MadeInStep, "rule .* was not there when the optimiser"),
    "a weak reference to what a global has": (WeaklyOutside, "seen .* refers weakly to a Count"),
    "a generator": (Generated, "numbers .*generator"),
    "a weak proxy": (AProxy, "seen .* is a weak proxy"),
}
"""What is refused when it would be carried."""
