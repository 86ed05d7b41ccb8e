"""A process has the code that another one has, or says so: of other files, of what it imported before."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparksgd
from sparksgd.errors import ModelError
from sparksgd.imports.loaded_code import code_of_source, difference
from sparksgd.imports.same_code import (
    ImportedBefore,
    Pickled,
    having_code,
    needed_code,
    refuse_changed_files,
)
from sparksgd.imports.sources import source_of

SOURCE = '''
"""Nets."""
import functools
from helped_code import scaled

RATE = 0.5
_calls = 0

class Net:
    factor = 2
    made = 0

    def __init__(self):
        Net.made += 1

    def forward(self, x):
        inner = lambda y: y * 3
        return scaled(inner(x))

    @property
    def wide(self):
        return 4

    @functools.cached_property
    def kept(self):
        return 5

    @staticmethod
    def plain(x):
        return x + 6

    @classmethod
    def build(cls):
        return cls

@functools.lru_cache
def cached(x):
    return x * 7

def counting():
    global _calls
    _calls += 1

def wrapped(function):
    @functools.wraps(function)
    def outer(*given):
        return function(*given)
    return outer

@wrapped
def decorated(x):
    return x + 8
'''
HELPER = "def scaled(x):\n    return x * 2\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder on the path with two modules, of which one imports the other."""
    (tmp_path / "same_nets.py").write_text(SOURCE)
    (tmp_path / "helped_code.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files change faster than Python notices
    yield tmp_path
    sys.path[:] = [each for each in sys.path if not each.startswith(str(tmp_path))]
    forget()


def imported() -> types.ModuleType:
    return importlib.import_module("same_nets")


def edit(folder: Path, before: str, after: str, file: str = "same_nets.py") -> None:
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after))


def test_a_module_is_needed_with_what_it_imported_of_what_is_not_installed(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "far_code.py").write_text("FAR = 1\n")
    sys.path.insert(0, str(folder / "elsewhere"))
    edit(
        folder,
        "import functools",
        "import functools, torch, pytest, far_code\ndef late():\n    import same_late\n",
    )
    (folder / "same_late.py").write_text("LATE = 1\n")
    assert needed_code(["same_nets"]) == {}  # not imported yet
    module = imported()
    assert set(needed_code(["same_nets", "nowhere"])) == {"same_nets", "helped_code", "far_code"}
    module.late()
    assert set(needed_code(["same_nets"])) == {"same_nets", "helped_code", "far_code", "same_late"}
    assert needed_code(["json.decoder", "torch.nn", "sparksgd.errors"]) == {}


def test_a_package_without_init_is_needed_too(folder: Path) -> None:
    (folder / "deep_nets" / "inner").mkdir(parents=True)
    (folder / "deep_nets" / "__init__.py").write_text("")
    (folder / "deep_nets" / "inner" / "net.py").write_text("from . import parts\n")
    (folder / "deep_nets" / "inner" / "parts.py").write_text("PART = 1\n")
    importlib.import_module("deep_nets.inner.net")
    code = needed_code(["deep_nets.inner.net"])
    assert set(code) >= {"deep_nets", "deep_nets.inner.net", "deep_nets.inner.parts"}
    with having_code(code):
        pass


def test_a_module_that_puts_an_object_in_its_place_is_let_alone(folder: Path) -> None:
    (folder / "helped_code.py").write_text(
        f"import sys\n{HELPER}"
        "class Config:\n    scaled = staticmethod(scaled)\nsys.modules[__name__] = Config()\n"
    )
    imported()
    with having_code(needed_code(["same_nets"])):
        pass


@pytest.mark.filterwarnings("error")
def test_warnings_of_the_compiler_are_no_errors(folder: Path) -> None:
    edit(folder, "return 4", "return '\\d'")
    with pytest.warns(match="invalid escape"):
        imported()
    needed_code(["same_nets"])


def test_a_decorator_that_compiles_anew_is_let_alone_in_a_file_that_is_old(folder: Path) -> None:
    edit(
        folder,
        "@wrapped",
        "def anew(function):\n"
        "    code = compile('def decorated(x):\\n    return x', __file__, 'exec')\n"
        "    made = {}\n    exec(code, made)\n    return made['decorated']\n\n@anew",
    )
    os.utime(folder / "same_nets.py", (1e9, 1e9))
    imported()
    needed_code(["same_nets"])


