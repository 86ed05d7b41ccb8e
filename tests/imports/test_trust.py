"""A file may name any code; what runs is ours, and that of packages that somebody trusts."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparksgd
from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import resolve
from sparksgd.imports import trust as trusting
from sparksgd.imports.trust import trusted

KEY = "model.name"


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusting, "_of_process", set())
    monkeypatch.delenv("SPARKSGD_TRUST", raising=False)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put packages on the path that leave a file when they are imported; return where they leave it."""
    left = tmp_path / "imported"
    leave = f"import pathlib; pathlib.Path({str(left)!r}).open('a').write(__name__ + ' ')\n"
    files = {
        "kind/__init__.py": leave,
        "kind/nets.py": leave + "class Net: pass\n",
        "kind/others/__init__.py": leave + "class Other: pass\n",
        "kind_evil.py": leave + "class Net: pass\n",
        "mine.py": leave
        + textwrap.dedent(
            """
            import functools
            from functools import partial
            from os import system
            from kind.nets import Net as Borrowed

            class Mine:
                def made(self): pass
                @classmethod
                def of(cls): pass

            class Callable:
                def __call__(self): pass

            @functools.lru_cache
            def cached(): pass

            own = partial(Mine)
            shell = partial(system, "true")
            shells = partial(partial(system), "true")
            instance = Callable()
            borrowed = Borrowed()
            bound = Mine().made
            lent = [].append
            number = 5
            lazily = None

            def __getattr__(name):
                if name == "lazy":
                    from os import system as found
                    return found
                raise AttributeError(name)
            """
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield left
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("kind", "kind_evil", "mine"):
            del sys.modules[name]


def found(name: str, *packages: str) -> Any:
    return resolve(KEY, name, {"lenet": "ours"}, trusted(packages, where="model.json"))


def imported(left: Path) -> str:
    return left.read_text() if left.exists() else ""


def test_ours_need_no_trust_and_what_the_user_wrote_is_not_asked() -> None:
    assert found("lenet") == "ours"
    assert resolve(KEY, "os:system", {}) is not None


@pytest.mark.parametrize(
    ("name", "packages_trusted"),
    [
        ("kind.nets:Net", ()),
        ("kind.nets:Net", ("kind.nets.deeper",)),
        ("kind.nets:Net", ("kin", "kind.net", "Kind", "kind_evil")),
        ("kind_evil:Net", ("kind",)),
        ("kind:Net", ("kind.nets",)),
        ("kind.others:Other", ("kind.nets",)),
    ],
)
def test_what_is_not_trusted_is_refused_before_anything_is_imported(
    packages: Path, name: str, packages_trusted: tuple[str, ...]
) -> None:
    with pytest.raises(DataError, match=r"is not trusted, and loading would run it"):
        found(name, *packages_trusted)
    assert imported(packages) == ""


@pytest.mark.parametrize(
    "name",
    [
        "lennet", "os", ":system", "os:", "os:path.join", "os:system:x", ".kind:Net", "kind.:Net",
        "kind..nets:Net", "kind/nets:Net", "kind nets:Net", "kind:", "",
    ],
)  # fmt: skip
def test_what_is_no_name_of_an_attribute_of_a_module_is_refused_before_anything_is_imported(
    packages: Path, name: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=r"must be one of ours, or like|is not one of ours"):
        found(name, "kind", "os")
    assert imported(packages) == ""


def test_a_package_is_trusted_with_all_that_is_in_it(packages: Path) -> None:
    assert found("kind.nets:Net", "kind").__name__ == "Net"
    assert found("kind.others:Other", "kind").__name__ == "Other"
    assert found("kind.nets:Net", "kind.nets").__name__ == "Net"
    assert imported(packages) == "kind kind.nets kind.others "


@pytest.mark.parametrize("name", ["Mine", "own", "instance", "bound", "cached"])
def test_what_a_trusted_module_defines_is_run(packages: Path, name: str) -> None:
    assert callable(found(f"mine:{name}", "mine"))


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("system", "posix"), ("shell", "posix"), ("shells", "posix"), ("lazy", "posix"),
        ("Borrowed", r"kind\.nets"), ("borrowed", r"kind\.nets"), ("partial", "functools"),
    ],
)  # fmt: skip
def test_what_a_trusted_module_only_imports_is_not_trusted(packages: Path, name: str, home: str) -> None:
    with pytest.raises(
        DataError, match=rf"model.name is 'mine:{name}', but that is code of {home}, which is not"
    ):
        found(f"mine:{name}", "mine")


@pytest.mark.parametrize("name", ["lent", "number", "functools"])
def test_what_is_of_no_module_is_not_trusted(packages: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"of no known module"):
        found(f"mine:{name}", "mine")


def test_what_is_borrowed_runs_if_both_are_trusted(packages: Path) -> None:
    assert found("mine:Borrowed", "mine", "kind").__name__ == "Net"


def test_the_process_and_the_environment_trust_as_well(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparksgd.trust("nobody", "kind.nets")
    assert found("kind.nets:Net").__name__ == "Net"
    with pytest.raises(DataError, match="not trusted"):
        found("mine:Mine")
    monkeypatch.setenv("SPARKSGD_TRUST", "others, mine")
    assert found("mine:Mine").__name__ == "Mine"


@pytest.mark.parametrize(
    "entry", ["", "*", "kind.*", ".kind", "kind.", "kind:Net", "kind,mine", "kind/nets", 5, None]
)
def test_what_is_no_name_of_a_package_is_not_trusted(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"a package to trust is .*, but must be the name of one package"):
        trusted([entry], where="model.json")
    with pytest.raises(ConfigError, match=r"an argument of sparksgd\.trust is"):
        sparksgd.trust("kind", entry)
    assert trusting._of_process == set()


@pytest.mark.parametrize("value", ["kind,,mine", "*", "kind,", "kind;mine", "kind mine"])
def test_a_variable_that_is_no_list_of_names_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKSGD_TRUST", value)
    with pytest.raises(ConfigError, match="a part of SPARKSGD_TRUST is"):
        trusted([], where="model.json")


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_trusts_nobody(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKSGD_TRUST", value)
    assert trusted([], where="model.json").packages == frozenset()


@pytest.mark.parametrize("given", ["kind", b"kind", 5, None, True])
def test_what_is_no_list_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"trust"):
        trusted(given, where="model.json")


def test_a_refusal_names_all_ways() -> None:
    with pytest.raises(DataError) as refused:
        found("kind.nets:Net")
    for way in (
        "model.json: model.name is 'kind.nets:Net'",
        "trust=['kind'] of load_model, read_replay or a Model's load",
        "--trust kind of jobs/evaluate.py, jobs/predict.py or jobs/train.py --replay",
        "sparksgd.trust('kind')", "SPARKSGD_TRUST=kind", "module=",
    ):  # fmt: skip
        assert way in str(refused.value)
