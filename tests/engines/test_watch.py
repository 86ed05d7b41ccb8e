"""The watch sees tables, tensors of all kinds and torch's own modules, and puts them back as they were."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from keeping_nets import keeps_activation, net, sets, warns_once
from torch import nn
from two_workers import train_here

from sparksgd.engines.trial.ownership import Owned, left_alone, refuse_shared_memory
from sparksgd.engines.watch import Watch
from sparksgd.errors import ModelError, SparkSGDError
from sparksgd.models.losses import squared_error

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
