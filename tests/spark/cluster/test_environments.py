"""Executors whose Python cannot train are refused by name, with what brings what they lack; no JVM."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark import cloudpickle

import sparksgd
from sparksgd.errors import ConfigError, ModelError
from sparksgd.spark.cluster.environments import (
    NEEDED,
    ExecutorPython,
    by_value,
    cannot_start,
    missing_module,
    own_version,
    require_fit,
)
from sparksgd.spark.cluster.failures import final_error
from sparksgd.spark.tasks import environment_tasks

GOOD = ExecutorPython(
    host="host1", executable="/usr/bin/python3", missing=(), version="0.1.0", held=None,
    architecture="x86_64", cpuinfo="flags : fma avx2", unpacked=None,
)  # fmt: skip
SESSION = SimpleNamespace(applicationId="app-1", _jsc=object(), master="yarn")


def test_on_this_machine_the_first_advice_is_to_take_the_python_of_the_program() -> None:
    here = replace(GOOD, host=socket.gethostname(), missing=("torch",))
    with pytest.raises(ConfigError) as refused:
        require_fit([here], "0.1.0", None)
    first = f"lacks torch: set PYSPARK_PYTHON={sys.executable}, which runs this program, before its session"
    assert first in str(refused.value)
    assert "starts; or `make dist` builds" in str(refused.value)


@pytest.mark.parametrize(
    ("bad", "phrases"),
    [
        (
            {"missing": ("torch",)},
            [
                "on host2 (/usr/bin/python3) lacks torch: `make dist`",
                "--archives dist/environment.tar.gz#environment",
            ],
        ),
        ({"missing": NEEDED, "version": None}, ["lacks numpy and pandas and pyarrow and torch: "]),
        (
            {"missing": ("sparksgd",), "version": None},
            [
                "lacks sparksgd: `make dist` builds dist/sparksgd.zip: ",
                "--py-files dist/sparksgd.zip",
            ],
        ),
        (
            {"version": "0.0.9"},
            ["sparksgd is 0.0.9 for the executors' Python on host2", "0.1.0 at the driver"],
        ),
        ({"version": None}, ["sparksgd is damaged for the executors' Python on host2"]),
        ({"held": "avx512"}, ["spark.executorEnv.ATEN_CPU_CAPABILITY is 'avx512', but the CPU of host2"]),
    ],
    ids=["torch", "all", "sparksgd", "another version", "damaged", "held to too much"],
)
def test_what_an_executor_lacks_is_named_with_its_host_and_the_next_move(
    bad: dict[str, object], phrases: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        require_fit([GOOD, replace(GOOD, host="host2", **bad)], "0.1.0", None)
    for phrase in phrases:
        assert phrase in str(refused.value)


def test_an_instruction_set_is_refused_if_one_host_does_not_have_it() -> None:
    better = replace(GOOD, cpuinfo="flags : fma avx2 avx512f avx512bw avx512dq avx512vl")
    require_fit([better, better], "0.1.0", "avx512")
    require_fit([better, GOOD], "0.1.0", "avx2")
    with pytest.raises(
        ConfigError, match=r"train\.instruction_set is 'avx512', but the CPU of host2 .*'avx2'"
    ):
        require_fit([better, replace(GOOD, host="host2")], "0.1.0", "avx512")


def test_this_python_is_fit_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # or .venv would count as unpacked here
    (answer,) = environment_tasks.look(NEEDED, "ATEN_CPU_CAPABILITY", True, True, [3])
    assert answer["executable"] == sys.executable
    assert answer["unpacked"] is None
    require_fit([ExecutorPython(**answer)], own_version(), None)
    assert own_version() == sparksgd.__version__


def test_a_folder_of_a_modules_name_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onlyafolder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    (answer,) = environment_tasks.look(["onlyafolder", "json", "nowhere"], "X", False, False, [])
    assert answer["missing"] == ("onlyafolder", "nowhere")


@pytest.mark.parametrize("task", [environment_tasks.look, environment_tasks.survey])
def test_a_look_runs_where_sparksgd_and_all_that_it_needs_are_absent(task: Any, tmp_path: Path) -> None:
    more = [True, True] if task is environment_tasks.look else [("torch",)]
    (tmp_path / "task").write_bytes(cloudpickle.dumps(partial(by_value(task), NEEDED, "X", *more)))
    code = (
        "import pickle, sys\n"
        "sys.path.append(sys.argv[2])  # of cloudpickle alone\n"
        "look = pickle.load(open(sys.argv[1], 'rb'))\n"
        "sys.stdout.buffer.write(pickle.dumps(list(look([0]))))\n"
    )
    (tmp_path / "pyspark").mkdir()
    (tmp_path / "pyspark" / "__init__.py").write_text("")
    (tmp_path / "pyspark" / "cloudpickle").symlink_to(Path(cloudpickle.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "task"), str(tmp_path)],
        capture_output=True, check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    (answer,) = pickle.loads(done.stdout)
    if task is environment_tasks.survey:
        assert answer["versions"] == {"torch": None}
        assert answer["cpus"] >= 1
        assert all(free > 0 for free in answer["free_bytes"].values())
        answer = answer["python"]
    assert answer["missing"] == ("numpy", "pandas", "pyarrow", "torch", "sparksgd")
    assert answer["version"] is None


MISMATCH = (
    "Task 0 in stage 0.0 failed 4 times: Lost task 0.3 in stage 0.0 (TID 3) (host2 executor 1): "
    "org.apache.spark.api.python.PythonException: PySparkRuntimeError: [PYTHON_VERSION_MISMATCH] Python in "
    "worker has different version: 3.10 than that in driver: 3.11, PySpark cannot run with different minor "
    "versions."
)
EARLIER = "Python in worker has different version 3.10 than that in driver 3.11, PySpark cannot run with"
NO_PYTHON = (
    "Lost task 0.3 in stage 0.0 (TID 3) (host2 executor 1): java.io.IOException: Cannot run program "
    '"./environment/bin/python": error=2, No such file or directory\n'
    "\tat org.apache.spark.api.python.PythonWorkerFactory.startDaemon(PythonWorkerFactory.scala:240)"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            MISMATCH,
            "the executors' Python on host2 is 3.10, but the driver's is 3.11, and Spark needs the same",
        ),
        (EARLIER, "the executors' Python is 3.10, but the driver's is 3.11"),
        (
            NO_PYTHON,
            "there is no ./environment/bin/python on host2, which executors shall run as their Python",
        ),
    ],
    ids=["another version", "another version, in Spark 3.5", "none"],
)
def test_a_python_that_does_not_start_is_translated(text: str, words: str) -> None:
    told = final_error(Exception(text), SESSION)
    assert isinstance(told, ConfigError)
    assert words in str(told)
    assert "the executors' Python on host3, host4 is 3.10" in str(cannot_start(EARLIER, ["host3", "host4"]))
    assert cannot_start(NO_PYTHON.replace("error=2, No such file", "error=11, Try again")) is None


def test_a_missing_module_says_how_it_comes_along() -> None:
    told = final_error(Exception("ModuleNotFoundError: No module named 'torch.nn'"), SESSION)
    assert isinstance(told, ConfigError)
    assert "--archives dist/environment.tar.gz#environment" in str(told)
    assert "--py-files dist/sparksgd.zip" in str(missing_module("sparksgd.data"))
    mine = missing_module("mymodels.nets")
    assert isinstance(mine, ModelError)
    assert "finds no module 'mymodels.nets': ship it with --py-files" in str(mine)
    assert "compiled code runs from no zip: add it to the environment of --archives" in str(mine)
