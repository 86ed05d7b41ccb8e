"""Names are checked without a module that is built; code that may come with a session is left to it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.training.names import check_names

NOWHERE = {"model": {"name": "nowhere.nets:Net"}, "loss": {"name": "nowhere.losses:own"}}


class Huge(nn.Module):
    def __init__(self, width: int) -> None:
        raise AssertionError("it was built")


def with_more(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(factory)
    def made(width: int, depth: int) -> nn.Module:
        return factory(width * depth)

    return made


deep = with_more(Huge)


def config(**tables: Any) -> Config:
    return Config.from_dict({"data": {"features": "x", "label": "y"}, **tables})


@pytest.mark.parametrize(("name", "arguments"), [("Huge", {"width": 3}), ("deep", {"width": 3, "depth": 2})])
def test_arguments_are_compared_with_those_of_the_call_and_no_module_is_built(
    name: str, arguments: dict[str, int]
) -> None:
    check_names(config(model={"name": f"{__name__}:{name}", **arguments}), evaluates=False)
    with pytest.raises(ConfigError, match=r"does not take \{.*'wide': 3.*\}: TypeError: .*its arguments are"):
        check_names(config(model={"name": f"{__name__}:{name}", **arguments, "wide": 3}), evaluates=False)


def test_what_is_given_in_python_needs_no_name() -> None:
    check_names(config(**NOWHERE), evaluates=False, has_module=True, has_loss=True)


def test_code_of_the_user_is_imported_first_in_the_session_that_brings_files() -> None:
    sys.modules.pop("this", None)
    named = config(model={"name": "this:net"}, loss={"name": "nowhere.losses:own"})
    check_names(named, evaluates=False, brings_files=lambda: True)
    assert "this" not in sys.modules
    with pytest.raises(ConfigError, match=r"model\.name is .*this has no 'net'"):
        check_names(named, evaluates=False, brings_files=lambda: False)
    with pytest.raises(ConfigError, match=r"loss\.name is .*finds no module 'nowhere'"):
        check_names(named, evaluates=False, has_module=True, brings_files=lambda: False)


@pytest.mark.parametrize("tables", [{"model": {"name": "lennet"}}, {"loss": {"name": "cross_entrpy"}}])
def test_names_of_ours_are_checked_before_a_session_is_asked(tables: dict[str, Any]) -> None:
    def asked() -> bool:
        raise AssertionError("it was asked")

    with pytest.raises(ConfigError, match="which is not one of ours"):
        check_names(config(**{**NOWHERE, **tables}), evaluates=False, brings_files=asked)


def test_rows_that_are_held_out_are_evaluated_on() -> None:
    judged = config(
        data={"features": "x", "label": "y", "validation_fraction": 0.5}, train={"metrics": ["f1"]}
    )
    check_names(judged, evaluates=False, has_module=True)
