"""The front door: what `import sparksgd` gives, and what `sparksgd.train` does and refuses without Spark."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import sparksgd
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ClusterError, ConfigError, DataError
from sparksgd.training.loop import train as train_in_loop

PACKAGE = Path(sparksgd.__file__).parent

# Sixty points of the plane in three classes: x = (i, 2i) / 60, y = i mod 3.
POINTS = {"x": [[i / 60, i / 30] for i in range(60)], "y": [i % 3 for i in range(60)]}


def tables(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a configuration of twelve inline steps on POINTS, with sections laid over it."""
    small: dict[str, dict[str, Any]] = {
        "data": {"features": "x", "label": "y"},
        "model": {"name": "torch.nn:Linear", "in_features": 2, "out_features": 3},
        "optimizer": {"lr": 0.1},
        "engine": {"name": "inline"},
        "train": {"epochs": 2, "rows_per_step": 10, "num_shards": 3},
    }
    return {name: small.get(name, {}) | sections.get(name, {}) for name in small.keys() | sections.keys()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "points.parquet"
    pq.write_table(pa.table(POINTS), file)
    return file


@pytest.fixture
def no_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every way into Spark fail."""

    def touched(*arguments: object, **named: object) -> None:
        raise AssertionError("Spark was touched")

    monkeypatch.setattr("sparksgd.spark.session.start_session", touched)
    monkeypatch.setattr("sparksgd.spark.train.train", touched)


def in_a_fresh_interpreter(program: str, blocked: set[str]) -> str:
    """Run a program where some packages are absent; return what it printed, whatever went wrong too."""
    absent = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run(
        [sys.executable, "-c", absent + program],
        env=environment | {"PYTHONPATH": str(PACKAGE.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.stdout


# What it offers


def test_it_opens_where_torch_and_spark_are_absent():
    program = """
import sparksgd
print(sparksgd.Config.from_dict({"train": {"epochs": 5}}).train.epochs, sparksgd.errors.ConfigError.exit_code)
print(set(sparksgd.__all__) <= set(dir(sparksgd)), callable(sparksgd.train))
try:
    sparksgd.train({"train": {"epoch": 5}}, "nowhere")
except sparksgd.SparkSGDError as error:
    print(error)
"""
    assert in_a_fresh_interpreter(program, {"torch", "pyspark", "py4j"}).splitlines() == [
        "5 2",
        "True True",
        "unknown key train.epoch (did you mean epochs?)",
    ]


def test_each_name_is_the_one_of_its_module_for_programs_and_for_type_checkers():
    offered = {
        name: getattr(importlib.import_module(home), name) for name, home in sparksgd._HOMES.items()
    } | {"errors": sparksgd.errors, "__version__": "0.1.0"}
    assert {name: getattr(sparksgd, name) for name in sparksgd.__all__} == offered

    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (for_types,) = (
        node.body
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    declared = {
        alias.name: node.module
        for node in for_types
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == sparksgd._HOMES | {"errors": "sparksgd"}


def test_a_name_that_it_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sparksgd' has no attribute 'fit'"):
        _ = sparksgd.fit
    with pytest.raises(ImportError):
        from sparksgd import fit  # noqa: F401  # it is not there


def test_the_signature_of_train_is_what_users_need_and_no_more():
    parameters = inspect.signature(sparksgd.train).parameters
    assert list(parameters) == [
        "config",
        "rows",
        "test",
        "module",
        "loss",
        "observers",
        "out",
        "replay",
        "resume_from",
        "checkpoint_dir",
    ]
    assert [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == [
        "module", "loss", "observers", "out", "replay", "resume_from", "checkpoint_dir"
    ]  # fmt: skip
    documented = sparksgd.train.__doc__ or ""
    assert all(f"        {name}: " in documented for name in parameters)


@pytest.mark.parametrize("name", ["library", "given_rows"])
def test_the_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"sparksgd.spark.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


# Training in this process


def test_a_path_is_trained_on_where_spark_is_absent_with_the_instruction_set_held(path):
    config = tables(train={"instruction_set": "default"})
    program = f"""
import sparksgd
training = sparksgd.train({config}, {str(path)!r}, {str(path)!r})
import torch
print(training.is_finished, training.version, len(training.evaluations), training.engine)
print(torch.backends.cpu.get_cpu_capability())
"""
    said = in_a_fresh_interpreter(program, {"pyspark", "py4j"})
    assert said.splitlines()[-2:] == ["True 12 2 inline", "DEFAULT"]


def test_dict_and_config_str_and_path_give_the_bits_of_the_loop(path):
    config = sparksgd.Config.from_dict(tables())
    loop = train_in_loop(config, rows=ParquetRows(str(path)), test=None, make_engine=InlineEngine)
    found = {
        sparksgd.train(given, rows).flat.parameters_sha256()
        for given, rows in ((tables(), str(path)), (config, path))
    }
    assert found == {loop.flat.parameters_sha256()}


def test_a_module_of_ones_own_is_trained_in_place_and_observed(path):
    class Steps(sparksgd.Observer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def stepped(self, training: Any, report: Any) -> None:
            self.seen.append(report.step)

    module, steps = torch.nn.Linear(2, 3), Steps()
    before = module.weight.detach().clone()
    training = sparksgd.train(tables(), path, module=module, observers=[steps])
    assert training.module is module
    assert not torch.equal(module.weight, before)
    assert steps.seen == list(range(1, 13))


def test_a_program_that_logs_sees_how_far_a_run_is_and_any_other_sees_nothing(path, caplog, capfd):
    with caplog.at_level(logging.INFO, "sparksgd"):
        training = sparksgd.train(tables(), path, path)
    digest, accuracy = training.flat.parameters_sha256(), training.evaluations[-1].accuracy
    said = [message for message in caplog.messages if not message.startswith(("trial", "train", "test"))]
    assert said[0] == "9 parameters, 60 rows in 3 shards, 12 turns of 10 rows (6 per epoch)"
    assert said[-2].startswith(f"epoch 2, step 12: test accuracy {accuracy:.4f}, loss ")
    assert said[-1] == f"finished: 12 steps, parameters {digest}"
    caplog.clear()
    sparksgd.train(tables(), path, path)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_out_leaves_a_run_that_can_be_loaded_and_repeated(path, tmp_path):
    training = sparksgd.train(tables(), path, path, out=tmp_path / "run")
    model = sparksgd.load_model(tmp_path / "run" / "model", trust=["torch.nn"])
    assert torch.equal(model.module.weight, training.module.weight)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["config"]["data"]["train"], about["config"]["data"]["test"]) == (str(path), str(path))
    assert about["fingerprints"].keys() == {"data.train", "data.test", "model.name"}

    replay = sparksgd.read_replay(tmp_path / "run", trust=["torch.nn"])
    again = sparksgd.train(tables(), path, replay=replay, out=str(tmp_path / "run"))  # takes its place
    assert again.flat.parameters_sha256() == training.flat.parameters_sha256()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["step"] * 12


def test_paths_of_the_configuration_that_are_not_used_are_told(path, caplog):
    config = tables(data={"train": "elsewhere", "test": "/test"}, train={"steps": 1})
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = sparksgd.train(config, path)
    assert training.evaluations == []
    assert (training.config.data.train, training.config.data.test) == (str(path), None)
    assert "data.train is elsewhere, but rows are given: they are used instead" in caplog.text
    assert "data.test is /test, but test is None: nothing is evaluated" in caplog.text


# Training on Spark: which session


def test_paths_for_spark_are_trained_on_in_the_session_that_is_active_or_started(path, tmp_path, monkeypatch):
    given: dict[str, Any] = {}

    def started(app_name: str, train: object) -> str:
        return f"the session of {app_name}"

    def trained(session: object, config: object, rows: object, test: object, **named: object) -> str:
        given.update(named, session=session, rows=rows, test=test)
        return "a run"

    monkeypatch.setattr("sparksgd.spark.session.start_session", started)
    monkeypatch.setattr("sparksgd.spark.train.train", trained)
    assert sparksgd.train(tables(engine={"name": "auto"}), path, str(path), out=tmp_path / "run") == "a run"
    folder, _ = given["observers"]
    assert (given["session"], given["rows"], given["test"], given["run_id"]) == (
        "the session of sparksgd", str(path), str(path), folder.run_id
    )  # fmt: skip


# Refusals: each before Spark is touched


class ConnectFrame:
    """Stands for a DataFrame of Spark Connect, whose own class wants grpc."""


ConnectFrame.__module__ = "pyspark.sql.connect.dataframe"
FRAME = pd.DataFrame({"x": [1.0], "y": [0]})
NEITHER = "but must be a Spark DataFrame, or the path of Parquet, as str or Path"


@pytest.mark.usefixtures("no_spark")
@pytest.mark.parametrize("argument", ["rows", "test"])
@pytest.mark.parametrize("engine", ["inline", "tree"])
@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (FRAME, ConfigError, f"{{}} is of type pandas.*, {NEITHER}: pass spark.createDataFrame\\({{}}\\)"),
        (pa.table(POINTS), ConfigError, f"{{}} is of type pyarrow.*, {NEITHER}: .*write_table\\({{}}, "),
        ([[0.5, 1.0]], ConfigError, f"{{}} is of type list, {NEITHER}"),
        (b"points", ConfigError, f"{{}} is of type bytes, {NEITHER}"),
        ("", ConfigError, "{} is '', but must name a file or folder of Parquet"),
        (" ", ConfigError, "{} is ' ', but must name a file or folder of Parquet"),
        ("/nowhere/at.parquet", DataError, "cannot read /nowhere/at.parquet as Parquet: no file is there"),
        (Path("/nowhere/at.parquet"), DataError, "cannot read /nowhere/at.parquet as Parquet"),
        (ConnectFrame(), ClusterError, "this session is Spark Connect, which has no RDDs"),
    ],
    ids=["pandas", "pyarrow", "list", "bytes", "empty", "blank", "missing", "missing Path", "Connect"],
)  # fmt: skip
def test_rows_that_cannot_be_read(path, argument, engine, value, kind, says):
    given = {"rows": path, "test": path} | {argument: value}
    with pytest.raises(kind, match=says.replace("{}", argument)):
        sparksgd.train(tables(engine={"name": engine}), **given)


@pytest.mark.usefixtures("no_spark")
def test_rows_that_are_none():
    with pytest.raises(ConfigError, match=f"rows is None, {NEITHER}: pass one of the two"):
        sparksgd.train(tables(engine={"name": "tree"}), None)


@pytest.mark.usefixtures("no_spark")
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"trian": {}}, r"unknown section \[trian\] \(did you mean train\?\)"),
        ({"train": {"epoch": 5}}, r"unknown key train.epoch \(did you mean epochs\?\)"),
        ({"train": {"epochs": "5"}}, "train.epochs is '5', but must be a whole number"),
        ({"engine": {"name": "treee"}}, "engine.name is 'treee', which is no engine"),
        ({"solver": {"name": "asgd"}}, "solver.name is 'asgd', which is no rule"),
        ({"solver": {"turns": 5}}, "solver.turns"),
        ({"optimizer": {"name": "SGDD"}}, "optimizer.name is 'SGDD'"),
        (
            "conf/mnist-lenet.toml",
            r"config is 'conf/mnist-lenet.toml', but must .*: Config.load\(path\) reads",
        ),
        (None, "config is None, but must be a sparksgd.Config or a dict"),
    ],
)
def test_configurations_that_cannot_be(path, config, says):
    with pytest.raises(ConfigError, match=says):
        sparksgd.train(config, path)


@pytest.mark.usefixtures("no_spark")
@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"module": torch.nn.Linear}, "module is <class .*Linear.*, but must be a torch.nn.Module: make one"),
        ({"module": "lenet"}, "module is 'lenet', but must be a torch.nn.Module"),
        ({"observers": sparksgd.Observer()}, "observers is of type .*Observer, but must be a list"),
        ({"observers": [print]}, "observers is of type list, but must be a list of instances"),
        (
            {"replay": "runs/lenet"},
            r"replay is 'runs/lenet', but must be what sparksgd.read_replay\(folder\)",
        ),
        ({"out": ""}, "out is '', but must name a folder"),
        ({"out": 5}, "out is 5, but must name a folder"),
        ({"out": "/proc/none/run"}, "^out is /proc/none/run, which cannot be written"),
    ],
)
def test_other_arguments_that_cannot_be(path, named, says):
    with pytest.raises(ConfigError, match=says):
        sparksgd.train(tables(engine={"name": "tree"}), path, **named)


def test_a_run_of_a_module_given_in_python_is_repeated_with_one(path, tmp_path):
    sparksgd.train(tables(), path, module=torch.nn.Linear(2, 3), out=tmp_path / "run")
    with pytest.raises(
        ConfigError, match="module is None, but the run to be replayed trained a module given"
    ):
        sparksgd.train(tables(), path, replay=sparksgd.read_replay(tmp_path / "run"))


def test_evaluate_refuses_what_is_no_model_and_what_are_no_rows(path):
    with pytest.raises(ConfigError, match=r"model is 'runs/model', but must be what sparksgd.load_model"):
        sparksgd.evaluate(path, "runs/model")
    with pytest.raises(ConfigError, match="rows is of type pandas"):
        sparksgd.evaluate(FRAME, "runs/model")


def test_a_session_of_spark_connect_is_refused(monkeypatch):
    from pyspark.sql import SparkSession

    monkeypatch.setattr(SparkSession, "getActiveSession", ConnectFrame)
    with pytest.raises(ClusterError, match="this session is Spark Connect"):
        sparksgd.start_session("tests", sparksgd.Config().train)
