"""Modules of a zip get their bytecode into it, once, and are imported from that; failures say what to do."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparksgd.spark import warm_up
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


def test_a_python_of_another_version_passes_it_over(tmp_path: Path) -> None:
    path, other = zipped(tmp_path / "shop.zip"), tmp_path / "other.zip"
    add_bytecode(path)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(other, "w") as theirs:
        for name in ours.namelist():
            content = ours.read(name)
            theirs.writestr(name, b"\0\0\r\n" + content[4:] if name.endswith(".pyc") else content)
    assert imported(other) == f"7 {other}/shop/till.py"


def test_what_cannot_be_written_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warm_up, "_find_spark_home", lambda: str(tmp_path / "no Spark"))
    assert warm_up.main([str(tmp_path / "dist" / "spark.jsa")]) == 4
    warning, *_, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: PySpark's bytecode cannot be kept: ")
    assert error.startswith(f"error: {tmp_path}/dist/spark.jsa was not written. Spark does without: ")
    assert list((tmp_path / "dist").iterdir()) == []
