"""The trial refuses what would be wrong in silence, by a sentence that names it, and leaves no trace."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyspark import cloudpickle
from torch import nn
from torch.nn import functional as F
from two_workers import by_plain_torch, train_here

from sparksgd.arithmetic.copies import copied, pickled
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.settings import settings_now
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.losses import cross_entropy, squared_error
from tests.engines.trials import Around, refused, rows, tried

PAST = "of the module that was copied, not of the copy"


class Scaled(Around):
    """Multiplies by a parameter, which it reaches by what a test sets."""

    def __init__(self, reach: Any = None, width: int = 6) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(1))
        self.reach = reach

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (self.scale if self.reach is None else self.reach())


# What refers to the module refers to the copy in a copy


def by_lambda() -> nn.Module:
    module = Scaled(width=4)
    module.reach = lambda: module.scale
    return module


def by_weak_reference() -> nn.Module:
    module = Scaled(width=4)
    reference = weakref.ref(module)
    module.reach = lambda: reference().scale
    module.alive = [lambda: module]
    return module


def by_hook() -> nn.Module:
    module = Scaled(width=4)
    module.inner.register_forward_hook(lambda part, given, made: made * module.scale)
    return module


def by_hook_of_a_parameter() -> nn.Module:
    module = Scaled(width=4)
    module.inner.weight.register_hook(lambda gradient: gradient * (2 - module.scale.detach()))
    return module


def wholly() -> nn.Module:
    module = nn.Linear(4, 1)
    around = nn.Module()
    around.inner = module
    around.forward = lambda x: module(x)
    return around


def detached() -> nn.Module:
    module = Scaled(width=4)
    module.reach = lambda: 1 + module.scale * module.inner.bias.detach()
    return module


def a_buffer() -> nn.Module:
    module = Scaled(width=4)
    module.register_buffer("size", torch.full((1,), 2.0))
    module.reach = lambda: module.size * module.scale
    return module


def an_attribute() -> nn.Module:
    module = Scaled(width=4)
    module.tables = {"a": [torch.full((1,), 2.0)]}
    module.reach = lambda: module.tables["a"][0] * module.scale
    return module


def storing() -> nn.Module:
    module = Scaled(width=4)

    def store(part: nn.Module, given: Any, made: torch.Tensor) -> None:
        module.seen = made

    module.inner.register_forward_hook(store)
    module.reach = lambda: module.scale + 0.1 * module.seen
    return module


REACHES = [
    by_lambda, by_weak_reference, by_hook, by_hook_of_a_parameter, wholly, detached, a_buffer, an_attribute,
    storing,
]  # fmt: skip


@pytest.mark.parametrize("make", REACHES)
def test_what_a_module_reaches_by_what_it_holds_trains_as_in_plain_torch(tmp_path: Path, make: Any) -> None:
    def made() -> nn.Module:
        torch.manual_seed(1)
        return make()

    modules = made(), made()
    one, two = (
        train_here(tmp_path, workers, module=module, train={"rows_per_step": 48, "epochs": 5})
        for workers, module in enumerate(modules, 1)
    )
    assert one.flat.parameters_sha256() == two.flat.parameters_sha256()
    assert one.flat.parameters.tolist() == pytest.approx(by_plain_torch(tmp_path, made(), 5), abs=1e-5)
    assert not hasattr(modules[0], "seen")


def squared_with_decay(module: nn.Module) -> Any:
    return lambda output, label: squared_error(output, label) + 0.3 * module.weight.square().sum()


class Decaying(nn.Module):
    """A loss that has the module as its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return squared_error(output, label) + 0.3 * self.module.weight.square().sum()


LOSS: Any = None


