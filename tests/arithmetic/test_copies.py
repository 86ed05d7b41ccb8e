"""A copy of a module is the module: same outputs, same gradients, same hooks, no tensor in common."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import types
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyspark import cloudpickle
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from two_workers import by_plain_torch, train_here

from sparksgd.arithmetic.copies import _Copier, copied, pickled
from sparksgd.errors import ModelError

WAYS: dict[str, Callable[[Any], Any]] = {
    "copied": copied,
    "pickled": lambda value: pickle.loads(pickled(value, {"": value}, cloudpickle.Pickler)),
}


def hook(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 2


def after(parameter: torch.Tensor) -> None:
    parameter.grad.clamp_(-0.1, 0.1)


def double(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


class Kind(nn.Parameter):
    """A parameter of a class of its own."""


def hooked() -> nn.Module:
    module = nn.Linear(4, 3)
    module.weight.register_hook(hook)
    module.bias.register_post_accumulate_grad_hook(after)
    module.register_forward_hook(double)
    return module


def of_a_kind() -> nn.Module:
    module = nn.Linear(4, 3)
    module.weight = Kind(module.weight.detach())
    module.weight.mask = torch.ones(3, 4)
    module.bias.requires_grad_(False)
    return module


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    return module


class Knots(nn.Module):
    """Refers to itself by a bound method, and by a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.linear.forward = types.MethodType(reversed_linear, self.linear)
        self.itself = weakref.ref(self)
        self.table = torch.arange(4.0)
        self.end_of_table = self.table[1:]
        self.last = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.itself().linear(x) + self.end_of_table
        return self.last


def reversed_linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return -(x @ self.weight.T)


