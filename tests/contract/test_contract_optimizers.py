"""Any optimiser, schedule and loss: as plain torch on the union of the rows, or refused."""

from __future__ import annotations

import contract_kinds
import contract_optimizers
import pytest
from plain_torch import Data, Recipe, by_sparksgd, compared

from sparksgd.errors import ConfigError, ModelError

LOSSES = ("pulled", "cross_entropy", "weighted_classes", "smoothed", "robust")
MIXING_LOSSES = {"divided_by_rows": "rows", "outer": "row", "contrasted": "row"}
LOSSES_WITH_STATE = {"margins": "scale|loss", "counting": "calls|loss"}

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own words on schedules


@pytest.mark.parametrize("num_shards", [4, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", list(contract_optimizers.OPTIMIZERS))
def test_an_optimiser_makes_the_steps_that_it_makes_in_one_process(
    data: Data, name: str, num_shards: int
) -> None:
    recipe = Recipe(optimizer=contract_optimizers.OPTIMIZERS[name])
    verdict = compared(contract_kinds.Heads, recipe, data, num_shards, 1e-9)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("num_shards", [4, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", list(contract_optimizers.MATRICES_ONLY))
def test_an_optimiser_of_matrices_makes_its_steps(data: Data, name: str, num_shards: int) -> None:
    recipe = Recipe(optimizer=contract_optimizers.MATRICES_ONLY[name])
    verdict = compared(contract_kinds.Matrices, recipe, data, num_shards, 1e-3)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("name", list(contract_optimizers.REFUSED))
def test_an_optimiser_that_cannot_be_carried_is_refused_by_name(data: Data, name: str) -> None:
    section, word = contract_optimizers.REFUSED[name]
    verdict = compared(contract_kinds.Heads, Recipe(optimizer=section), data, 4, 1e-9)
    assert isinstance(verdict.refusal, (ModelError, ConfigError)), str(verdict)
    assert word in str(verdict.refusal)
    assert verdict.is_refused


@pytest.mark.parametrize("name", list(contract_optimizers.RANDOM))
def test_an_optimiser_that_draws_numbers_repeats_them(data: Data, name: str) -> None:
    recipe = Recipe(optimizer=contract_optimizers.RANDOM[name])
    one, other = (by_sparksgd(contract_kinds.Net, recipe, data, 4) for _ in range(2))
    assert one.refusal is other.refusal is None
    assert one.losses == other.losses
    assert one.test_losses == other.test_losses


@pytest.mark.parametrize("name", list(contract_optimizers.SCHEDULES))
def test_a_schedule_sets_the_rates_that_it_sets_in_one_process(data: Data, name: str) -> None:
    recipe = Recipe(schedule=contract_optimizers.SCHEDULES[name])
    verdict = compared(contract_kinds.Heads, recipe, data, 4, 1e-10)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("name", list(contract_optimizers.OF_GROUPS))
def test_a_schedule_takes_a_value_for_each_group(data: Data, name: str) -> None:
    recipe = Recipe(
        optimizer=contract_optimizers.OPTIMIZERS["groups of its own"],
        schedule=contract_optimizers.OF_GROUPS[name],
    )
    verdict = compared(contract_kinds.Heads, recipe, data, 4, 1e-10)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("optimizer", ["SGD, momentum and decay", "Adam", "rebinds data"])
@pytest.mark.parametrize("name", list(contract_optimizers.LOOKING))
def test_a_schedule_sees_and_changes_what_it_does_in_one_process(
    data: Data, name: str, optimizer: str
) -> None:
    if name == "SetsMomentum" and "SGD" not in optimizer:
        pytest.skip("it has no momentum")
    recipe = Recipe(
        optimizer=contract_optimizers.OPTIMIZERS[optimizer], schedule=contract_optimizers.LOOKING[name]
    )
    verdict = compared(contract_kinds.Heads, recipe, data, 4, 1e-9)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("name", list(contract_optimizers.LOOKING))
def test_where_shards_make_turns_of_their_own_a_schedule_that_looks_is_refused(data: Data, name: str) -> None:
    recipe = Recipe(
        schedule=contract_optimizers.LOOKING[name],
        sections={"solver": {"name": "local_sgd", "turns_per_round": 2}},
    )
    course = by_sparksgd(contract_kinds.Heads, recipe, data, 4)
    if name == "SetsMomentum":
        assert course.refusal is None
        return
    assert isinstance(course.refusal, ConfigError)
    assert "looks at parameters" in str(course.refusal)
    assert 'solver.name = "synchronous"' in str(course.refusal)
    assert not course.tensors


@pytest.mark.parametrize("name", list(contract_optimizers.BY_ATTRIBUTES))
def test_an_optimiser_of_a_shard_s_own_model_sees_them_too(data: Data, name: str) -> None:
    sections = {"solver": {"name": "local_sgd", "turns_per_round": 1}}
    recipe = Recipe(optimizer=contract_optimizers.BY_ATTRIBUTES[name], sections=sections)
    verdict = compared(contract_kinds.Attributed, recipe, data, 1, 1e-9)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("name", list(contract_optimizers.BY_ATTRIBUTES))
def test_an_optimiser_sees_attributes_of_parameters(data: Data, name: str) -> None:
    recipe = Recipe(optimizer=contract_optimizers.BY_ATTRIBUTES[name])
    verdict = compared(contract_kinds.Attributed, recipe, data, 4, 1e-9)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_of_rows_is_the_mean_over_all_rows(data: Data, name: str) -> None:
    verdict = compared(contract_kinds.Net, Recipe(loss=f"contract_losses:{name}"), data, 4, 1e-10)
    assert verdict.is_right, str(verdict)


@pytest.mark.parametrize("name", list(MIXING_LOSSES))
def test_a_loss_that_mixes_rows_is_refused(data: Data, name: str) -> None:
    verdict = compared(contract_kinds.Net, Recipe(loss=f"contract_losses:{name}"), data, 4, 1e-10)
    assert isinstance(verdict.refusal, ModelError), str(verdict)
    assert MIXING_LOSSES[name] in str(verdict.refusal)


@pytest.mark.parametrize("name", list(LOSSES_WITH_STATE))
def test_a_loss_with_a_state_of_its_own_is_right_or_refused(data: Data, name: str) -> None:
    verdict = compared(contract_kinds.Net, Recipe(loss=f"contract_losses:{name}"), data, 4, 1e-10)
    if verdict.is_right:
        return
    assert isinstance(verdict.refusal, ModelError), str(verdict)
    assert any(word in str(verdict.refusal) for word in LOSSES_WITH_STATE[name].split("|"))
