"""State that is no parameter and no buffer: refused by name, unless no piece reads what another one left."""

from __future__ import annotations

import enum
import itertools
import random
import re
import sys
import types
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from two_workers import by_plain_torch, train_here

from sparksgd.engines.trial.ownership import Owned, left_alone, refuse_shared_memory
from sparksgd.engines.watch import Watch
from sparksgd.errors import ModelError, SparkSGDError
from sparksgd.losses import squared_error


class Net(nn.Module):
    """y = w x + b, in a submodule `core`, with something else that a test gives.

    Args:
        begin: makes attributes of `core`.
        use: called with `core`, the input, and the output, which it returns changed or as it is.
    """

    def __init__(self, begin: Callable[[Any], object], use: Callable[..., Any]) -> None:
        super().__init__()
        self.core = nn.Module()
        self.core.linear = nn.Linear(4, 1)
        begin(self.core)
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.use(self.core, x, self.core.linear(x))
        assert isinstance(output, torch.Tensor)
        return output


def net(begin: Callable[[Any], object], use: Callable[..., Any]) -> Net:
    torch.manual_seed(0)
    return Net(begin, use)


def sets(**attributes: Any) -> Callable[[Any], object]:
    return lambda core: [setattr(core, name, value) for name, value in attributes.items()]


