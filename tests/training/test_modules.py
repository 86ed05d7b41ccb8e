"""A module is built by its name, from the seed alone, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparksgd.config import ModelConfig
from sparksgd.errors import ConfigError, ModelError
from sparksgd.training.modules import build_module


def test_a_module_s_first_parameters_follow_from_the_seed_alone() -> None:
    config = ModelConfig(name="lenet", arguments={"maps": [2, 3], "hidden": 4})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build_module(config, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two, other = build_module(config, seed=5), build_module(config, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.output.weight, other.output.weight)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "phrases"),
    [
        ("lenet5", {}, ConfigError, ["model.name is 'lenet5'", "did you mean lenet?"]),
        ("nowhere:Net", {}, ConfigError, ["no module 'nowhere'", "PYTHONPATH"]),
        ("lenet", {"hiden": 3}, ConfigError, ["does not take {'hiden': 3}", "hidden"]),
        ("builtins:dict", {}, ModelError, ["gave a dict, not a torch module"]),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(
    name: str, arguments: dict[str, Any], error: type[Exception], phrases: list[str]
) -> None:
    with pytest.raises(error) as refused:
        build_module(ModelConfig(name=name, arguments=arguments), seed=0)
    for phrase in phrases:
        assert phrase in str(refused.value)
