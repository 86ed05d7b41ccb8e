"""The modules that workers import with a plan are found in what is pickled.  Needs no JVM."""

from __future__ import annotations

import decimal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pyspark import cloudpickle
from torch import nn

from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.errors import ModelError
from sparksgd.spark.cluster.users_modules import refuse_not_imported, users_modules
from sparksgd.spark.tasks.import_tasks import NotImported, import_modules


@pytest.fixture
def nets(tmp_path, monkeypatch) -> ModuleType:
    """Return a module of a user's, which imports another one."""
    (tmp_path / "their_helper.py").write_text("def twice(x): return x + x\n")
    (tmp_path / "their_nets.py").write_text(
        "import their_helper\n"
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x): return their_helper.twice(super().forward(x))\n"
        "def plain(): return nn.Linear(2, 2)\n"
        "def loss(output, label): return output[:, 0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import their_nets

    yield their_nets
    for name in ("their_nets", "their_helper"):
        sys.modules.pop(name, None)


def test_what_all_executors_have_is_not_looked_for(nets):
    assert users_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.functional.mse_loss, decimal) == []
    assert users_modules(nets.plain()) == []  # what it made is torch's


def test_a_class_and_a_function_are_imported_by_name(nets):
    assert users_modules(nn.Sequential(nets.Net(2, 2))) == ["their_nets"]
    assert users_modules(nn.Linear(2, 2), partial(nets.loss, label=None)) == ["their_nets"]


def test_what_travels_by_value_is_not_imported_but_what_it_uses_is(nets):
    helper = sys.modules["their_helper"]

    class Net(nn.Linear):
        def forward(self, x):
            return helper.twice(x)

    assert users_modules(Net(2, 2)) == ["their_helper"]
    cloudpickle.register_pickle_by_value(nets)
    try:
        assert users_modules(nets.Net(2, 2)) == ["their_helper"]
    finally:
        cloudpickle.unregister_pickle_by_value(nets)


def test_names_that_workers_resolve_are_among_them():
    optimizer, schedule = OptimizerConfig(name="mine.steps:Step"), ScheduleConfig(name="shapes:Shape")
    assert users_modules(partial(print, optimizer=optimizer), schedule) == ["mine.steps", "shapes"]
    assert users_modules(OptimizerConfig(name="Adam"), ScheduleConfig()) == []


def test_the_bytes_of_parameters_are_not_copied(nets, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "numpy", None)  # by which their bytes are read
    assert users_modules(nets.Net(3, 3)) == ["their_nets"]


def test_what_cannot_be_pickled_is_left_to_the_trial():
    module = nn.Linear(2, 2)
    with Path(__file__).open() as module.file:
        assert users_modules(module) == []


def test_only_what_cannot_be_imported_is_told(nets, tmp_path):
    (tmp_path / "needs_more.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "raises.py").write_text("raise OSError('no such library')\n")
    modules = ["their_nets", "absent.nets", "needs_more", "raises"]
    absent, needs, raises = found = list(import_modules(modules, {}, iter(())))
    assert (absent.module, absent.missing) == ("absent.nets", "absent")
    assert (needs.module, needs.missing) == ("needs_more", "nowhere_to_be_found")
    assert (raises.module, raises.missing, raises.told) == ("raises", None, "OSError: no such library")
    assert {one.executable for one in found} == {sys.executable}


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("nets", r"Python on node1 \(/bin/python3\) finds no module 'nets': ship it with --py-files"),
        ("helper", r"on node1 \(/bin/python3\) finds no module 'helper', which nets imports: ship it with"),
        (None, r"importing nets raised OSError: no, in the executors' Python on node1 .*: find out what"),
    ],
)
def test_the_host_and_how_to_bring_it_are_told(missing, words):
    refuse_not_imported([])
    one = NotImported(
        host="node1",
        executable="/bin/python3",
        module="nets",
        missing=missing,
        told="OSError: no",
        is_other_code=False,
    )
    with pytest.raises(ModelError, match=words):
        refuse_not_imported([one])
