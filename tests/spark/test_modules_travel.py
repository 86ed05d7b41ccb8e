"""Modules of a notebook, with hooks, parametrizations and pruning, train on executors as in one process."""

from __future__ import annotations

import threading

import pytest
import torch
from spark_helpers import configured
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ModelError
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

pytestmark = pytest.mark.session("local[2]")


def in_a_notebook() -> nn.Module:
    """Return a module whose classes and functions no executor can import."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.act = lambda x: torch.tanh(x) * self.scale
            self.last = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.act(x)
            return self.last

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = parametrizations.weight_norm(nn.Linear(16, 12))
            self.pruned = prune.l1_unstructured(nn.Linear(12, 12), "weight", 0.5)
            self.hooked = nn.Linear(12, 4)
            mask = (torch.arange(48).view(4, 12) % 2).float()
            self.hooked.weight.register_hook(lambda gradient: gradient * mask)
            self.hooked.weight.mask = mask
            self.scaled = Scaled()

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.normed(features.float() / 255))
            return self.scaled(self.hooked(torch.relu(self.pruned(hidden)) * self.hooked.weight.mask.mean()))

    torch.manual_seed(0)
    return Net()


def test_a_notebook_s_module_trains_on_executors_as_in_one_process(spark, small):
    config = configured("train.steps=6", "train.epochs=9", "engine.name=tree")
    module = in_a_notebook()
    first = module.hooked.weight.detach().clone()
    there = train(spark, config, small, module=module)
    here = train_inline(
        config, rows=ParquetRows(small), test=None, make_engine=InlineEngine, module=in_a_notebook()
    )
    assert there.flat.parameters_sha256() == here.flat.parameters_sha256()
    moved = module.hooked.weight != first
    assert torch.equal(moved.any(0), torch.arange(12) % 2 == 1)
    assert module.scaled.scale.tolist() != [1.0] * 4


def test_what_cannot_travel_is_refused_before_a_row_is_dealt(spark, small):
    lock = threading.Lock()
    module = in_a_notebook()
    module.scaled.act = lambda x: x * bool(lock)
    with pytest.raises(ModelError, match=r"^scaled\.act's variable lock is a _thread\.lock, which cannot be"):
        train(spark, configured("engine.name=tree"), small, module=module)