@pytest.mark.parametrize("of_module", [squared_with_decay, Decaying])
def test_a_loss_that_refers_to_the_module_trains_as_in_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_module: Any
) -> None:
    ended = []
    for workers in (0, 1, 2):
        torch.manual_seed(1)
        module = nn.Linear(4, 1)
        loss = of_module(module)
        if not workers:
            ended.append(by_plain_torch(tmp_path, module, 5, loss))
            continue
        monkeypatch.setattr(sys.modules[__name__], "LOSS", loss)
        sections = {"loss": {"name": f"{__name__}:LOSS"}, "train": {"rows_per_step": 48, "epochs": 5}}
        ended.append(train_here(tmp_path, workers, module=module, **sections).flat.parameters.tolist())
    assert ended[1] == ended[2]
    assert ended[1] == pytest.approx(ended[0], abs=1e-5)


# Tensors that are not the copy's

KEPT: dict[str, Any] = {}


class ByClass(Scaled):
    """Reaches its parameter by its class."""

    module: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * ByClass.module[0].scale


def by_global() -> nn.Module:
    KEPT["module"] = Scaled(lambda: KEPT["module"].scale)
    return KEPT["module"]


def by_global_detached() -> nn.Module:
    KEPT["module"] = Scaled(lambda: KEPT["module"].scale.detach())
    return KEPT["module"]


def by_default() -> nn.Module:
    module = Scaled()
    module.reach = lambda module=module: module.scale
    return module


def by_class() -> nn.Module:
    ByClass.module = [ByClass()]
    return ByClass.module[0]


def a_global_buffer() -> nn.Module:
    module = KEPT["module"] = Scaled(lambda: KEPT["module"].size)
    module.register_buffer("size", torch.ones(1))
    return module


def a_global_attribute() -> nn.Module:
    module = KEPT["module"] = Scaled(lambda: KEPT["module"].tables["a"][0])
    module.tables = {"a": [torch.ones(1)]}
    return module


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (by_global, "'scale'"),
        (by_global_detached, "'scale'"),
        (by_class, "'scale'"),
        (a_global_buffer, "'size'"),
        (a_global_attribute, "\"tables['a'][0]\""),
    ],
)
def test_a_forward_that_reaches_past_the_copy(make: Any, name: str) -> None:
    refused(make(), f"uses {name} {PAST}", "Reach it by self")


def test_a_default_of_a_lambda_is_the_copy_s() -> None:
    module = by_default()
    copy = copied(module)
    assert copy.reach.__defaults__ == (copy,)
    assert module.reach.__defaults__ == (module,)
    travelled = pickle.loads(pickled(module, {"": module}, cloudpickle.CloudPickler))
    assert travelled.reach.__defaults__ == (travelled,)
    tried(module)


def test_a_loss_that_reaches_past_the_copy() -> None:
    module = KEPT["module"] = nn.Linear(6, 1)
    refused(module, f"uses 'weight' {PAST}", loss=_decayed_globally)


