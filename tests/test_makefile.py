"""On a machine that lacks something, make says in one line what to install."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKES_OWN = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")  # `make test` hands them down


def program(path: Path, says: str, status: int) -> Path:
    """Write a program that says something and ends."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {status}\n")
    path.chmod(0o755)
    return path


def made(folder: Path, *arguments: str, **environment: str) -> str:
    """Return what `make install` says where it must fail, in a folder with nothing but what it needs."""
    (folder / "conf").mkdir()
    for name in ("Makefile", "pyproject.toml", "conf/constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    inherited = {name: value for name, value in os.environ.items() if name not in MAKES_OWN}
    done = subprocess.run(
        ["make", "install", *arguments],
        cwd=folder,
        env=inherited | environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert not (folder / ".venv").exists()
    said, _, makes_own = done.stderr.partition("\n")
    assert makes_own.count("\n") == 1  # make: *** [Makefile: ...] Error 1
    return said


def test_a_python_that_is_too_old_is_named_with_what_to_install(tmp_path):
    old = program(tmp_path / "bin" / "python3", "Python 3.9.2", 1)
    said = made(tmp_path, f"PYTHON={old}")
    assert said.startswith(f"error: {old} is Python 3.9.2, but Python 3.11 or newer is needed: apt install")


@pytest.mark.parametrize(
    ("says", "found"),
    [('openjdk version "1.8.0_392"', "version 1"), ('openjdk version "11.0.2"', "version 11")],
)
def test_a_java_that_is_too_old_is_named_with_what_to_install(tmp_path, says, found):
    java = program(tmp_path / "bin" / "java", says, 0)
    said = made(tmp_path, JAVA_HOME=str(tmp_path))
    assert said.startswith(
        f"error: {java} is {found}, but Spark needs Java 17 or newer: apt install openjdk-17"
    )


def test_no_java_at_all_is_named_with_what_to_install(tmp_path):
    said = made(tmp_path, JAVA_HOME=str(tmp_path))
    assert said.startswith(f"error: {tmp_path}/bin/java is not there, but Spark needs Java 17 or newer: apt")
