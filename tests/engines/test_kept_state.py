"""What a module keeps from piece to piece, and is no parameter and no buffer, is refused by its name."""

from __future__ import annotations

import itertools
import random
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keeping_nets import longest, net, sets
from torch import nn
from two_workers import train_here

from sparksgd.errors import ModelError

# In the module


def reads_its_count(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.t += 1
    return y if core.t < 10_000 else 2 * y


def appends(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen.append(float(x.sum()))
    return y


def adds(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen.add(float(x.sum()))
    return y


def notes(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen["rows"] = core.seen.get("rows", 0) + len(x)
    return y


def notes_deeply(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen["of"][0].total += len(x)
    return y


def sums(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.total += x.detach().sum() if isinstance(core.total, torch.Tensor) else x.sum().item()
    return y


def is_highest(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.peak = torch.maximum(core.peak, x.detach().abs().max())
    return y / (1 + core.peak)


def draws(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + torch.rand(y.shape, generator=core.noise)


def draws_by_numpy(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + float(core.noise.normal())


def draws_by_python(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + core.noise.random()


def takes_next(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + next(core.numbers) / 100


def keeps_first(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if core.norm is None:
        core.norm = core.linear.weight.detach().norm()
    return y / core.norm


def averages(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.mean = 0.9 * core.mean + 0.1 * float(x.mean())
    return y - core.mean


def makes_a_head(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not hasattr(core, "head"):
        core.head = nn.Linear(1, 1)
    return core.head(y)


def hooks_itself(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.linear.register_forward_hook(lambda module, given, made: made)
    return y


class Total:
    """Counts."""

    def __init__(self) -> None:
        self.total = 0


class Words(list[str]):
    """A list with attributes."""

    size = 0


def replaces(item: Any) -> Callable[..., Any]:
    def use(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        core.seen[0] = (*item, core.seen[0])
        return y

    return use


def moves_to_end(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    first = next(iter(core.seen))
    core.seen[first] = core.seen.pop(first)
    return y


def names_itself(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen.size += 1
    return y


def sums_in_part(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.total.unbind()[0].add_(1)
    return y


class Slotted:
    """Counts, without a dictionary."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


def counts_by_length(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen[longest(x)] = core.seen.get(longest(x), 0) + 1
    return y


def sums_by_length(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen[longest(x)] = core.seen.get(longest(x), 0) + x.sum()
    return y + 0 * core.seen[longest(x)]


def remembers_rows(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Adds what was noted of an earlier row with the same third number."""
    noted = [core.seen.setdefault(float(row[2]), row.sum()) for row in x]
    return y + torch.stack(noted)[:, None]


def remembers_outputs(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    noted = [core.seen.setdefault(tuple(row.tolist()), out.detach()) for row, out in zip(x, y, strict=True)]
    return y + torch.stack(noted)


def joins_rows(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen = torch.cat([core.seen, x])
    return y


def joins_rows_in_front(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen = torch.cat([x, core.seen])
    return y


def ends_with_the_last(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen = torch.cat([torch.ones(longest(x)), core.seen[-1:] + 1])
    return y


def keeps_the_last_tables(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen[longest(x)] = torch.ones(longest(x))
    if len(core.seen) > 1:
        core.seen.pop(next(iter(core.seen)))
        return 2 * y
    return y


def counts_in_slots(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.slotted.total += 1
    return y


def counted_in_a_closure() -> Callable[..., Any]:
    t = 0

    def use(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal t
        t += 1
        return y

    return use


def noted_in_a_closure() -> Callable[..., Any]:
    seen: list[int] = []
    return lambda core, x, y: (seen.append(1), y)[1]


KEEPS = {
    "a counter": (sets(t=0), reads_its_count, "core.t"),
    "a mean of floats": (sets(mean=0.0), averages, "core.mean"),
    "a list": (sets(seen=[]), appends, "core.seen"),
    "a deque": (sets(seen=deque(maxlen=3)), appends, "core.seen"),
    "a set": (sets(seen=set()), adds, "core.seen"),
    "a dictionary": (sets(seen={}), notes, "core.seen"),
    "a list of tuples": (sets(seen=[("a", 1)]), replaces(("a", 2)), "core.seen"),
    "a dictionary of numbers": (sets(seen={"rows": 1, "b": 2}), notes, "core.seen"),
    "the order of a dictionary": (sets(seen={"a": 1, "b": 2}), moves_to_end, "core.seen"),
    "the order of an ordered dictionary": (
        sets(seen=OrderedDict([("a", 1), ("b", 2)])),
        moves_to_end,
        "core.seen",
    ),
    "a counter of words": (sets(seen=Counter({"rows": 3})), notes, "core.seen"),
    "an attribute of a list": (sets(seen=Words(["a"])), names_itself, "core.seen"),
    "a nested tensor": (
        sets(total=torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        sums_in_part,
        "core.total",
    ),
    "a jagged tensor": (
        sets(total=torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)),
        sums_in_part,
        "core.total",
    ),
    "an object in a list in a dictionary": (sets(seen={"of": [Total()]}), notes_deeply, "core.seen"),
    "counts by a length": (sets(seen={}), counts_by_length, "core.seen"),
    "sums by a length": (sets(seen={}), sums_by_length, "core.seen"),
    "a memory of rows by a number": (sets(seen={}), remembers_rows, "core.seen"),
    "a memory of outputs by the row": (sets(seen={}), remembers_outputs, "core.seen"),
    "a tensor of all rows so far": (sets(seen=torch.zeros(0, 4)), joins_rows, "core.seen"),
    "a tensor of all rows so far, last ones first": (
        sets(seen=torch.zeros(0, 4)),
        joins_rows_in_front,
        "core.seen",
    ),
    "a table that ends with the last length": (sets(seen=torch.ones(1)), ends_with_the_last, "core.seen"),
    "tables that push each other out": (sets(seen={}), keeps_the_last_tables, "core.seen"),
    "an object with slots": (sets(slotted=Slotted()), counts_in_slots, "core.slotted"),
    "a tensor": (sets(total=torch.zeros(())), sums, "core.total"),
    "an array": (sets(total=np.zeros(2)), sums, "core.total"),
    "a maximum so far": (sets(peak=torch.zeros(())), is_highest, "core.peak"),
    "what depends on the first weights": (sets(norm=None), keeps_first, "core.norm"),
    "a generator of torch": (sets(noise=torch.Generator()), draws, "core.noise"),
    "a generator of numpy": (sets(noise=np.random.default_rng(1)), draws_by_numpy, "core.noise"),
    "an old generator of numpy": (sets(noise=np.random.RandomState(1)), draws_by_numpy, "core.noise"),
    "a generator of Python": (sets(noise=random.Random(1)), draws_by_python, "core.noise"),
    "an iterator": (sets(numbers=itertools.count()), takes_next, "core.numbers"),
    "a hook set in forward": (sets(), hooks_itself, "core.linear._forward_hooks"),
    "a variable of a function": (sets(), counted_in_a_closure(), "use"),
    "a list of a function": (sets(), noted_in_a_closure(), "use"),
}


@pytest.mark.parametrize("kind", KEEPS)
def test_what_a_module_keeps_is_refused_by_name_before_a_row_is_dealt(tmp_path: Path, kind: str) -> None:
    begin, use, path = KEEPS[kind]
    module = net(begin, use)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ModelError, match=rf"^{path} changes as the module trains; its value would depend"):
        train_here(tmp_path, module=module)
    assert {name: value.tolist() for name, value in module.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }


def remasks(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.linear.weight.mask = core.linear.weight.mask + 1
    return y


def remasks_in_place(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.linear.weight.mask += 1
    return y


def marks(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.linear.weight.seen = getattr(core.linear.weight, "seen", 0) + 1
    return y


def hooks_its_weight(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if core.linear.weight.requires_grad:
        core.linear.weight.register_hook(lambda gradient: gradient * 0.9)
    return y


def with_mask(core: Any) -> None:
    core.linear.weight.mask = torch.zeros(1, 4)


def with_noting_hook(core: Any) -> None:
    norms: list[float] = []
    core.linear.weight.register_hook(lambda gradient: norms.append(float(gradient.norm())))


@pytest.mark.parametrize(
    ("begin", "use", "path"),
    [
        (with_mask, remasks, "core.linear.weight.mask"),
        (with_mask, remasks_in_place, "core.linear.weight.mask"),
        (with_noting_hook, lambda core, x, y: y, "a hook of core.linear.weight"),
        (sets(), marks, "a new attribute or hook of a parameter or buffer"),
        (sets(), hooks_its_weight, "a new attribute or hook of a parameter or buffer"),
    ],
)
def test_what_is_kept_beside_a_parameter_is_refused(tmp_path: Path, begin: Any, use: Any, path: str) -> None:
    with pytest.raises(ModelError, match=f"^{path} changes as the module trains"):
        train_here(tmp_path, module=net(begin, use))


def test_a_submodule_that_is_made_in_forward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^forward made submodule core\.head, so other workers"):
        train_here(tmp_path, module=net(sets(), makes_a_head))


# Beside it: globals, classes, functions

CALLS, SEEN = 0, []


def counts_globally(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    global CALLS
    CALLS += 1
    return y


def appends_globally(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    note(x)
    return y


def note(x: torch.Tensor) -> None:
    SEEN.append(len(x))


class CountsInItsClass(nn.Linear):
    """Counts its calls in the class."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CountsInItsClass.calls += 1
        return super().forward(x)


def counts_on_a_function(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    counted.n = getattr(counted, "n", 0) + 1
    return y


def counted() -> None:
    """Have an attribute."""


def notes_in_a_default(core: Any, x: torch.Tensor, y: torch.Tensor, seen: list[int] = []) -> torch.Tensor:  # noqa: B006
    seen.append(len(x))
    return y


def calls_what_notes(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    notes_in_a_keyword()
    return y


def notes_in_a_keyword(*, seen: dict[str, int] = {}) -> None:  # noqa: B006
    seen["n"] = seen.get("n", 0) + 1


class Settings:
    """Belongs to no module."""

    step = 0


def steps_another_class(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    Settings.step += 1
    return y


NUMBERS, SPACE = itertools.count(), types.SimpleNamespace(n=0)


def takes_a_global_number(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + next(NUMBERS)


def counts_in_a_space(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    SPACE.n += 1
    return y


@pytest.mark.parametrize(
    ("module", "path"),
    [
        (lambda: net(sets(), counts_on_a_function), "an attribute of the function counted"),
        (lambda: net(sets(), notes_in_a_default), "the default of seen in notes_in_a_default"),
        (lambda: net(sets(), calls_what_notes), "the default of seen in notes_in_a_keyword"),
        (lambda: net(sets(), steps_another_class), "the class Settings"),
        (lambda: net(sets(), takes_a_global_number), "the global variable NUMBERS"),
        (lambda: net(sets(), counts_in_a_space), "the global variable SPACE"),
        (lambda: net(sets(), counts_globally), "the global variable CALLS"),
        (lambda: net(sets(), appends_globally), "the global variable SEEN"),
        (lambda: CountsInItsClass(4, 1), "the class CountsInItsClass"),
    ],
)
def test_what_all_modules_share_is_refused_too(tmp_path: Path, module: Any, path: str) -> None:
    with pytest.raises(ModelError, match=f"^{path} changes as the module trains"):
        train_here(tmp_path, module=module())
    assert (CALLS, SEEN, CountsInItsClass.calls) == (0, [], 0)
    assert (Settings.step, SPACE.n, vars(counted)) == (0, 0, {})
    assert notes_in_a_default.__defaults__ == ([],)


# Later than the trial


def changes_late(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if len(x) == 3 and core.linear.weight.sum() > core.limit:  # the trial has two rows
        core.t += 1
    return y


def test_what_changes_after_the_trial_is_refused_at_that_piece(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^core\.t changes as the module trains(.|\n)*in turn [1-9][0-9]?, on worker"
    ):
        train_here(tmp_path, module=net(sets(t=0, limit=2.5), changes_late), train={"epochs": 9})
