"""A name in a configuration is one of ours, or the user's own by import path, or a clear refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, resolve

OURS = {"lenet": 1, "linear": 2}


def test_a_plain_name_is_one_of_ours_and_a_path_the_user_s() -> None:
    assert resolve("model.name", "linear", OURS) == 2
    assert resolve("model.name", "math:tau", OURS) == pytest.approx(6.283185307179586)


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("lenett", ["model.name is 'lenett'", "did you mean lenet?", "package.module:attribute"]),
        ("zzz", ["model.name is 'zzz'", "valid: lenet, linear"]),
        ("nowhere.nets:Net", ["Python finds no module 'nowhere'", "PYTHONPATH", "--py-files"]),
        ("math:tow", ["math has no 'tow'", "did you mean pow?"]),
    ],
)
def test_a_name_that_leads_nowhere_says_where_to_look(name: str, phrases: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve("model.name", name, OURS)
    for phrase in phrases:
        assert phrase in str(refused.value)


def test_the_nearest_word_is_named_or_else_all_of_them() -> None:
    assert did_you_mean("epoch", ["epochs", "seed"]) == " (did you mean epochs?)"
    assert did_you_mean("xyz", ["seed", "epochs"]) == " (valid: epochs, seed)"


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        ('ModuleNotFoundError("No module", name="cupy")', "but Python finds no module 'cupy'"),
        ('OSError("no library")', "but importing lazy_package raised OSError: no library"),
    ],
)
def test_a_lazy_package_that_cannot_import_what_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str, says: str
) -> None:
    code = f"def __getattr__(name):\n    raise {raised} if name == 'Net' else AttributeError(name)"
    (tmp_path / "lazy_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lazy_package", raising=False)
    try:
        with pytest.raises(ConfigError) as refused:
            resolve("model.name", "lazy_package:Net", OURS)
    finally:
        sys.modules.pop("lazy_package", None)
    assert f"model.name is 'lazy_package:Net', {says}" in str(refused.value)
