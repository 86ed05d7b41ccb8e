"""Workers compute by the code that the driver has: of its files, as they are when the run begins."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from spark_helpers import AtStep, configured, python_workers, undisturbed

from sparksgd.errors import ModelError
from sparksgd.spark.train import train

pytestmark = pytest.mark.session("local[2]")

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 10)

    def forward(self, x):
        return self.layer(x.flatten(1).float() / 255) * 1.0
"""
OTHER = CODE.replace("* 1.0", "* -3.0  # other code")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark) -> Iterator[Path]:
    """Return a folder on the path of the driver, and of workers of its own."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(spark.sparkContext.environment, "PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(spark.sparkContext.environment, "PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_net.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("edited_net", None)


def net() -> types.ModuleType:
    return importlib.import_module("edited_net")


def settings(engine: str, *more: str):
    return configured("model.name=edited_net:Net", "train.steps=4", f"engine.name={engine}", *more)


@pytest.mark.parametrize("engine", ["tree", pytest.param("allreduce", marks=pytest.mark.soak)])
def test_a_module_that_was_reloaded_is_reloaded_by_workers_that_had_imported_it(spark, small, folder, engine):
    config, found = settings(engine), []
    for code in (CODE, OTHER):
        (folder / "edited_net.py").write_text(code)
        importlib.reload(net())
        training = train(spark, config, spark.read.parquet(small))
        assert training.flat.parameters_sha256() == undisturbed(small, config)
        found.append(training.flat.parameters_sha256())
    assert len(set(found)) == 2


@pytest.mark.soak
def test_a_file_that_is_changed_while_the_run_goes_on_changes_no_bit_of_workers_that_have_it(
    spark, small, folder
):
    config = settings("tree")
    expected = undisturbed(small, config)
    edit = AtStep(2, lambda _: (folder / "edited_net.py").write_text(OTHER))
    training = train(spark, config, spark.read.parquet(small), observers=[edit])
    assert training.flat.parameters_sha256() == expected


def test_a_worker_that_comes_after_its_file_was_changed_ends_the_run(spark, small, folder):
    before = python_workers()

    def strike(_):
        (folder / "edited_net.py").write_text(OTHER)
        for worker in python_workers() - before:
            os.kill(worker, signal.SIGKILL)

    words = r"edited_net is other code here \(.*edited_net\.py\) than where the run was started: its file was"
    with pytest.raises(ModelError, match=words):
        train(spark, settings("tree"), spark.read.parquet(small), observers=[AtStep(2, strike)])


@pytest.mark.parametrize("engine", ["tree", pytest.param("server", marks=pytest.mark.soak)])
def test_executors_that_have_another_version_are_refused_before_rows_are_dealt(
    spark, small, folder, engine, monkeypatch
):
    here = folder / "here"
    here.mkdir()
    (here / "edited_net.py").write_text(OTHER)
    monkeypatch.syspath_prepend(here)
    rule = ["solver.name=async_sgd"] if engine == "server" else []
    with pytest.raises(ModelError, match=rf"on .*: edited_net is other code here \({folder}/edited_net"):
        train(spark, settings(engine, *rule), spark.read.parquet(small))
