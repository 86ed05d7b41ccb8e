"""All rules by their names: the settings, which the section [solver] fills, and the solver.

To add a rule, write a file beside this one, and add a line to RULES.  No configuration module changes.
A rule of the user's own is named by its import path.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from sparksgd.config import MOST, Config, OptimizerConfig, ScheduleConfig, SolverConfig, read_section
from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, resolve, shown

if TYPE_CHECKING:  # a configuration must be read before torch is imported
    from sparksgd.arithmetic.flat import FlatModule
    from sparksgd.solvers.protocol import CentralSolver, Need

__all__ = [
    "RULES",
    "Experiment",
    "RuleSettings",
    "completed",
    "described",
    "family_of",
    "make_solver",
    "needs_of",
    "require_at_least",
    "settings_of",
    "settings_type",
]

RULES = {
    "synchronous": "sparksgd.solvers.synchronous:SynchronousSettings:SynchronousSolver",
    "gradient_push": "sparksgd.solvers.gradient_push:GradientPushSettings:GradientPush",
    "decentralised": "sparksgd.solvers.decentralised:DecentralisedSettings:Decentralised",
    "local_sgd": "sparksgd.solvers.local_sgd:LocalSGDSettings:LocalSGD",
    "async_sgd": "sparksgd.solvers.async_sgd:AsyncSGDSettings:AsyncSGD",
    "softsync": "sparksgd.solvers.softsync:SoftsyncSettings:Softsync",
    "stale_synchronous": "sparksgd.solvers.stale_synchronous:StaleSynchronousSettings:StaleSynchronous",
    "delay_compensated": "sparksgd.solvers.delay_compensated:DelayCompensatedSettings:DelayCompensated",
    "gap_aware": "sparksgd.solvers.gap_aware:GapAwareSettings:GapAware",
    "delayed_nesterov": "sparksgd.solvers.delayed_nesterov:DelayedNesterovSettings:DelayedNesterov",
    "elastic_averaging": "sparksgd.solvers.elastic_rounds:ElasticSettings:make_elastic",
}
"""For each solver.name: the module of the rule, its settings, and its central half."""


class RuleSettings(Protocol):
    """The keys of one rule: a frozen dataclass with a docstring under each field."""

    def check(self, config: Config) -> None:
        """Refuse what does not fit the rest of the configuration.

        Raises:
            ConfigError: a value is out of range, or contradicts another key.
        """
        ...

    def needs(self) -> frozenset[Need]:
        """Return what the engine must carry."""
        ...


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a rule must know about the run, besides its own keys."""

    optimizer: OptimizerConfig
    """Which class of torch.optim, and its arguments."""

    schedule: ScheduleConfig
    """Which class of torch.optim.lr_scheduler, and its arguments."""

    num_shards: int
    """S."""

    turns_per_epoch: int
    """K."""

    total_turns: int
    """How many turns each shard will make."""

    rows: int = 1
    """How many rows an epoch has."""

    seed: int = 0
    """Of the run; what an optimiser of the user's own draws follows from it."""

    def turns_ahead(self, turn: int, most: int) -> int:
        """Return how many turns follow until the epoch or the run ends: at least 1, at most `most`."""
        end = min(self.total_turns, (turn // self.turns_per_epoch + 1) * self.turns_per_epoch)
        return min(most, max(1, end - turn))

    @property
    def turns_per_move(self) -> int:
        """How many turns pass between two moves of the schedule."""
        return self.turns_per_epoch if self.schedule.interval == "epoch" else 1

    @property
    def moves(self) -> int:
        """How often the schedule is moved."""
        return self.total_turns // self.turns_per_move


def _named(config: SolverConfig) -> tuple[type[Any], Callable[..., CentralSolver]]:
    if ":" in config.name:
        return _own(config.name)
    if config.name not in RULES:
        raise ConfigError(
            f"solver.name is {shown(config.name)}, which is no rule{did_you_mean(config.name, RULES)}"
        )
    module_name, settings, solver = RULES[config.name].split(":")
    module = importlib.import_module(module_name)
    return getattr(module, settings), getattr(module, solver)


def _own(name: str) -> tuple[type[Any], Callable[..., CentralSolver]]:
    """Return the keys and the central half of a rule of the user's own.

    Raises:
        ConfigError: there is no such class, or it is no rule.
    """
    kind: Any = resolve("solver.name", name, {})
    settings: Any = getattr(kind, "Settings", None)
    if not isinstance(kind, type) or not is_dataclass(settings) or not hasattr(settings, "needs"):
        raise ConfigError(
            f"solver.name is {shown(name)}, which is no rule: derive a class from GradientCentre of "
            f"sparksgd.solvers.arrival_centre, or from another central half, and give it its keys as "
            f"Settings, a frozen dataclass derived from GradientSettings"
        )
    return cast(type[Any], settings), kind


def settings_type(name: str) -> type[Any]:
    """Return the dataclass of a rule's keys."""
    return _named(SolverConfig(name=name))[0]


def settings_of(config: SolverConfig) -> Any:
    """Return the settings of the rule, with its defaults.

    Raises:
        ConfigError: the rule or a key is unknown, or a value is of another type.
    """
    return read_section("solver", _named(config)[0], config.arguments)


def completed(config: Config) -> Config:
    """Return a configuration with every key of its rule in it, checked against the rest.

    Raises:
        ConfigError: see `settings_of` and `RuleSettings.check`.
    """
    settings = settings_of(config.solver)
    settings.check(config)
    keys = {key: value for key, value in asdict(settings).items() if value is not None}
    return replace(config, solver=replace(config.solver, arguments=keys))


def make_solver(
    config: Config,
    flat: FlatModule,
    experiment: Experiment,
    took_part: Sequence[frozenset[int]] | None = None,
) -> CentralSolver:
    """Return the central half that a configuration names.

    Args:
        config: names the rule.
        flat: the module; the solver owns its parameters from now on.
        experiment: has the optimiser, the schedule, and how long they are used.
        took_part: in a replay, the shards of each step.

    Raises:
        ConfigError: the rule, the optimiser or the schedule cannot be made.
    """
    _, make = _named(config.solver)
    settings, family = settings_of(config.solver), family_of(config.solver)
    if family == "arrivals":  # a trace says who comes when: nothing to tell the rule
        return make(flat, settings, experiment)
    return make(flat, settings, experiment, took_part)


def family_of(config: SolverConfig) -> str:
    """Return how the messages of a rule meet: rounds, arrivals or gossip."""
    from sparksgd.solvers.protocol import Need

    needs: frozenset[Need] = settings_of(config).needs()
    of_need = {Need.ARRIVALS: "arrivals", Need.GOSSIP: "gossip"}
    return next((family for need, family in of_need.items() if need in needs), "rounds")


def needs_of(
    settings: RuleSettings, num_shards: int, took_part: Sequence[frozenset[int]] | None
) -> frozenset[Need]:
    """Return what a run needs of its engine; in a replay no step waits for the first shards.

    Args:
        settings: the rule's keys.
        num_shards: S.
        took_part: in a replay, the shards of each step.
    """
    from sparksgd.solvers.protocol import Need

    needs = settings.needs()
    if took_part is None:
        return needs
    if Need.ARRIVALS in needs:
        return needs - {Need.ARRIVALS} | {Need.RECORDED_ARRIVALS}
    everyone = frozenset(range(num_shards))
    is_partial = any(shards != everyone for shards in took_part)
    return needs - {Need.QUORUM} | ({Need.REPLAY} if is_partial else set())


def described(config: SolverConfig) -> str:
    """Return the name of a rule for errors, with all keys that differ from the defaults.

    >>> described(SolverConfig(name="synchronous", arguments={"backup_workers": 1}))
    'solver.name = "synchronous" with solver.backup_workers = 1'
    """
    settings = settings_of(config)
    changed = [
        f"solver.{field.name} = {getattr(settings, field.name)}"
        for field in fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    return f'solver.name = "{config.name}"' + (f" with {' and '.join(changed)}" if changed else "")


def require_at_least(key: str, value: float | None, least: float, *, above: bool = False) -> None:
    """Refuse a value that is below a limit (or not above it), or not finite; None is always accepted.

    Raises:
        ConfigError: with the key, the value and the rule.
    """
    if value is None:
        return
    if not (value > least if above else value >= least):
        raise ConfigError(f"{key} is {value}, but must be {'above' if above else 'at least'} {least}")
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"{key} is {value}, but must be finite")
    if isinstance(value, int) and value > MOST:
        raise ConfigError(f"{key} is {shown(value)}, but may be {MOST} at most")
