"""Names are checked without a module that is built; what a session may bring is left to it."""

from __future__ import annotations

import functools
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


def test_a_module_that_a_session_may_bring_is_looked_for_once_there_is_one() -> None:
    asked: list[str] = []
    check_names(config(**NOWHERE), evaluates=False, may_come=lambda name: not asked.append(name))
    assert asked == ["nowhere", "nowhere"]
    with pytest.raises(ConfigError, match=r"model\.name is .*finds no module 'nowhere'"):
        check_names(config(**NOWHERE), evaluates=False, may_come=lambda name: False)
    with pytest.raises(ConfigError, match="has no 'Linaer'"):
        check_names(config(model={"name": "torch.nn:Linaer"}), evaluates=False, may_come=lambda name: True)


def test_rows_that_are_held_out_are_evaluated_on() -> None:
    judged = config(
        data={"features": "x", "label": "y", "validation_fraction": 0.5}, train={"metrics": ["f1"]}
    )
    check_names(judged, evaluates=False, has_module=True)