CHANGES = {
    "a method": ("y * 3", "y * 4"),
    "a constant of a method": ("scaled(inner(x))", "scaled(inner(x), 1)"),
    "a property": ("return 4", "return 40"),
    "a property that is kept": ("return 5", "return 50"),
    "a static method": ("x + 6", "x - 6"),
    "a class method": ("return cls", "return cls()"),
    "a decorator": ("return function(*given)", "return function(*given, 1)"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_function_that_was_changed_after_its_import_is_refused(folder: Path, kind: str) -> None:
    module = imported()
    refuse_changed_files([module.Net], [])
    edit(folder, *CHANGES[kind])
    with pytest.raises(
        ModelError, match=r"same_nets\.py was changed after this process had imported same_nets"
    ):
        refuse_changed_files([module.Net], [])
    with pytest.raises(ModelError, match=r"importlib\.reload\(same_nets\)"):
        needed_code(["same_nets"])
    importlib.reload(module)
    refuse_changed_files([module.Net], ["same_nets:Net", "LeNet", None])
    assert set(needed_code(["same_nets"])) == {"same_nets", "helped_code"}


def test_what_the_module_imports_is_looked_at_too(folder: Path) -> None:
    module = imported()
    edit(folder, "x * 2", "x * 20", "helped_code.py")
    with pytest.raises(ModelError, match=r"helped_code\.py was changed after"):
        refuse_changed_files([], ["same_nets:Net"])
    with pytest.raises(ModelError, match=r"helped_code\.py was changed after"):
        refuse_changed_files([module.Net], [])


def test_a_file_that_no_longer_compiles_is_refused(folder: Path) -> None:
    imported()
    edit(folder, "return cls", "return cls(")
    with pytest.raises(ModelError, match="it cannot be compiled: SyntaxError"):
        needed_code(["same_nets"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""Nets."""', "# more\n# lines\n"),
        ("        return 4", "        # four\n        return 4"),
        ("_calls = 0", "_calls=0"),
    ],
)
def test_words_and_lines_are_no_change(folder: Path, before: str, after: str) -> None:
    imported()
    edit(folder, before, after)
    needed_code(["same_nets"])


def test_what_a_reload_left_of_the_file_of_before_is_no_change(folder: Path) -> None:
    module = imported()
    edit(folder, "def counting", "def counting_more")
    importlib.reload(module)
    assert hasattr(module, "counting")
    needed_code(["same_nets"])


def test_counters_and_what_others_put_in_a_module_are_no_change(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = imported()
    module.counting()
    module.Net()
    module.Net.build = classmethod(lambda cls: cls)
    module.cached = wrapped_elsewhere
    module.NEW = 3
    needed_code(["same_nets"])
    assert not caplog.messages


def wrapped_elsewhere(x: int) -> int:
    return x


@pytest.mark.parametrize(
    ("path", "told"),
    [("RATE", "RATE is 0.25 here, and 0.5 in the file"), ("Net.factor", "Net.factor is 0.25 here")],
)
def test_a_constant_that_was_set_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture, path: str, told: str
) -> None:
    *owner, name = path.split(".")
    setattr(getattr(imported(), *owner) if owner else imported(), name, 0.25)
    needed_code(["same_nets"])
    assert f"same_nets.{told}" in caplog.text
    assert "as it is written: write it into the file" in caplog.text
    caplog.clear()
    needed_code(["same_nets"])
    assert not caplog.messages  # once


@pytest.mark.parametrize("path", ["Net.forward", "Net"])
def test_what_main_put_in_the_place_of_the_modules_own_is_refused(folder: Path, path: str) -> None:
    *owner, name = path.split(".")
    mine = (
        types.FunctionType(wrapped_elsewhere.__code__, {}, "mine") if name != "Net" else type("Net", (), {})
    )
    mine.__module__ = "__main__"
    setattr(getattr(imported(), *owner) if owner else imported(), name, mine)
    with pytest.raises(ModelError, match=rf"same_nets\.{path} is \w+ of __main__, but workers import "):
        needed_code(["same_nets"])
    refuse_changed_files([], ["same_nets:Net"])  # in one process it is right


def test_who_has_other_files_is_refused_with_their_place(folder: Path) -> None:
    imported()
    code = needed_code(["same_nets"])
    there = folder / "there"
    there.mkdir()
    for name, text in (("same_nets", SOURCE), ("helped_code", HELPER.replace("2", "3"))):
        (there / f"{name}.py").write_text(text)
    told = run(there, code)
    assert "ModelError" in told
    assert f"helped_code is other code here ({there}/helped_code.py)" in told
    (there / "helped_code.py").write_text(HELPER)
    assert run(there, code) == "forward 12"


def test_a_zip_has_the_same_code(folder: Path) -> None:
    imported()
    code = needed_code(["same_nets"])
    with zipfile.ZipFile(folder / "nets.zip", "w") as archive:
        archive.write(folder / "same_nets.py", "same_nets.py")
        archive.writestr("helped_code.py", HELPER.replace("\n", "\r\n"))
    assert run(folder / "nets.zip", code) == "forward 12"


def run(path: Path, code: dict[str, str]) -> str:
    """Return what another process says, which loads a net."""
    data = Pickled(pickle.dumps(imported().Net()), code)
    script = "import pickle, sys; print('forward', pickle.load(sys.stdin.buffer).load().forward(2))"
    package = str(Path(sparksgd.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(data),
        env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{package}"},
        capture_output=True,
        check=False,
    )
    return (done.stdout or done.stderr).decode().strip()


CHANGES_OF_ALL = {
    "a function": ("y * 3", "y * 4"),
    "a decorator": ("return function(*given)", "return function(*given, 1)"),
}


@pytest.mark.parametrize("kind", CHANGES_OF_ALL)
def test_who_had_imported_the_file_of_before_is_refused(folder: Path, kind: str) -> None:
    imported()
    edit(folder, *CHANGES_OF_ALL[kind])
    was, helper = (sys.modules.pop(name) for name in ("same_nets", "helped_code"))
    now = Pickled(pickle.dumps(imported().Net()), needed_code(["same_nets"]))
    sys.modules |= {"same_nets": was, "helped_code": helper}
    words = r"same_nets\.py was changed after a Python worker had imported same_nets .*: start a new Spark"
    with pytest.raises(ModelError, match=words):
        now.load()


LINES = {
    "a constant": ("RATE = 0.5", "RATE = 1.5"),
    "a list": ("SIZES = [1, 2]", "SIZES = [1, 9]"),
    "a name": ("ACT = abs", "ACT = len"),
    "a base": ("class Base(Net)", "class Base(object)"),
    "a default": ("def counting()", "def counting(by=1)"),
    "a decorated function": ("x + 8", "x + 80"),
    "a cached function": ("x * 7", "x * 70"),
}


@pytest.fixture
def with_lines(folder: Path) -> Path:
    edit(folder, "_calls = 0", "_calls = 0\nSIZES = [1, 2]\nACT = abs\n")
    edit(folder, "@functools.lru_cache", "class Base(Net):\n    pass\n\n@functools.lru_cache")
    return folder


@pytest.mark.parametrize("kind", LINES)
def test_any_line_that_was_changed_since_the_first_look_is_refused(with_lines: Path, kind: str) -> None:
    module = imported()
    needed_code(["same_nets"])
    edit(with_lines, *LINES[kind])
    with pytest.raises(
        ModelError, match=r"same_nets\.py was changed after this process had imported same_nets"
    ):
        needed_code(["same_nets"])
    importlib.reload(module)
    needed_code(["same_nets"])


@pytest.mark.parametrize("kind", LINES)
def test_a_worker_that_had_the_code_of_before_is_refused(with_lines: Path, kind: str) -> None:
    was = Pickled(pickle.dumps(imported().Net()), needed_code(["same_nets"]))
    forget()
    was.load()
    worker, helper = (sys.modules.pop(name) for name in ("same_nets", "helped_code"))
    edit(with_lines, *LINES[kind])
    now = Pickled(pickle.dumps(imported().Net()), needed_code(["same_nets"]))
    sys.modules |= {"same_nets": worker, "helped_code": helper}
    with pytest.raises(ImportedBefore, match="after a Python worker had imported same_nets"):
        now.load()


def test_docstrings_and_versions_of_builds_are_no_change(folder: Path) -> None:
    edit(folder, "def wide(self):", 'def wide(self):\n        """Wide."""')
    edit(folder, "from helped_code", "from same_built import version\nfrom helped_code")
    (folder / "same_built").mkdir()
    (folder / "same_built" / "__init__.py").write_text("")
    (folder / "same_built" / "version.py").write_text("device = 'cpu'")
    imported()
    code = needed_code(["same_nets"])
    assert set(code) == {"same_nets", "helped_code", "same_built"}
    edit(folder, "Wide.", "How wide it is.")
    assert needed_code(["same_nets"]) == code
    with having_code(code):
        pass


def test_a_module_that_sets_its_own_names_is_let_alone(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder, "_calls = 0", "_calls = 0\nglobals().update({'RATE': 3})")
    imported()
    with having_code(needed_code(["same_nets"])):
        pass
    assert not caplog.messages


def test_bytecode_that_is_older_than_its_file_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    os.utime(folder / "same_nets.py", (1e9, 1e9))
    imported()
    edit(folder, "y * 3", "y * 4")
    os.utime(folder / "same_nets.py", (1e9, 1e9))  # Python believes the bytecode of before
    forget()
    code = {"same_nets": code_of_source((folder / "same_nets.py").read_text())}
    with pytest.raises(ModelError, match="remove the folder __pycache__"), having_code(code):
        imported()


def test_who_has_the_code_keeps_it_while_the_file_is_changed(folder: Path) -> None:
    shipped = Pickled(pickle.dumps(imported().Net()), needed_code(["same_nets"]))
    forget()
    first = shipped.load()
    edit(folder, "y * 3", "y * 4")
    assert type(shipped.load()) is type(first)
    forget()  # a worker that comes later
    with pytest.raises(ModelError, match="its file was changed while the run went on"):
        shipped.load()


def test_a_module_without_a_source_is_believed() -> None:
    with having_code({"nowhere_to_be_found": "0" * 64, "zlib": "0" * 64}):
        pass


def forget() -> None:
    for name in [each for each in sys.modules if each.startswith(("same_", "helped_", "far_", "deep_nets"))]:
        del sys.modules[name]


def test_modules_that_nobody_changed_are_as_their_sources_say() -> None:
    names = [name for name in sys.modules if name.partition(".")[0] in ("sparksgd", "torch", "numpy", "json")]
    looked = 0
    for name in sorted(names)[::7]:
        source = source_of(name)[1]
        if source is not None:
            looked += 1
            found = difference(sys.modules[name], source)
            assert found is None or found.kind == "set", (name, found)
    assert looked > 50
