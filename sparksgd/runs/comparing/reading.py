"""Reads what a comparison asks from TOML; torch is not imported yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparksgd.config import Config, read_section
from sparksgd.config.tables import read_toml
from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, shown
from sparksgd.runs.comparing.grid import FEWEST_RATES
from sparksgd.runs.comparing.question import REFERENCE, Budget, Competitor, Question

__all__ = ["read_question"]

_ALWAYS = "local_sgd"
"""The solver that competes even if nobody names it."""

_HELD_OUT = 0.1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OWN_RATES = ("OneCycleLR", "CyclicLR")
_SECTIONS = ("base", "set", "compare", "solvers", "clusters")


def read_question(file: str | Path, data: str | None = None) -> Question:
    """Read what a comparison asks.

    Args:
        file: TOML; its base, if that is a file, is relative to it.
        data: Parquet to train on, in place of the base's.

    Raises:
        ConfigError: a file cannot be read, or a section, key or value is not valid.
    """
    tables = read_toml(file)
    for name in tables:
        if name not in _SECTIONS:
            raise ConfigError(f"{file} has an unknown section {shown(name)}{did_you_mean(name, _SECTIONS)}")
    base = _base(tables, Path(file))
    if data is not None:
        base.setdefault("data", {})["train"] = data
    given = _table("compare", tables.get("compare", {}))
    question = Question(
        base=_checked_base(base),
        competitors=_competitors(_table("solvers", tables.get("solvers", {}))),
        clusters=_clusters(_table("clusters", tables.get("clusters", {}))),
        budget=_budget(given),
    )
    _require_enough_trials(question)
    return question


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {shown(value)}, but is a section: write [{name}]")
    return dict(value)


def _base(tables: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the tables of the base, with what [set] changes."""
    given = tables.get("base", {})
    read = read_toml(file.parent / given) if isinstance(given, str) else given
    base = {name: _table(name, table) for name, table in _table("base", read).items()}
    for section, changes in _table("set", tables.get("set", {})).items():
        of_section = base.setdefault(section, {})
        for key, value in _table(f"set.{section}", changes).items():
            if value == "none" and key == "name":  # arguments are those of a class
                of_section.clear()
            elif value == "none":
                of_section.pop(key, None)
            else:
                of_section[key] = value
    return base


def _checked_base(base: dict[str, Any]) -> dict[str, Any]:
    """Return the base with rows held out, or refuse what would make the comparison unfair."""
    data = base.setdefault("data", {})
    if data.get("validation_fraction") is None and data.get("validation_column") is None:
        data["validation_fraction"] = _HELD_OUT
    data.pop("test", None)  # neither the selection nor the target may know of these rows
    base.pop("checkpoint", None)  # each run is short, and made anew
    config = Config.from_dict(base)
    if config.data.train is None:
        raise ConfigError("data.train is not set: name the Parquet to train on, or pass --data")
    if config.schedule.name in _OWN_RATES:
        raise ConfigError(
            f"schedule.name is {shown(config.schedule.name)}, which sets rates of its own, so that all "
            f'trials would be one: set = {{ schedule = {{ name = "none" }} }} leaves it out'
        )
    for key, value in (
        ("early_stopping.patience", config.early_stopping.patience),
        ("train.max_wall_s", config.train.max_wall_s),
    ):
        if value is not None:
            section, name = key.split(".")
            raise ConfigError(
                f"{key} is {shown(value)}, but runs are compared that are made to their end: "
                f'set = {{ {section} = {{ {name} = "none" }} }} leaves it out'
            )
    if "seed" in base.get("cluster", {}):
        raise _own_seed(
            "cluster.seed", base["cluster"]["seed"], 'set = { cluster = { seed = "none" } } leaves it out'
        )
    steps, every = config.train.steps, config.train.eval_every
    if steps is not None and every is not None and steps < 2 * every:
        raise ConfigError(
            f"train.steps is {steps} and train.eval_every {every}, but a target must be held at two "
            f"evaluations: lower eval_every to {max(1, steps // 2)} or less"
        )
    return base


