"""The trial refuses what would be wrong in silence, by a sentence that names it, and leaves no trace."""

from __future__ import annotations

import copy
import functools
import logging
import random
import subprocess
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.losses import cross_entropy, squared_error
from tests.engines.trials import Around, refused, rows, tried

PAST = "of the module that was copied, not of the copy"


class Scaled(Around):
    """Multiplies by a parameter, which it reaches by what a test sets."""

    def __init__(self, reach: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.reach = reach

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (self.scale if self.reach is None else self.reach())


# Tensors that are not the copy's


def by_lambda() -> nn.Module:
    module = Scaled()
    module.reach = lambda: module.scale
    return module


def by_weak_reference() -> nn.Module:
    module = Scaled()
    reference = weakref.ref(module)
    module.reach = lambda: reference().scale
    module.alive = [lambda: module]
    return module


def by_hook() -> nn.Module:
    module = Scaled()
    module.inner.register_forward_hook(lambda part, given, made: made * module.scale)
    return module


def wholly() -> nn.Module:
    module = nn.Linear(6, 1)
    around = nn.Module()
    around.inner = module
    around.forward = lambda x: module(x)
    return around


def detached() -> nn.Module:
    module = Scaled()
    module.reach = lambda: module.scale.detach()
    return module


def a_buffer() -> nn.Module:
    module = Scaled()
    module.register_buffer("size", torch.ones(1))
    module.reach = lambda: module.size
    return module


def an_attribute() -> nn.Module:
    module = Scaled()
    module.tables = {"a": [torch.ones(1)]}
    module.reach = lambda: module.tables["a"][0]
    return module


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (by_lambda, "'scale'"),
        (by_weak_reference, "'scale'"),
        (by_hook, "'scale'"),
        (wholly, "'inner.weight'"),
        (detached, "'scale'"),
        (a_buffer, "'size'"),
        (an_attribute, "\"tables['a'][0]\""),
    ],
)
def test_a_forward_that_reaches_past_the_copy(make: Any, name: str) -> None:
    refused(make(), f"uses {name} {PAST}", "as a method")


def test_a_loss_that_closes_over_the_module() -> None:
    module = nn.Linear(6, 1)
    refused(
        module,
        f"uses 'weight' {PAST}",
        loss=lambda output, label: squared_error(output, label) + 0.1 * module.weight.square().sum(),
    )


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


def test_a_tensor_that_changes_while_a_copy_runs() -> None:
    module = Scaled()
    numbers = module.scale.detach().numpy()

    def reach() -> torch.Tensor:
        numbers[:] += 1  # past torch
        return torch.ones(1)

    module.reach = reach
    refused(module, f"uses 'scale' {PAST}")


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


@pytest.mark.parametrize(
    ("make", "phrases"),
    [
        (transposed, ["'0.weight' and '1.weight' share memory", "transpose or slice it in forward"]),
        (overlapping, ["'a' and 'b' share memory"]),
        (a_detached_buffer, ["'inner.weight' and 'first' share memory", "keep a clone"]),
        (a_view, ["'inner.weight' and 'row' share memory"]),
        (expanded, ["'inner.weight' is expanded"]),
    ],
)
def test_tensors_that_share_memory(make: Any, phrases: list[str]) -> None:
    refused(make(), *phrases)


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
    refused(Grows(), "forward makes the submodule 'head'", "in __init__")
    refused(Replaces(), "forward replaces the parameter 'inner.weight'")


class Third(Around):
    """Counts each third call in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("thirds", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.training and self.calls % 3 == 0:
            self.thirds += x.sum()
        return self.inner(x)


def test_what_shows_only_after_some_steps() -> None:
    refused(Third(), "thirds")


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
        "the optimiser raised LookupError: no third step",
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


class Extra(Around):
    """Saves what is no tensor."""

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def hooked_state() -> nn.Module:
    module = Around()

    def drop(part: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.pop("inner.bias")

    module.register_state_dict_post_hook(drop)
    return module


def storing() -> nn.Module:
    module = Around()

    def store(part: nn.Module, given: Any, made: torch.Tensor) -> None:
        module.seen = made

    module.inner.register_forward_hook(store)
    return module


@pytest.mark.parametrize(
    ("make", "phrases"),
    [
        (lambda: nn.Linear(6, 1, device="meta"), ["weight is on meta, so it has no values"]),
        (lambda: Around().double(), ["inner.weight is torch.float64", "module.float()"]),
        (lambda: Around().bfloat16(), ["inner.weight is torch.bfloat16", "torch.autocast"]),
        (complex_one, ["parameter w is torch.complex64", "torch.view_as_complex"]),
        (kept_activation, ["'last' is a result of an earlier computation", "detach() it"]),
        (locked, ["'inner.lock' is a lock, which cannot be copied"]),
        (Extra, ["'_extra_state', a dict", "get_extra_state"]),
        (hooked_state, ["cannot load its own state_dict()"]),
        (lambda: torch.jit.script(nn.Linear(6, 1)), ["is a scripted module"]),
        (storing, ["set 'seen' of the module that was copied", "Register a method"]),
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
    refused(Two(), "data.features has 'bb'", "did you mean b?", data=rows(names="a bb"))
    refused(Several(), "forward takes *args", "forward(self, a, b)", data=rows(names="a b"))
    refused(Two(), "the feature 'self' cannot be an argument", data=rows(names="a self"))


def test_a_loss_that_cannot_be_copied() -> None:
    loss = functools.partial(_with_lock, threading.Lock())
    refused(nn.Linear(6, 1), "the loss cannot be copied to workers", loss=loss)


def _with_lock(lock: Any, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return squared_error(output, label)


# No trace


class Wild(Around):
    """Draws from all generators, and keeps a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = random.random() + np.random.rand()
        own = torch.rand(1, generator=self.chance)
        torch.set_num_threads(1)
        return self.inner(F.dropout(x, 0.1)) + 0 * (noise + own)


def test_the_caller_s_objects_are_as_they_were() -> None:
    module = Wild().eval()
    module.inner.train()
    module.inner.weight.grad = torch.ones(1, 6)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    records, schema = rows()
    data = records.copy()
    states = [torch.get_rng_state(), module.chance.get_state()]
    numbers, words, threads = np.random.get_state()[1].copy(), random.getstate(), torch.get_num_threads()
    tried(module, data=(records, schema))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert (module.training, module.inner.training) == (False, True)
    assert torch.equal(module.inner.weight.grad, torch.ones(1, 6))
    assert all(
        torch.equal(*two)
        for two in zip(states, [torch.get_rng_state(), module.chance.get_state()], strict=True)
    )
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert (random.getstate(), torch.get_num_threads()) == (words, threads)
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
