"""The keys of each rule: what they are, what a configuration makes of them, and which are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from documented_keys import documented
from rules_with_keys import Row, configured, every_row

from sparksgd.config import Config, SolverConfig
from sparksgd.errors import ConfigError
from sparksgd.solvers.rules import RULES, completed, described, require_at_least, settings_of, settings_type

every_rule = pytest.mark.parametrize("rule", RULES)


@every_rule
def test_a_rule_s_keys_are_a_frozen_dataclass_with_a_docstring_under_each(rule: str) -> None:
    kind = settings_type(rule)
    assert kind.__dataclass_params__.frozen
    assert all(one.kw_only for one in dataclasses.fields(kind))
    assert kind() == kind()  # each key has a default
    assert documented(kind).keys() == {one.name for one in dataclasses.fields(kind)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), dataclasses.fields(kind)[0].name, 1)
    with pytest.raises(ConfigError, match=rf"unknown key solver\.{dataclasses.fields(kind)[0].name}_"):
        settings_of(SolverConfig(name=rule, arguments={f"{dataclasses.fields(kind)[0].name}_": 1}))


@every_row
def test_a_completed_configuration_has_every_key_and_is_left_as_it_is(row: Row) -> None:
    config = configured(row)
    full = completed(config)
    assert completed(full) == full
    assert completed(Config.from_dict(full.to_dict())) == full
    assert settings_of(full.solver) == settings_of(config.solver)
    defaults = {one.name: one.default for one in dataclasses.fields(settings_type(row.rule))}
    expected = {key: value for key, value in (defaults | row.keys).items() if value is not None}
    assert full.solver == SolverConfig(name=row.rule, arguments=expected)
    assert dataclasses.replace(full, solver=config.solver) == config  # nothing else is changed


@pytest.mark.parametrize(
    "tables",
    [{}, {"solver": {}}, {"solver": {"backup_workers": 0}}, {"solver": {"name": "synchronous"}}],
    ids=str,
)
def test_a_configuration_without_a_rule_is_synchronous_sgd(tables: dict[str, Any]) -> None:
    # so the version before wrote it, and a finished run of then is still the same experiment
    now = {"solver": {"name": "synchronous", "backup_workers": 0}}
    then, today = (completed(Config.from_dict(one)).experiment() for one in (tables, now))
    assert then == today
    assert (then["solver.name"], then["solver.backup_workers"]) == ("synchronous", 0)
    assert "solver.clip_norm" not in then


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({"name": "localsgd"}, "solver.name is 'localsgd', which is no rule (did you mean local_sgd?)"),
        ({"name": "synchronus"}, "which is no rule (did you mean synchronous?)"),
        (
            {"name": "x"},
            "solver.name is 'x', which is no rule (valid: async_sgd, decentralised, delay_compensated, ",
        ),
        ({"backup_worker": 1}, "unknown key solver.backup_worker (did you mean backup_workers?)"),
        ({"outer_lr": 1.0}, "unknown key solver.outer_lr (valid: backup_workers, clip_norm)"),
        ({"name": "local_sgd", "outer_rl": 1}, "unknown key solver.outer_rl (did you mean outer_lr?)"),
        ({"backup_workers": 1.5}, "solver.backup_workers is 1.5, but must be a whole number"),
        ({"clip_norm": "long"}, "solver.clip_norm is 'long', but must be a number or none"),
        ({"backup_workers": -1}, "solver.backup_workers is -1, but must be at least 0"),
        ({"clip_norm": 0.0}, "solver.clip_norm is 0.0, but must be above 0"),
        ({"backup_workers": 8}, "solver.backup_workers is 8, but train.num_shards is 8"),
    ],
    ids=str,
)
def test_unknown_rules_and_keys_are_refused_with_the_nearest_name(solver: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        completed(Config.from_dict({"solver": solver}))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({}, 'solver.name = "synchronous"'),
        ({"backup_workers": 0, "name": "synchronous"}, 'solver.name = "synchronous"'),
        (
            {"backup_workers": 2, "clip_norm": 1},
            'solver.name = "synchronous" with solver.clip_norm = 1.0 and solver.backup_workers = 2',
        ),
        ({"name": "local_sgd"}, 'solver.name = "local_sgd"'),
        (
            {"name": "local_sgd", "inner_state": "keep"},
            'solver.name = "local_sgd" with solver.inner_state = keep',
        ),
    ],
    ids=str,
)
def test_a_rule_is_described_by_the_keys_that_are_not_its_defaults(
    solver: dict[str, Any], words: str
) -> None:
    assert described(Config.from_dict({"solver": solver}).solver) == words


@pytest.mark.parametrize(
    ("value", "least", "above", "words"),
    [
        (None, 1, False, None),
        (1, 1, False, None),
        (0, 1, False, "some.key is 0, but must be at least 1"),
        (0.5, 0, True, None),
        (0.0, 0, True, "some.key is 0.0, but must be above 0"),
        (float("nan"), 0, False, "some.key is nan, but must be at least 0"),
        (float("nan"), 0, True, "some.key is nan, but must be above 0"),
    ],
)
def test_a_value_below_the_least_one_is_refused(
    value: float | None, least: float, above: bool, words: str | None
) -> None:
    if words is None:
        require_at_least("some.key", value, least, above=above)
        return
    with pytest.raises(ConfigError) as refused:
        require_at_least("some.key", value, least, above=above)
    assert str(refused.value) == words