def _decayed_globally(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return squared_error(output, label) + 0.1 * KEPT["module"].weight.square().sum()


def clamps_globally() -> torch.Tensor:
    numbers = KEPT["module"].inner.weight.detach().numpy()
    numbers[:] = numbers * 0.5  # past torch
    return torch.ones(1)


def keeps_globally() -> torch.Tensor:
    KEPT["module"].seen = 1
    return torch.ones(1)


@pytest.mark.parametrize(
    ("reach", "phrases"),
    [
        (clamps_globally, [f"uses 'inner.weight' {PAST}"]),
        (keeps_globally, [f"set 'seen' {PAST}", "Let it set an attribute of self"]),
    ],
)
def test_what_a_copy_changes_of_the_caller_s_is_refused_and_put_back(reach: Any, phrases: list[str]) -> None:
    module = KEPT["module"] = Scaled(reach)
    before = module.inner.weight.tolist()
    refused(module, *phrases)
    assert (module.inner.weight.tolist(), hasattr(module, "seen")) == (before, False)


GLOBAL = torch.ones(1, requires_grad=True)


def test_a_global_that_requires_a_gradient() -> None:
    refused(Scaled(lambda: GLOBAL), "a tensor of shape (1,)", "a global, a closure or the loss holds it")


def test_a_global_constant_is_no_false_alarm() -> None:
    tried(Scaled(lambda: GLOBAL.detach()))


def test_an_attribute_that_requires_a_gradient() -> None:
    module = Around()
    module.bias2 = torch.zeros(1, requires_grad=True)
    module.forward = functools.partial(_plus_bias2, module)  # type: ignore[method-assign]
    refused(module, "'bias2' requires a gradient, but is no parameter", "make it an nn.Parameter")


def _plus_bias2(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.inner(x) + module.bias2


class Forces(nn.Module):
    """The derivative of an energy for positions, which forward lets require a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force[:, :1]


def test_a_leaf_that_each_forward_makes_is_no_false_alarm() -> None:
    tried(Forces())


class ArcFace(nn.Module):
    """A loss with a weight."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=not frozen)

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return squared_error(output, label) * self.weight


def test_a_loss_with_a_parameter() -> None:
    refused(nn.Linear(6, 1), "the loss ArcFace has the trainable parameter 'weight'", loss=ArcFace())
    tried(nn.Linear(6, 1), loss=ArcFace(frozen=True))


class Keeps(Around):
    """A hook of its own keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.register_forward_hook(self.keep)

    def keep(self, part: nn.Module, given: Any, made: torch.Tensor) -> None:
        self.seen = made


def test_a_hook_that_is_a_method_keeps_what_it_likes_on_the_copy() -> None:
    module = Keeps()
    tried(module)
    assert not hasattr(module, "seen")


# Shared memory


def transposed() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 1))
    module[1].weight = nn.Parameter(module[0].weight.t())
    return module


def overlapping() -> nn.Module:
    module, vector = Around(), torch.randn(9)
    module.a, module.b = nn.Parameter(vector[:6]), nn.Parameter(vector[3:])
    return module


def a_detached_buffer() -> nn.Module:
    module = Around()
    module.register_buffer("first", module.inner.weight.detach())
    return module


def a_view() -> nn.Module:
    module = Around()
    module.row = module.inner.weight.data[0]
    return module


def expanded() -> nn.Module:
    module = Around()
    module.inner.weight = nn.Parameter(torch.zeros(1, 1).expand(1, 6))
    return module


def an_array() -> nn.Module:
    module = Around()
    module.numbers = module.inner.weight.detach().numpy()[0, 1:]
    return module


def a_closure_s_view() -> nn.Module:
    module = Around()
    weight = module.inner.weight.detach()
    module.inner.register_forward_hook(lambda part, given, made: made * weight.norm())
    return module


@pytest.mark.parametrize(
    ("make", "phrases"),
    [
        (transposed, ["'0.weight' and '1.weight' share memory", "transpose or slice it in forward"]),
        (overlapping, ["'a' and 'b' share memory"]),
        (a_detached_buffer, ["'inner.weight' and 'first' share memory", "keep a clone"]),
        (a_view, ["'inner.weight' and 'row' share memory"]),
        (an_array, ["'inner.weight' and 'numbers' share memory"]),
        (a_closure_s_view, ["'inner.weight' and ", "'s variable weight\" share memory"]),
        (expanded, ["'inner.weight' is expanded"]),
    ],
)
def test_tensors_that_share_memory(make: Any, phrases: list[str]) -> None:
    refused(make(), *phrases)


def test_a_loss_that_keeps_a_view_of_a_weight() -> None:
    module = nn.Linear(6, 1)
    weight = module.weight.detach()
    refused(
        module,
        "'weight' and \"loss's variable weight\" share memory",
        loss=lambda output, label: squared_error(output, label) + weight.square().sum(),
    )


def test_parts_of_one_vector_that_do_not_overlap_are_no_false_alarm() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    FlatModule(module)  # as after an earlier training
    tried(module)
    columns, module = torch.randn(1, 12), Around()
    module.inner.weight, module.other = nn.Parameter(columns[:, ::2]), nn.Parameter(columns[:, 1::2])
    tried(module)


# Gradients


def test_no_parameter_gets_a_gradient() -> None:
    class Cut(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).detach()

    refused(Cut(), "no parameter gets a gradient", "detach()")


def test_parameters_without_a_gradient_are_named(caplog: pytest.LogCaptureFixture) -> None:
    module = Around()
    module.spare = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        tried(module)
    assert "no gradient reached spare.weight, spare.bias in the trial's 4 steps" in caplog.text


def test_a_post_accumulate_hook() -> None:
    module = Around()
    module.inner.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    refused(module, "parameter 'inner.bias' has a post-accumulate-grad hook")


# What changes


class Grows(Around):
    """Makes a head in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            self.head = nn.Linear(6, 1)
        return self.inner(x) + self.head(x)


class Replaces(Around):
    """Makes its weight anew."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight = nn.Parameter(self.inner.weight.detach().clone())
        return self.inner(x)


def test_parts_that_forward_makes() -> None:
    refused(Grows(), "forward made submodule head", "in __init__")
    refused(Replaces(), "forward replaced parameter inner.weight")
    module = Around()
    module.parts = {}
    module.forward = functools.partial(_with_hidden_head, module)  # type: ignore[method-assign]
    refused(module, "parts changes as the module trains")


def _with_hidden_head(module: Any, x: torch.Tensor) -> torch.Tensor:
    head = module.parts.setdefault("head", nn.Linear(6, 1))
    return module.inner(x) + head(x)


class Third(Around):
    """Adds rows up in a buffer, in each third step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("thirds", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            if self.steps % 3 == 0:
                self.thirds += x.sum()
        return self.inner(x)


class Later(Around):
    """Counts in an attribute, from its third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            self.calls += int(self.steps > 2)
        return self.inner(x)


def test_what_shows_only_after_some_steps() -> None:
    refused(Third(), "forward changes thirds, and two pieces of one step leave different values")
    refused(Later(), "calls changes as the module trains")


# Evaluation


class Otherwise(Around):
    """Does another thing in evaluation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(6, 3), how

    def forward(self, x: torch.Tensor) -> Any:
        y = self.inner(x)
        if self.training:
            return y
        if self.how == "raises":
            raise LookupError("not trained yet")
        return {"classes": y.argmax(1), "pair": (y, y), "narrow": y[:, :2]}[self.how]


@pytest.mark.parametrize("how", ["raises", "classes", "pair", "narrow"])
def test_evaluation_is_tried(how: str) -> None:
    data = rows(label="int64")
    refused(Otherwise(how), "in evaluation mode", loss=cross_entropy, data=data, classifies=True)


class Squeezed(Around):
    """Drops its dimensions of one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).squeeze()


class OnlyEight(Around):
    """Has a buffer for eight rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + torch.zeros(8, 1)[: len(x)]


def test_one_row_and_the_rows_of_a_piece_are_tried() -> None:
    refused(
        Squeezed(),
        "in evaluation mode the module gives () for one row",
        loss=lambda output, label: (output - label).square(),
    )
    tried(OnlyEight(), piece_rows=8)
    refused(OnlyEight(), "raised RuntimeError", piece_rows=9)


# The optimiser


class Strict(torch.optim.SGD):
    """Raises at its third step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3:
            raise LookupError("no third step")
        return super().step(closure)


def test_the_optimiser_makes_steps() -> None:
    refused(
        nn.Linear(6, 1),
        "its step() raised LookupError: no third step",
        optimizer=OptimizerConfig(name=f"{__name__}:Strict", arguments={"lr": 0.1}),
    )


def test_a_schedule_shorter_than_the_trial() -> None:
    tried(
        nn.Linear(6, 1),
        optimizer=OptimizerConfig(name="SGD", arguments={"lr": 0.1}),
        schedule=ScheduleConfig(name="OneCycleLR", arguments={"max_lr": 0.1, "total_steps": 2}),
    )


# parameters() and lazy modules


class Adapted(nn.Module):
    """Gives its adapter alone as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter(x)

    def parameters(self, recurse: bool = True) -> Any:
        return self.adapter.parameters(recurse)


def test_only_what_parameters_gives_is_trained() -> None:
    tried(Adapted())
    flat = FlatModule(Adapted())
    assert flat.parameters.shape == (7,)
    assert [name for name, _ in flat.constants()] == ["base.weight", "base.bias"]


def test_parameters_that_are_not_the_module_s() -> None:
    class Strange(Around):
        def parameters(self, recurse: bool = True) -> Any:
            return [torch.zeros(3, requires_grad=True)]

    refused(Strange(), "parameters() of Strange gives a tensor of shape (3,)", "register it")


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


def test_lazy_modules_get_their_shapes_from_the_seed() -> None:
    data = rows(width=36, label="int64")
    one, two, other = lazy(), lazy(), lazy()
    weight, state = one[5].weight, torch.get_rng_state()
    for module, seed in ((one, 1), (two, 1), (other, 2)):
        tried(module, cross_entropy, data, classifies=True, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert one[5].weight is weight
    assert [type(part).__name__ for part in one][1:3] == ["Conv2d", "BatchNorm2d"]
    assert (one[5].weight.shape, one[5].in_features, one[2].num_features) == ((3, 64), 64, 4)
    assert torch.equal(one[5].weight, two[5].weight)
    assert not torch.equal(one[5].weight, other[5].weight)
    assert float(one[2].num_batches_tracked) == 0
    assert torch.equal(one[2].running_mean, torch.zeros(4))
    assert one(torch.zeros(2, 36)).shape == (2, 3)
    copy.deepcopy(one)


def test_a_lazy_part_that_forward_does_not_reach() -> None:
    module = Around()
    module.spare = nn.LazyLinear(3)
    refused(module, "spare.weight has no shape yet", "remove it, or use it")


# Sentences


def of_default(dtype: torch.dtype) -> nn.Module:
    torch.set_default_dtype(dtype)
    return Around()


def test_another_default_type() -> None:
    try:
        refused(of_default(torch.float64), "torch's default type is torch.float64", "set_default_dtype")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def complex_one() -> nn.Module:
    module = Around()
    module.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return module


def kept_activation() -> nn.Module:
    module = Around()
    module.last = module.inner(torch.ones(1, 6))
    return module


def locked() -> nn.Module:
    module = Around()
    module.inner.lock = threading.Lock()
    return module


@pytest.mark.parametrize(
    ("make", "phrases"),
    [
        (lambda: nn.Linear(6, 1, device="meta"), ["weight is on meta, so it has no values"]),
        (lambda: Around().double(), ["inner.weight is torch.float64", "module.float()"]),
        (lambda: Around().bfloat16(), ["inner.weight is torch.bfloat16", "torch.autocast"]),
        (complex_one, ["parameter w is torch.complex64", "torch.view_as_complex"]),
        (kept_activation, ["last is, or holds, a tensor that was computed, with its graph", "detach it"]),
        (locked, ["inner.lock is a _thread.lock, which cannot be copied to workers"]),
        (lambda: torch.jit.script(nn.Linear(6, 1)), ["the module is scripted by torch.jit"]),
    ],
)
def test_sentences_instead_of_tracebacks(make: Any, phrases: list[str]) -> None:
    refused(make(), *phrases)


class Two(Around):
    """Takes two columns by name."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.inner(a + b)


class Several(Around):
    """Takes whatever comes, in order."""

    def forward(self, *columns: torch.Tensor) -> torch.Tensor:
        return self.inner(sum(columns))


def test_features_that_forward_does_not_take() -> None:
    tried(Two(), data=rows(names="a b"))
    refused(
        Two(),
        "data.features is 'a', 'bb', but forward of Two takes",
        "argument: 'b'",
        data=rows(names="a bb"),
    )
    refused(Several(), "passed by name (*args takes none of them)", data=rows(names="a b"))
    refused(Two(), "none may be called 'self': rename that column", data=rows(names="a self"))


def test_a_loss_that_cannot_be_copied() -> None:
    loss = functools.partial(_with_lock, threading.Lock())
    refused(nn.Linear(6, 1), "loss.args[0] is a _thread.lock, which cannot be copied to workers", loss=loss)


def _with_lock(lock: Any, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return squared_error(output, label)


# No trace


class Wild(Around):
    """Draws from all global generators, sets threads, and keeps a generator of its own."""

    def __init__(self, *, draws: bool) -> None:
        super().__init__()
        self.chance, self.draws = torch.Generator().manual_seed(3), draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = random.random() + np.random.rand()
        if self.draws:
            noise += torch.rand(1, generator=self.chance)
        torch.set_num_threads(1)
        return self.inner(F.dropout(x, 0.1)) + 0 * noise


@pytest.mark.parametrize("is_refused", [False, True])
def test_the_caller_s_objects_are_as_they_were(is_refused: bool) -> None:
    module = Wild(draws=is_refused).eval()
    module.inner.train()
    module.inner.weight.grad = torch.ones(1, 6)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    records, schema = rows()
    data = records.copy()
    states = [torch.get_rng_state(), module.chance.get_state()]
    numbers, words, settings = np.random.get_state()[1].copy(), random.getstate(), settings_now()
    if is_refused:
        refused(module, "chance changes as the module trains", data=(records, schema))
    else:
        tried(module, data=(records, schema))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert (module.training, module.inner.training) == (False, True)
    assert torch.equal(module.inner.weight.grad, torch.ones(1, 6))
    assert all(
        torch.equal(*two)
        for two in zip(states, [torch.get_rng_state(), module.chance.get_state()], strict=True)
    )
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert (random.getstate(), settings_now()) == (words, settings)
    assert np.array_equal(records, data)


def test_one_line_says_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tried(nn.Linear(6, 1))
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(
        "trial: 4 steps of 5 rows, evaluations of 1 and 5; 2 of 2 parameters get a gradient; rows do not mix"
    )


def test_no_compiler_is_imported() -> None:
    code = (
        "import sys; from torch import nn; from tests.engines.trials import tried; "
        "tried(nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 1))); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Narrow(Around):
    """A distribution whose scale must be positive: weights that are moved by much are outside its support."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.distributions.Normal(self.inner(x), self.scale).log_prob(torch.zeros(1)) / 1e9


def test_a_parameter_near_the_end_of_its_range_is_no_false_alarm() -> None:
    assert tried(Narrow())


def test_a_hook_for_all_modules_is_refused() -> None:
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: None)
    try:
        refused(Around(), "torch has a hook for all modules (forward_hooks)")
    finally:
        hook.remove()


class KeepsGradients(Around):
    """A buffer that follows the size of gradients."""

    def __init__(self, *, by: str) -> None:
        super().__init__()
        self.register_buffer("size", torch.zeros(()))
        if by == "module":
            self.inner.register_full_backward_hook(lambda module, into, out: self.keep(out[0]))
        elif by == "parameter":
            self.inner.weight.register_hook(self.keep)

    def keep(self, gradient: torch.Tensor) -> None:
        self.size.copy_(gradient.abs().mean())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.size.grad_fn is None and not self.inner.weight._backward_hooks and y.requires_grad:
            y.register_hook(self.keep)
        return y


@pytest.mark.parametrize("by", ["module", "parameter", "activation"])
@pytest.mark.parametrize("has_pieces", [True, False])
def test_what_the_backward_pass_keeps_of_gradients_is_refused(by: str, has_pieces: bool) -> None:
    refused(KeepsGradients(by=by), "size", has_pieces=has_pieces)


def weighted_by_class(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    weights = torch.where(label == 2, 10.0, 1.0)
    return nn.functional.cross_entropy(output, label, reduction="none") * weights / weights.mean()


def test_a_loss_that_looks_at_rare_classes_of_a_sorted_file_is_refused() -> None:
    records, schema = rows(label="int64")
    schema.label_array(records)[:] = 0
    refused(nn.Linear(6, 3), "depends on the other rows", loss=weighted_by_class, data=(records, schema))
