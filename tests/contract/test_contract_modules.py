"""Any module of torch.nn, and what people make of it: as plain torch on the union of the rows, or refused.

With one shard nets are float32, the product's own type, and with four they are float64, which tells mistakes
from rounding.
"""

from __future__ import annotations

import random
import re
from typing import Any

import contract_changes
import contract_composites
import contract_kinds
import contract_layers
import numpy as np
import pytest
import torch
from plain_torch import Data, Make, Recipe, by_sparksgd, compared

from sparksgd.errors import ConfigError, ModelError, UserCodeError

ONE_SHARD = pytest.param(1, torch.float32, id="1 shard")
FOUR_SHARDS = pytest.param(4, torch.float64, id="4 shards")
SHARDS_AND_TYPES = [ONE_SHARD, FOUR_SHARDS]


def in_soak(parameters: Any) -> Any:
    return pytest.param(*parameters.values, id=parameters.id, marks=pytest.mark.soak)


ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10}

TRAINED = {
    **contract_layers.LAYERS,
    **contract_kinds.ORDINARY,
    **contract_changes.RIGHT,
}

PAGES = contract_composites.pages(list(TRAINED), 16)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own words on deprecated and slow layers


@pytest.mark.parametrize(("num_shards", "dtype"), [FOUR_SHARDS, in_soak(ONE_SHARD)])
@pytest.mark.parametrize("names", [pytest.param(page, id=f"{page[0]} to {page[-1]}") for page in PAGES])
def test_modules_side_by_side_on_shards_are_these_modules_on_the_union_of_their_rows(
    data: Data, names: list[str], num_shards: int, dtype: torch.dtype
) -> None:
    verdict = compared(
        lambda: contract_composites.of_names(names), Recipe(dtype=dtype), data, num_shards, ROUNDING[dtype]
    )
    assert verdict.is_right, str(verdict)


def test_twenty_modules_on_one_shard_are_these_modules(data: Data) -> None:
    names = [name for name in contract_composites.TWENTY if name != "Dropout"]
    verdict = compared(
        lambda: contract_composites.of_names(names),
        Recipe(dtype=torch.float32),
        data,
        1,
        ROUNDING[torch.float32],
    )
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("kind", list({**contract_kinds.ORDINARY, **contract_changes.RIGHT}))
def test_a_module_on_four_shards_is_that_module_on_the_union_of_their_rows(data: Data, kind: str) -> None:
    verdict = compared(TRAINED[kind], Recipe(), data, 4, ROUNDING[torch.float64])
    assert verdict.is_right, str(verdict)


@pytest.mark.soak
@pytest.mark.parametrize(("num_shards", "dtype"), SHARDS_AND_TYPES)
@pytest.mark.parametrize("kind", list(TRAINED))
def test_each_module_by_itself_is_that_module_on_the_union_of_the_rows(
    data: Data, kind: str, num_shards: int, dtype: torch.dtype
) -> None:
    verdict = compared(TRAINED[kind], Recipe(dtype=dtype), data, num_shards, ROUNDING[dtype])
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("kind", list(contract_kinds.LOW_PRECISION))
def test_sixteen_bits_differ_by_their_rounding(data: Data, kind: str, num_shards: int) -> None:
    make = contract_kinds.LOW_PRECISION[kind]
    verdict = compared(make, Recipe(dtype=torch.float32), data, num_shards, 5e-3)
    assert verdict.is_right, str(verdict)


LAZY = {**contract_layers.LAZY, **contract_layers.LAZY_NORMS}


@pytest.mark.parametrize("kind", list(LAZY))
def test_lazy_layers_take_their_shapes_and_are_ordinary_then(data: Data, kind: str) -> None:
    num_shards = 4 if kind in contract_layers.LAZY else 1
    verdict = compared(LAZY[kind], Recipe(dtype=torch.float32), data, num_shards, ROUNDING[torch.float32])
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("kind", list(contract_layers.NORMS_OVER_ROWS))
def test_norms_over_rows_are_plain_torch_s_where_one_shard_has_all_rows(data: Data, kind: str) -> None:
    verdict = compared(contract_layers.NORMS_OVER_ROWS[kind], Recipe(), data, 1, 1e-10)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("kind", list(contract_changes.REFUSED))
def test_what_cannot_be_trained_on_shards_is_refused_by_name(data: Data, kind: str) -> None:
    refused = contract_changes.REFUSED[kind]
    verdict = compared(refused.make, Recipe(), data, 4, 1e-10)
    if refused.or_right and verdict.is_right:
        return
    errors = (UserCodeError,) if refused.raises else (ModelError, ConfigError)
    assert isinstance(verdict.refusal, errors), str(verdict)
    assert re.search(refused.word, str(verdict.refusal)), str(verdict)
    assert verdict.difference is None, str(verdict)
    assert verdict.steps == 0 or refused.late, str(verdict)


RANDOM = {"layers that draw": contract_layers.RANDOM, "modules that draw": contract_changes.RANDOM}


@pytest.mark.parametrize("which", list(RANDOM))
def test_what_draws_numbers_repeats_them_and_leaves_the_caller_s_generators(data: Data, which: str) -> None:
    names = [*RANDOM[which]]
    first, again = (trained_by_chance(lambda: contract_composites.of_names(names), data, n) for n in (1, 2))
    assert first == again


def trained_by_chance(make: Make, data: Data, seed: int) -> list[object]:
    """Return all that a training ends with, begun with other generators."""
    random.seed(seed)
    np.random.seed(seed)
    before = random.getstate(), np.random.get_state()[1].tolist()
    course = by_sparksgd(make, Recipe(), data, 4)
    assert course.refusal is None, str(course.refusal)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    return [*(t.numpy().tobytes() for t in course.tensors[-1].values()), *course.losses, *course.test_losses]


def test_with_one_piece_a_step_its_rows_may_mix_as_they_do_in_one_process(data: Data) -> None:
    one = {"model": {"rows_mix": True}}
    verdict = compared(contract_kinds.OwnStatistics, Recipe(sections=one), data, 1, 1e-9)
    assert verdict.is_right, str(verdict)
    refused = compared(contract_kinds.OwnStatistics, Recipe(), data, 1, 1e-9)
    assert refused.is_refused, str(refused)
    assert "set model.rows_mix = true" in str(refused)
    assert "two pieces" not in str(refused)
