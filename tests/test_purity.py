"""Inner modules need no Spark, the innermost no torch; and each module keeps to its own trade."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sparksgd

PACKAGE = Path(sparksgd.__file__).parent

MODULES = sorted(
    ".".join(("sparksgd", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)

RING_0 = [
    f"sparksgd.{name}"
    for name in (
        "errors",
        "arithmetic.seeds",
        "config",
        "imports",
        "arithmetic.instruction_set",
        "cli.packing",
    )
]

# Executors import the *_tasks modules before they know of Spark.
SPARK = [
    name
    for name in MODULES
    if name.startswith(("sparksgd.spark.", "sparksgd.ml")) and not name.startswith("sparksgd.spark.tasks")
]
PURE = [name for name in MODULES if name not in SPARK]

BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in {modules}:
    __import__(name)
"""


def import_without(blocked: set[str], modules: list[str]) -> str:
    """Import modules in a fresh interpreter in which others are absent, and return what went wrong."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked, modules=modules)],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


def syntax(name: str) -> ast.Module:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def pure_modules() -> list[ModuleType]:
    return [importlib.import_module(name) for name in PURE]


def test_the_blocker_blocks() -> None:
    assert "No module named 'pyspark'" in import_without({"pyspark"}, ["sparksgd.spark.session"])


def test_inner_modules_import_where_spark_is_absent() -> None:
    assert {"sparksgd.training.loop", "sparksgd.engines.inline", "sparksgd.engines.compute"} <= set(PURE)
    assert import_without({"pyspark", "py4j"}, PURE) == ""


def test_the_innermost_modules_import_where_torch_is_absent_too() -> None:
    assert import_without({"pyspark", "py4j", "torch"}, RING_0) == ""


def test_the_wire_and_what_executors_run_on_rows_import_where_torch_is_absent_too() -> None:
    modules = ["sparksgd.peers.wire", "sparksgd.peers.mesh", "sparksgd.spark.tasks.row_tasks"]
    assert import_without({"pyspark", "py4j", "torch"}, modules) == ""


def test_only_the_modules_of_spark_s_room_may_ask_for_spark() -> None:
    tasks = [f"sparksgd.spark.tasks.{name}_tasks" for name in ("predict", "row", "score", "server", "step")]
    allowed = [*SPARK, *tasks]
    for name in set(MODULES) - set(allowed):
        found = [module for module in imported(syntax(name)) if module.split(".")[0] in ("pyspark", "py4j")]
        assert (name, found) == (name, [])


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("sparksgd.solvers")])
def test_a_solver_has_no_clock_no_files_no_threads_and_no_chance(name: str) -> None:
    forbidden = {
        "time",
        "datetime",
        "os",
        "threading",
        "random",
        "secrets",
        "socket",
        "pathlib",
        "subprocess",
    }
    tree = syntax(name)
    assert forbidden.isdisjoint(module.split(".")[0] for module in imported(tree))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {
        call for call in called if "random" in call or "rand" in call.split(".")[-1] or call == "open"
    }


def test_forward_is_the_only_caller_of_backward() -> None:
    def callers(attribute: str) -> set[str]:
        return {
            name
            for name in MODULES
            for node in ast.walk(syntax(name))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == attribute
        }

    trial = "sparksgd.cli.packing_trial"  # of torch by itself: what it runs in has no sparksgd
    assert callers("backward") == {"sparksgd.engines.forward", trial}
    assert callers("step") >= {"sparksgd.solvers.synchronous"}  # the search does find calls


def test_every_module_lists_what_it_offers(pure_modules: list[ModuleType]) -> None:
    for module in pure_modules:
        offered = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == module.__name__
        }
        listed = getattr(module, "__all__", None)
        if listed is None:
            assert (module.__name__, offered) == (module.__name__, set())
            continue
        assert (module.__name__, offered - set(listed)) == (module.__name__, set())
        assert (module.__name__, [name for name in listed if not hasattr(module, name)]) == (
            module.__name__,
            [],
        )
        assert len(listed) == len(set(listed))


def test_the_examples_in_docstrings_run(pure_modules: list[ModuleType]) -> None:
    results = [doctest.testmod(module) for module in pure_modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 5
