"""Modules of a zip get their bytecode into it, once, and are imported from that."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from sparksgd.spark.warm_up import add_bytecode

SOURCES = {
    "shop/__init__.py": "",
    "shop/till.py": "def price():\n    return 7\n",
    "shop/tests/test_till.py": "assert False",
    "shop/py.typed": "",
}


def zipped(path: Path) -> Path:
    """Write a zip of a package."""
    with zipfile.ZipFile(path, "w") as made:
        for name, source in SOURCES.items():
            made.writestr(name, source)
    return path


def names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as opened:
        return sorted(opened.namelist())


def imported(path: Path) -> str:
    """Return what a fresh interpreter says of the module, and where it found it."""
    program = "import shop.till; print(shop.till.price(), shop.till.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_modules_are_imported_from_bytecode(tmp_path: Path) -> None:
    path = zipped(tmp_path / "shop.zip")
    assert imported(path) == f"7 {path}/shop/till.py"
    add_bytecode(path)
    assert names(path) == sorted([*SOURCES, "shop/__init__.pyc", "shop/till.pyc"])
    assert imported(path) == f"7 {path}/shop/till.pyc"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_time_there_is_nothing_to_do(tmp_path: Path) -> None:
    path = zipped(tmp_path / "shop.zip")
    add_bytecode(path)
    before = path.stat()
    add_bytecode(path)
    assert path.stat() == before


def test_bytecode_of_another_python_is_passed_over(tmp_path: Path) -> None:
    path = zipped(tmp_path / "shop.zip")
    with zipfile.ZipFile(path, "a") as opened:
        opened.writestr("shop/till.pyc", b"\0" * 32)
    assert imported(path) == f"7 {path}/shop/till.py"