class LowRank(nn.Module):
    """A parametrization of one's own, which a hook of the module follows."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.tril(weight)


def parametrized_twice() -> nn.Module:
    module = parametrizations.weight_norm(nn.Linear(4, 3))
    parametrize.register_parametrization(module, "weight", LowRank())
    parametrize.register_parametrization(module, "bias", nn.Tanh())
    module.register_forward_hook(double)
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "hooks": hooked,
    "a class and attributes of a parameter": of_a_kind,
    "tied": tied,
    "knots": Knots,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "several parametrizations": parametrized_twice,
    "old weight norm": lambda: weight_norm(nn.Linear(4, 3)),
    "old spectral norm": lambda: spectral_norm(nn.Linear(4, 3)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
    "pruned twice": lambda: prune.random_unstructured(
        prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.3), "weight", 0.3
    ),
    "convolution, channels last": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2).to(memory_format=torch.channels_last)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "lstm": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LSTM(2, 3, batch_first=True)),
}


def ran(module: nn.Module) -> tuple[list[torch.Tensor | None], ...]:
    """Return a module's output and gradients."""
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    for parameter in module.parameters():
        parameter.grad = None
    output = module(x)
    output = output[0] if isinstance(output, tuple) else output
    output.square().sum().backward()
    return [output.detach()], [parameter.grad for parameter in module.parameters()]


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_computes_the_same_with_tensors_of_its_own(name: str, way: str) -> None:
    torch.manual_seed(1)
    module = MODULES[name]()
    ran(module)  # activations may be kept from an earlier forward
    other = WAYS[way](module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    found = ran(other)
    module.load_state_dict(state)
    for values, expected in zip(found, ran(module), strict=True):
        for one, its in zip(values, expected, strict=True):
            assert (one is None) == (its is None)
            assert one is None or torch.equal(one, its)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert [type(one) for one in other.parameters()] == [type(one) for one in module.parameters()]
    assert [one.requires_grad for one in other.parameters()] == [
        one.requires_grad for one in module.parameters()
    ]
    assert type(other).__name__ == type(module).__name__
    places = [{t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (module, other)]
    assert not places[0] & places[1]


@pytest.mark.parametrize("way", WAYS)
def test_what_shares_tensors_still_does(way: str) -> None:
    other = WAYS[way](tied())
    assert other[0].weight is other[1].weight
    knots = WAYS[way](Knots())
    assert knots.itself() is knots
    assert knots.linear.forward.__self__ is knots.linear
    assert knots.end_of_table.data_ptr() == knots.table.data_ptr() + 4
    with_mask = WAYS[way](of_a_kind())
    assert with_mask.weight.mask.tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_of_a_copy_can_be_removed_and_a_new_one_takes_no_place(way: str) -> None:
    module = hooked()
    module.handle = module.weight.register_hook(hook)
    other = WAYS[way](module)
    new = other.weight.register_hook(hook)
    assert len(other.weight._backward_hooks) == 3
    new.remove()
    other.handle.remove()
    assert (len(other.weight._backward_hooks), len(module.weight._backward_hooks)) == (1, 2)


def test_a_parametrization_can_be_removed_from_a_copy_alone() -> None:
    module = parametrizations.weight_norm(nn.Linear(4, 3))
    other = copied(module)
    parametrize.remove_parametrizations(other, "weight")
    assert parametrize.is_parametrized(module)
    assert module.weight.shape == (3, 4)
    assert type(other) is nn.Linear


def test_an_activation_of_an_earlier_forward_is_copied_without_its_graph() -> None:
    module = Knots()
    ran(module)
    assert module.last.requires_grad
    other = copied(module)
    assert not other.last.requires_grad
    assert torch.equal(other.last, module.last)


def test_a_closure_refers_to_the_copy_and_a_loss_to_the_copied_module() -> None:
    module = nn.Linear(4, 3)
    module.act = lambda x: x @ module.weight.T

    def loss(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return output.sum(1) + module.weight.square().sum()

    other, its_loss = copied((module, loss), {"": module, "loss": loss})
    other.act(torch.ones(2, 4)).sum().backward()
    assert other.weight.grad is not None
    assert module.weight.grad is None
    other.weight.data.zero_()
    assert its_loss(torch.zeros(2, 3), None).tolist() == [0.0, 0.0]


WORDS = [f"word {number}" for number in range(1000)]
TABLES: dict[str, Any] = {
    "list": WORDS,
    "dictionary": {word: number for number, word in enumerate(WORDS)},
    "pairs": {(word, 0.5): (None, b"x") for word in WORDS},
    "set": set(WORDS),
    "queue": deque(WORDS, maxlen=2000),
    "ordered": OrderedDict((word, True) for word in reversed(WORDS)),
    "counter": Counter(WORDS),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_long_table_is_copied_without_a_question_for_each_entry(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(2, 2)
    module.table = module.same = TABLES[name]
    asked = Asked()
    monkeypatch.setattr(_Copier, "persistent_id", asked)
    made: Any = copied(module)
    assert asked.times < 500
    assert (type(made.table), made.table) == (type(TABLES[name]), TABLES[name])
    assert list(made.table) == list(TABLES[name])
    assert made.table is made.same is not TABLES[name]
    assert getattr(made.table, "maxlen", None) == getattr(TABLES[name], "maxlen", None)


class Asked:
    """Counts how often it is called in place of `_Copier.persistent_id`."""

    def __init__(self) -> None:
        self.times, self.answer = 0, _Copier.persistent_id

    def __get__(self, copier: _Copier, kind: type) -> Any:
        def ask(value: Any) -> Any:
            self.times += 1
            return self.answer(copier, value)

        return ask


def test_a_long_table_that_holds_what_must_be_copied_is_copied_whole() -> None:
    module = nn.Linear(2, 2)
    module.table = [*WORDS, module.weight, [1]]
    made: Any = copied(module)
    assert made.table[-2] is made.weight is not module.weight
    assert made.table[-1] == [1]
    made.table[-1].append(2)
    assert module.table[-1] == [1]


def test_generators_and_sparse_and_bfloat16_tensors_are_copied() -> None:
    module = nn.Linear(4, 3).to(torch.bfloat16)
    module.noise = torch.Generator().manual_seed(3)
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("rows", torch.eye(3).to_sparse_csr())
    module.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
    for copy_of in WAYS.values():
        other = copy_of(module)
        assert torch.rand(1, generator=other.noise) == torch.rand(1, generator=copy_of(module).noise)
        assert other.weight.dtype is torch.bfloat16
        assert torch.equal(other.sparse.to_dense(), torch.eye(3))
        assert torch.equal(other.rows.to_dense(), torch.eye(3))
        assert other.conjugate.tolist() == [1 - 2j]


# Refused


class Holding(nn.Module):
    """Holds something in a layer of a layer."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 1), nn.Sequential(nn.ReLU()))
        self.encoder[1][0].held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def closes_over(held: object) -> Callable[[], object]:
    return lambda: held


def numbers() -> Iterator[int]:
    yield 1


def with_view() -> nn.Module:
    module = nn.Linear(4, 1)
    module.turned = module.weight.t()
    return module


def with_graph() -> nn.Module:
    module = nn.Linear(4, 1)
    module.doubled = module.weight * 2
    return module


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a lock": (
        lambda: Holding(threading.Lock()),
        "encoder.1.0.held is a _thread.lock, which cannot be copied",
    ),
    "a lock in a dictionary": (
        lambda: Holding({"a": [threading.Lock()]}),
        "encoder.1.0.held['a'][0] is a _thread.lock, which cannot be copied to workers (TypeError: cannot "
        "pickle '_thread.lock' object): make it in forward, or leave it out in __getstate__",
    ),
    "a lock in a closure": (
        lambda: Holding(closes_over(threading.Lock())),
        "encoder.1.0.held's variable held is a _thread.lock, which cannot be copied",
    ),
    "a file": (lambda: Holding(Path(__file__).open()), "encoder.1.0.held is a _io.TextIOWrapper"),  # noqa: SIM115  # nobody reads it
    "a generator": (lambda: Holding(numbers()), "encoder.1.0.held is a generator, which cannot be copied"),
    "a scripted module": (
        lambda: Holding(torch.jit.script(nn.Linear(2, 2))),
        "encoder.1.0.held is scripted by torch.jit, and cannot be copied to workers: give the module",
    ),
    "all of it scripted": (lambda: torch.jit.script(nn.Linear(4, 1)), "the module is scripted by torch.jit"),
    "a view of a weight": (
        with_view,
        "turned is a torch.Tensor, which cannot be copied to workers (TypeError: it is a view of a parameter",
    ),
    "a result that keeps its graph": (
        with_graph,
        "doubled is, or holds, a tensor that was computed, with its graph, before the training",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_copied_is_refused_with_its_path_and_the_module_is_as_before(
    tmp_path: Path, kind: str
) -> None:
    make, message = REFUSED[kind]
    module = make()
    places = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(ModelError) as refused:
        train_here(tmp_path, module=module)
    assert str(refused.value).startswith(message)
    assert [parameter.data_ptr() for parameter in module.parameters()] == places
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_getstate_leaves_out_is_not_copied(tmp_path: Path) -> None:
    class Careful(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.lock = threading.Lock()

        def __getstate__(self) -> dict[str, Any]:
            return {name: value for name, value in self.__dict__.items() if name != "lock"}

    module = Careful()
    train_here(tmp_path, module=module)
    assert module.lock is not None


# Trained


def masked() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    with torch.no_grad():
        module.weight.mul_(mask)
    module.weight.mask = mask
    module.weight.register_hook(lambda gradient: gradient * mask)
    return module


def test_a_hook_on_a_parameter_masks_its_gradient_on_every_worker(tmp_path: Path) -> None:
    one, two = (train_here(tmp_path, workers, module=masked()) for workers in (1, 2))
    assert one.flat.parameters_sha256() == two.flat.parameters_sha256()
    assert one.module.weight[0, [1, 3]].tolist() == [0.0, 0.0]
    assert all(one.module.weight[0, [0, 2]] != masked().weight[0, [0, 2]])
    assert one.module.weight.mask is not None


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", ["weight norm", "old weight norm", "pruned", "orthogonal", "knots"])
def test_parametrized_and_pruned_modules_train_as_in_plain_torch(tmp_path: Path, name: str) -> None:
    def made() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(MODULES[name](), nn.Tanh(), nn.Linear(3, 1))

    plain = by_plain_torch(tmp_path, made(), 4)
    one, two = (
        train_here(tmp_path, workers, module=made(), train={"rows_per_step": 48, "epochs": 4})
        for workers in (1, 2)
    )
    assert one.flat.parameters_sha256() == two.flat.parameters_sha256()
    assert one.flat.parameters.tolist() == pytest.approx(plain, rel=1e-4, abs=1e-5)


def test_deepcopy_would_lose_the_hook() -> None:
    assert copy.deepcopy(masked()).weight._backward_hooks is None


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_draws_from_the_global_generators(way: str, draw: Any) -> None:
    module = nn.Identity()
    module.draw = draw
    assert WAYS[way](module).draw.__self__ is draw.__self__


class Words:
    """Gives pickle a new list each time, which nothing else keeps."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __reduce__(self) -> tuple[Any, ...]:
        return Words, (list(self.words),)


@torch.jit.script
def scripted_at_once(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def to_be_scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize("way", WAYS)
def test_scripted_functions_are_found_or_scripted_again(way: str) -> None:
    module = nn.Linear(4, 3)
    module.act, module.twice = scripted_at_once, torch.jit.script(to_be_scripted)
    copy_of_it = WAYS[way](module)
    x = torch.arange(3.0)
    assert copy_of_it.act is scripted_at_once
    assert torch.equal(copy_of_it.twice(x), 2 * x)
    assert isinstance(copy_of_it.twice, torch.jit.ScriptFunction)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.trace(to_be_scripted, torch.ones(2)),
        lambda: torch.jit.CompilationUnit("def f(x):\n    return x * 2\n").f,
    ],
)
def test_those_without_a_name_stay_in_their_process(make: Callable[[], Any]) -> None:
    module = nn.Linear(4, 3)
    module.act = make()
    assert copied(module).act is module.act
    with pytest.raises(ModelError, match=r"^act was traced by torch\.jit, or scripted where no name leads"):
        WAYS["pickled"](module)


def test_tables_that_are_made_for_pickle_are_told_apart() -> None:
    module = nn.Identity()
    module.bags = [Words([f"{bag} {number}" for number in range(150)]) for bag in range(20)]
    assert [bag.words[0] for bag in copied(module).bags] == [f"{bag} 0" for bag in range(20)]


@pytest.mark.parametrize("way", WAYS)
def test_limits_of_types_and_read_only_tables_are_copied(way: str) -> None:
    module = nn.Identity()
    module.least, module.table = torch.finfo(torch.float32), types.MappingProxyType({"a": 1})
    made = WAYS[way](module)
    assert (made.least.min, dict(made.table)) == (module.least.min, {"a": 1})