def _competitors(tables: Mapping[str, Any]) -> tuple[Competitor, ...]:
    """Return the solvers: the reference first, and local SGD even if nobody names it."""
    named = {label: _competitor(label, _table(f"solvers.{label}", table)) for label, table in tables.items()}
    reference = named.pop(REFERENCE, Competitor(label=REFERENCE, rule={"name": REFERENCE}))
    if reference.rule["name"] != REFERENCE:
        raise ConfigError(
            f"solvers.{REFERENCE}.name is {shown(reference.rule['name'])}, but that label is the reference, "
            f"which all times are divided by: give this solver another label"
        )
    if all(one.rule["name"] != _ALWAYS for one in named.values()):
        if _ALWAYS in named:
            raise ConfigError(
                f"solvers.{_ALWAYS}.name is {shown(named[_ALWAYS].rule['name'])}, but local SGD always "
                f"competes under that label: give this solver another one"
            )
        named[_ALWAYS] = Competitor(
            label=_ALWAYS, rule={"name": _ALWAYS}, knob="turns_per_round", knob_values=(4, 16)
        )
    return (reference, *named.values())


def _competitor(label: str, table: dict[str, Any]) -> Competitor:
    _require_name("solvers", label)
    knob = _table(f"solvers.{label}.knob", table.pop("knob", {}))
    rule = {"name": label, **table}
    if not knob:
        return Competitor(label=label, rule=rule)
    if len(knob) > 1:
        raise ConfigError(
            f"solvers.{label}.knob has the keys {', '.join(knob)}, but a solver has one knob of its own: "
            f"leave one, and fix the others"
        )
    ((key, values),) = knob.items()
    if not isinstance(values, list) or not values:
        raise ConfigError(f"solvers.{label}.knob.{key} is {shown(values)}, but must be a list of values")
    if any(isinstance(value, list | dict) for value in values) or len(set(values)) < len(values):
        raise ConfigError(
            f"solvers.{label}.knob.{key} is {shown(values)}, but must have different numbers or texts: each "
            f"is tried with every rate and momentum"
        )
    return Competitor(label=label, rule=rule, knob=key, knob_values=tuple(values))


def _clusters(tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not tables:
        raise ConfigError(
            "no cluster is named: add a section such as [clusters.fast] with keys of [cluster], or none"
        )
    for name in tables:
        _require_name("clusters", name)
    clusters = {name: _table(f"clusters.{name}", table) for name, table in tables.items()}
    for name, table in clusters.items():
        if "seed" in table:
            raise _own_seed(f"clusters.{name}.seed", table["seed"], "leave it out")
    return clusters


def _own_seed(key: str, value: Any, move: str) -> ConfigError:
    """Return the refusal of a cluster's seed."""
    return ConfigError(
        f"{key} is {shown(value)}, but the comparison sets the seeds, so that all solvers meet the same "
        f"noise: train.seed of the base for trials, and the next ones for reported runs; {move}"
    )


def _require_name(section: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{section} has the name {shown(name)}, but files are named so: use letters, digits, _, - and ."
        )


def _budget(table: dict[str, Any]) -> Budget:
    rates = table.pop("rates", list(Budget.rates))
    if (
        not isinstance(rates, list)
        or len(rates) != 2
        or any(type(rate) not in (int, float) for rate in rates)
        or not 0 < rates[0] < rates[1] < float("inf")
    ):
        raise ConfigError(
            f"compare.rates is {shown(rates)}, but must be the ends of a grid, as [0.01, 0.32]: the smaller "
            f"first, both above 0"
        )
    counts: Budget = read_section("compare", Budget, table)
    for key, value, least in (("trials", counts.trials, 2), ("seeds", counts.seeds, 1)):
        if value < least:
            raise ConfigError(f"compare.{key} is {value}, but must be at least {least}")
    if counts.margin < 0:
        raise ConfigError(f"compare.margin is {counts.margin}, but must be at least 0")
    return Budget(
        trials=counts.trials,
        seeds=counts.seeds,
        margin=counts.margin,
        rates=(float(rates[0]), float(rates[1])),
    )


def _require_enough_trials(question: Question) -> None:
    """Refuse trials that are too few for every combination of momentum and knob.

    Raises:
        ConfigError: it names the solver's knob.
    """
    trials, momenta = question.budget.trials, len(question.momenta)
    for competitor in question.competitors:
        knobs = len(competitor.knob_values)
        fewest = FEWEST_RATES * momenta * knobs
        if trials >= fewest:
            continue
        what, move = [f"{momenta} momenta"] if momenta > 1 else [], "raise trials"
        if knobs > 1:
            what.append(f"{knobs} values of solvers.{competitor.label}.knob")
            move += ", or shorten the knob"
        raise ConfigError(
            f"compare.trials is {trials}, but {' and '.join(what)} need {fewest} for two rates: {move}"
        )
