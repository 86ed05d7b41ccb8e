"""A name in a configuration is one of ours, or the user's own by import path, or a clear refusal."""

from __future__ import annotations

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