def counts(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.t += 1
    return y


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


def longest(x: torch.Tensor) -> int:
    return int(10 * x.abs().sum())


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


CALLS, SEEN, MASKS = 0, [], {}


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


# Harmless


def keeps_activation(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.last = torch.tanh(y)
    return y + core.last


def caches_a_mask(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    width = x.shape[1]
    if width not in core.masks:
        core.masks[width] = torch.linspace(0, 1, width)
    return y + (x * core.masks[width]).sum(1, keepdim=True)


def warns_once(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.warned = True
    return y


def clears_its_list(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen.clear()
    core.seen.append(y)
    return y + sum(core.seen)


def builds_a_new_number(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.scale = float(str(core.scale))
    return y * core.scale


def caches_globally(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.shape[1] not in MASKS:
        MASKS[x.shape[1]] = torch.linspace(0, 1, x.shape[1])
    return y + (x * MASKS[x.shape[1]]).sum(1, keepdim=True)


def caches_by_version(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weight = core.linear.weight
    if weight._version != core.seen:
        core.cached, core.seen = torch.tanh(weight), weight._version
    return y + x @ core.cached.T


def caches_by_length(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Look up a table whose length is that of the longest row: it differs from piece to piece."""
    if longest(x) not in core.tables:
        core.tables[longest(x)] = torch.arange(longest(x) + 1) / 10
    return y * (1 + core.tables[longest(x)][(x.abs() > 0.8).sum(1)][:, None])


def grows_a_table(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if core.table is None or longest(x) >= len(core.table):
        core.table = torch.arange(longest(x) + 1) / 10
    return y * (1 + core.table[(x.abs() > 0.8).sum(1)][:, None])


class Tables:
    """Keeps tables, as a helper that is no module does."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[int, torch.Tensor]] = {"ramps": {}}


def caches_in_a_helper(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    table = core.helper.kept["ramps"].setdefault(longest(x), torch.linspace(0, 1, longest(x) + 1))
    return y + table[0]


HARMLESS = {
    "a counter that nothing reads": (sets(t=0), counts),
    "a cache by a length that differs": (sets(tables={}), caches_by_length),
    "a table that grows": (sets(table=None), grows_a_table),
    "a cache of a helper": (lambda core: setattr(core, "helper", Tables()), caches_in_a_helper),
    "a weight that is cached by its version": (sets(seen=-1), caches_by_version),
    "a global cache": (sets(), caches_globally),
    "the last activation": (sets(last=None), keeps_activation),
    "a new attribute": (sets(), keeps_activation),
    "a cache by shape": (sets(masks={}), caches_a_mask),
    "a flag": (sets(warned=False), warns_once),
    "a list that is cleared": (sets(seen=[]), clears_its_list),
    "an equal number": (sets(scale=0.1), builds_a_new_number),
}


class Kind(enum.Flag):
    """Makes new members of itself when they are asked for."""

    ONE = enum.auto()
    TWO = enum.auto()


@lru_cache
def ramp(width: int) -> torch.Tensor:
    return torch.linspace(0, 1, width)


def uses_libraries(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    both = Kind.ONE | Kind.TWO
    found = OrderedDict(Counter([both, Path("a"), np.float32(1), re.sub("a+", "b", "caat")]))
    assert len(found) == 4
    with nn.utils.parametrize.cached(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("once", stacklevel=1)
        return y + (x * ramp(x.shape[1])).sum(1, keepdim=True) + nn.Identity()(y)


HARMLESS["classes of libraries"] = (sets(), uses_libraries)


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_no_piece_reads_from_another_trains_as_in_one_process(tmp_path: Path, kind: str) -> None:
    begin, use = HARMLESS[kind]
    all_rows = {"rows_per_step": 48, "epochs": 5}
    one, two = (
        train_here(tmp_path, num_workers, module=net(begin, use), train=all_rows) for num_workers in (1, 2)
    )
    assert one.flat.parameters_sha256() == two.flat.parameters_sha256()
    expected = by_plain_torch(tmp_path, net(begin, use), 5)
    assert one.flat.parameters.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    in_parts = train_here(tmp_path, module=net(begin, use), train=all_rows | {"rows_per_backward": 5})
    assert in_parts.flat.parameters.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def cached_at_first(core: Any) -> None:
    core.cached, core.seen = torch.tanh(core.linear.weight.detach()), core.linear.weight._version


def test_a_weight_that_was_cached_before_the_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"core\.cached or core\.seen changes as the module trains"):
        train_here(tmp_path, module=net(cached_at_first, caches_by_version))


def test_the_caller_s_module_keeps_its_own_attributes(tmp_path: Path) -> None:
    module = net(sets(last="mine", masks={"other": 1}), keeps_activation)
    hook = module.core.linear.register_forward_hook(lambda *_: None)
    train_here(tmp_path, module=module)
    assert (module.core.last, module.core.masks) == ("mine", {"other": 1})
    assert hook.id in module.core.linear._forward_hooks


# Long tables, and tensors without bytes


@pytest.mark.parametrize(
    "make", [dict, OrderedDict, lambda items: Counter(dict(items)), lambda items: [one for one, _ in items]]
)
def test_a_long_table_returns_to_what_it_was(make: Any) -> None:
    module = nn.Linear(4, 1)
    module.table = table = make([(f"word {number}", number) for number in range(100_000)])
    before = table.copy()
    watch = Watch(module, nn.functional.mse_loss)
    watch.require_unchanged()
    if isinstance(table, list):
        table[7] = "other"
    else:
        table["word 7"] = 8
        table["word 0"] = table.pop("word 0")
    assert watch.changed() == ["table"]
    watch.restore()
    assert module.table is table
    assert (watch.changed(), list(table), table) == ([], list(before), before)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_returns_to_what_it_was(layout: torch.layout) -> None:
    module = nn.Linear(4, 1)
    module.total = torch.nested.nested_tensor([torch.zeros(2), torch.ones(3)], layout=layout)
    watch = Watch(module, nn.functional.mse_loss)
    module.total.unbind()[0].add_(1)
    assert watch.changed() == ["total"]
    watch.restore()
    assert watch.changed() == []
    assert [part.tolist() for part in module.total.unbind()] == [[0, 0], [1, 1, 1]]


def keeps_a_nested_one(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.last = torch.nested.nested_tensor([y.detach()[:1], y.detach()[1:]])
    core.form = torch.empty(3, device="meta")
    return y


@pytest.mark.parametrize(
    ("attributes", "use"),
    [
        ({"base": [nn.Linear(4, 1).to("meta")]}, warns_once),
        ({"base": [nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1)).to("meta")]}, lambda core, x, y: y),
        ({}, keeps_a_nested_one),
    ],
)
def test_tensors_without_bytes_and_nested_ones_are_fine(tmp_path: Path, attributes: Any, use: Any) -> None:
    train_here(tmp_path, module=net(sets(**attributes), use), tested=True)


@pytest.mark.parametrize(
    "kept",
    [
        torch.empty(3, device="meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ],
)
def test_such_an_attribute_is_watched(kept: torch.Tensor) -> None:
    module = net(sets(kept=kept, last=None), keeps_activation)
    refuse_shared_memory(module)
    Owned(module).refuse({})
    with left_alone(module, squared_error) as harmless:
        harmless |= {"core.last"}
        module(torch.ones(2, 4))


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


# Evaluation


def counts_in_evaluation(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        core.t += 1
        return y * core.t
    return y


def test_an_evaluation_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    losses = [
        [
            report.loss
            for report in train_here(
                tmp_path, workers, module=net(sets(t=0), counts_in_evaluation), tested=True
            ).evaluations
        ]
        for workers in (1, 2, 4)
    ]
    assert losses[0] == losses[1] == losses[2]


def mask_of(core: Any) -> torch.Tensor:
    return (core.linear.weight.detach().abs() > 0.2).float()


def with_first_mask(core: Any) -> None:
    core.mask = mask_of(core)


def masks_in_training(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        core.mask = mask_of(core)
    return nn.functional.linear(x, core.linear.weight * core.mask, core.linear.bias)


def keeps_weights_for_evaluation(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        core.kept = core.linear.weight.detach() * 2
        return y
    return x @ (core.linear.weight * 2 if core.kept is None else core.kept).T


def needs_a_training(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        core.kept = y.detach().mean()
    return y + core.kept * (0 if torch.is_grad_enabled() else 1)


@pytest.mark.parametrize(
    ("begin", "use", "path"),
    [
        (sets(mask=torch.ones(1, 4)), masks_in_training, "mask"),
        (with_first_mask, masks_in_training, "mask"),
        (sets(kept=None), keeps_weights_for_evaluation, "kept"),
        (sets(kept=None), needs_a_training, "kept"),
    ],
)
def test_what_training_writes_and_evaluation_reads_is_refused(
    tmp_path: Path, begin: Any, use: Any, path: str
) -> None:
    with pytest.raises(
        ModelError, match=rf"^core\.{path} is written in training and read in evaluation, but"
    ):
        train_here(tmp_path, module=net(begin, use))


def masks_always(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.mask = mask_of(core)
    return nn.functional.linear(x, core.linear.weight * (0.5 + core.mask), core.linear.bias)


def keeps_a_view(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.view = core.linear.weight.detach()
    return y


@pytest.mark.parametrize("use", [masks_always, keeps_a_view, keeps_activation])
def test_what_each_forward_writes_first_is_fine_in_evaluation(tmp_path: Path, use: Any) -> None:
    train_here(tmp_path, module=net(sets(), use), tested=True)


# Losses


class KeepingLoss(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (output[:, 0] - label).square()


class CountingLoss:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (output[:, 0] - label).square()


def counting_function(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    counting_function.calls = getattr(counting_function, "calls", 0) + 1
    return (output[:, 0] - label).square()


keeping, counting = KeepingLoss(), CountingLoss()


@pytest.mark.parametrize("name", ["keeping", "counting", "counting_function"])
def test_what_a_loss_keeps_is_refused(tmp_path: Path, name: str) -> None:
    path = {"keeping": r"loss\.calls", "counting": "loss", "counting_function": "loss"}[name]
    with pytest.raises(ModelError, match=f"^{path} changes as the module trains"):
        train_here(tmp_path, module=nn.Linear(4, 1), loss={"name": f"{__name__}:{name}"})


# Numbers that are drawn, settings that are changed


def dropout_by_numpy(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kept = torch.from_numpy(np.random.random(y.shape) < 0.7)
    return y * kept + random.random() * y


@pytest.mark.parametrize("use", [dropout_by_numpy, lambda core, x, y: y + torch.rand_like(y)])
def test_numbers_of_the_global_generators_are_the_same_for_any_number_of_workers(
    tmp_path: Path, use: Callable[..., Any]
) -> None:
    ended = []
    for workers in (1, 2, 2):
        np.random.seed(workers)
        random.seed(workers)
        training = train_here(tmp_path, workers, module=net(sets(), use), tested=True)
        ended.append((training.flat.parameters_sha256(), [one.loss for one in training.evaluations]))
    assert ended[0] == ended[1] == ended[2]
    assert len(set(ended[0][1])) == 2


def test_the_caller_s_generators_are_left_as_they_were(tmp_path: Path) -> None:
    np.random.seed(3)
    np.random.standard_normal()  # half a pair is still to come
    random.seed(3)
    torch.manual_seed(3)
    expected = (np.random.standard_normal(2).tolist(), random.random(), torch.rand(1).item())
    np.random.seed(3)
    np.random.standard_normal()
    random.seed(3)
    torch.manual_seed(3)
    torch_state = torch.get_rng_state()
    module = net(sets(), dropout_by_numpy)
    torch.set_rng_state(torch_state)
    train_here(tmp_path, module=module, tested=True)
    assert (np.random.standard_normal(2).tolist(), random.random(), torch.rand(1).item()) == expected


def sets_threads() -> None:
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)


LEAKS = {
    "torch.set_num_threads": sets_threads,
    "torch.set_default_dtype": partial(torch.set_default_dtype, torch.float64),
    "torch.set_grad_enabled": partial(torch.set_grad_enabled, False),
    "torch.use_deterministic_algorithms": partial(torch.set_deterministic_debug_mode, 2),
    "torch.set_float32_matmul_precision": partial(torch.set_float32_matmul_precision, "medium"),
    "torch.set_flush_denormal": partial(torch.set_flush_denormal, True),
    "torch.set_default_device": partial(torch.set_default_device, "cpu"),
    "torch.autocast": partial(torch.set_autocast_enabled, "cpu", True),
    "torch.backends.mkldnn": partial(setattr, torch.backends.mkldnn, "enabled", False),
    "numpy.seterr": partial(np.seterr, all="raise"),
}


@pytest.mark.parametrize("when", ["in the trial", "later", "in evaluation"])
@pytest.mark.parametrize("name", LEAKS)
def test_a_setting_that_forward_leaves_changed_is_refused_and_put_back(
    tmp_path: Path, name: str, when: str
) -> None:
    if name == "torch.set_grad_enabled" and when == "in evaluation":
        pytest.skip("gradients are off there, and on again at its end")

    def use(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        is_due = {
            "in the trial": torch.is_grad_enabled(),
            "later": len(x) == 3 and torch.is_grad_enabled(),
            "in evaluation": not torch.is_grad_enabled(),
        }[when]
        if is_due:
            LEAKS[name]()
        return y

    from sparksgd.arithmetic.settings import settings_now

    before = settings_now()
    with pytest.raises(ModelError, match=f"^the module or its loss.* changed {name}"):
        train_here(tmp_path, module=net(sets(), use), tested=True)
    assert settings_now() == before


# torch's own modules


def inputs() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    flat, image, sequence = torch.randn(6, 8), torch.randn(6, 4, 8, 8), torch.randn(6, 5, 8)
    wrapped = nn.utils.parametrizations
    return {
        "lstm": (nn.LSTM(8, 8, batch_first=True), (sequence,)),
        "gru": (nn.GRU(8, 8, num_layers=2, dropout=0.1, batch_first=True), (sequence,)),
        "attention": (nn.MultiheadAttention(8, 2, batch_first=True), (sequence,) * 3),
        "encoder": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (sequence,)),
        "transformer": (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (sequence, sequence)),
        "batch norm": (nn.BatchNorm2d(4), (image,)),
        "instance norm": (nn.InstanceNorm2d(4, track_running_stats=True), (image,)),
        "pool": (nn.FractionalMaxPool2d(2, output_size=4), (image,)),
        "embedding": (nn.EmbeddingBag(9, 8), (torch.arange(9).view(3, 3),)),
        "spectral norm": (wrapped.spectral_norm(nn.Linear(8, 8)), (flat,)),
        "weight norm": (wrapped.weight_norm(nn.Linear(8, 8)), (flat,)),
        "orthogonal": (wrapped.orthogonal(nn.Linear(8, 8)), (flat,)),
        "dropout": (nn.Sequential(nn.Dropout(), nn.AlphaDropout(), nn.RReLU()), (flat,)),
    }


@pytest.mark.parametrize("name", inputs())
def test_torch_s_own_modules_keep_nothing(name: str) -> None:
    module, given = inputs()[name]
    watch = Watch(module, nn.functional.mse_loss)
    for _ in range(2):
        output = module(*(one.requires_grad_(one.is_floating_point()) for one in given))
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        watch.require_unchanged()
    assert watch.changed() == []


def test_a_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    import subprocess

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pathlib, torch; from two_workers import by_plain_torch, train_here\n"
            f"train_here(pathlib.Path({str(tmp_path)!r}), 1, module=torch.nn.Linear(4, 1), tested=True)\n"
            "print('torch._dynamo' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "False", done.stderr


def test_all_errors_are_ours() -> None:
    assert issubclass(ModelError, SparkSGDError)
