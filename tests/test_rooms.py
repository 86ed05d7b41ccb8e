"""The rooms of the house: who may import whom, and what each file may hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparksgd

PACKAGE = Path(sparksgd.__file__).parent
ROOT = Path(__file__).parents[1]

ROOMS = (
    "errors", "arithmetic", "imports", "storage", "config", "models", "data", "solvers", "engines",
    "peers", "training", "runs", "spark.tasks", "spark.cluster", "spark.engines", "spark", "ml", "cli", "",
)  # fmt: skip
"""In the order of imports: each imports only from itself and from those before it; the front door is last."""

KINDS = "a table of kinds, a class for each"

LONG_FILES: dict[str, str] = {
    "tests/contract/grammar.py": "one grammar: what it draws is read together",
    "tests/modules/carried_kinds.py": KINDS,
    "tests/modules/contract_changes.py": KINDS,
    "tests/modules/contract_kinds.py": KINDS,
}
"""Files of more than 500 lines in sparksgd/, jobs/ and tests/, each with its reason."""

DOORS = 16
"""Most folders and files directly below sparksgd/."""


def files() -> Iterator[Path]:
    """Yield every file of the package."""
    yield from sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    """Return the dotted name of a file, within the package."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(file) for file in files()}


def room_of(module: str) -> str:
    """Return the room of a module: the longest name of a room that it begins with."""
    rooms = [room for room in ROOMS if room and (module == room or module.startswith(f"{room}."))]
    return max(rooms, key=len, default="")


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield each module of ours that a file imports, and whether it does so as it is imported itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    at_once = {id(node) for node in walk_at_once(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparksgd":
            home = (node.module or "").removeprefix("sparksgd").lstrip(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".lstrip(".")
                yield (inner if inner in MODULES else home), id(node) in at_once
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("sparksgd."):
                    yield alias.name.removeprefix("sparksgd."), id(node) in at_once


def walk_at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported: none of functions, none for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from walk_at_once(node)


def test_imports_run_one_way_through_the_rooms():
    order = {room: number for number, room in enumerate(ROOMS)}
    climbs = [
        f"{module_of(file)} imports {imported}"
        for file in files()
        for imported, _ in imports(file)
        if order[room_of(imported)] > order[room_of(module_of(file))]
    ]
    assert climbs == []


def test_no_files_import_each_other_in_a_circle():
    arrows = {module_of(file): {name for name, at_once in imports(file) if at_once} for file in files()}
    left = dict(arrows)
    while True:
        free = {module for module, wanted in left.items() if not wanted & left.keys() - {module}}
        if not free:
            break
        left = {module: wanted for module, wanted in left.items() if module not in free}
    assert sorted(left) == []


def test_there_are_no_more_doors_than_one_takes_in_at_a_glance():
    doors = {
        path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed", "README.md")
    }
    assert len(doors) <= DOORS, sorted(doors)


def test_no_file_is_longer_than_500_lines_without_a_reason():
    long = {
        file.relative_to(ROOT).as_posix()
        for folder in ("sparksgd", "jobs", "tests")
        for file in (ROOT / folder).rglob("*.py")
        if len(file.read_text(encoding="utf-8").splitlines()) > 500
    }
    assert long - LONG_FILES.keys() == set(), "divide them, or give a reason"
    assert LONG_FILES.keys() - long == set(), "they need no reason any more"


@pytest.mark.parametrize("room", ["spark.tasks"])
def test_what_executors_import_pulls_in_nothing_of_the_driver(room):
    reached, waiting = set(), {module for module in MODULES if room_of(module) == room}
    arrows = {module_of(file): {name for name, at_once in imports(file) if at_once} for file in files()}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting |= arrows.get(module, set()) - reached
    driver = {"training.loop", "training.deals", "training.preflight", "runs.folder", "runs.earlier"}
    rooms = {"spark.cluster", "spark.engines", "cli"}
    assert not {module for module in reached if module in driver or room_of(module) in rooms}
