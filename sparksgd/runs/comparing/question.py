"""What a comparison asks: a base configuration, solvers with their settings, clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparksgd.config import Config
from sparksgd.runs.comparing.grid import Settings

__all__ = ["ONE_PROCESS", "REFERENCE", "Budget", "Competitor", "Question"]

REFERENCE = "synchronous"
"""The solver whose times the others' are divided by."""

ONE_PROCESS = "one process"
"""What the run that sets the target is called."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The section [compare]."""

    trials: int = 12
    """How many settings of each solver are tried."""

    seeds: int = 10
    """How many runs of each solver are reported for each cluster."""

    margin: float = 0.01
    """How far the target lies below the median score of the tuned run in one process."""

    rates: tuple[float, float] = (0.01, 0.32)
    """The ends of the log-grid of learning rates."""


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """A solver that is compared."""

    label: str
    rule: Mapping[str, Any]
    """Keys of [solver], with its name."""

    knob: str | None = None
    """The key of [solver] that is tuned beside the rate and the momentum."""

    knob_values: tuple[Any, ...] = (None,)
    num_shards: int | None = None
    """None: those of the base."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is compared, on what, and how."""

    base: Mapping[str, Mapping[str, Any]]
    """Tables of a configuration."""

    competitors: tuple[Competitor, ...]
    """The reference is the first one."""

    clusters: Mapping[str, Mapping[str, Any]]
    """Keys of [cluster], and num_workers."""

    budget: Budget = field(default_factory=Budget)

    @property
    def one_process(self) -> Competitor:
        """Return what sets the target: the reference with all rows of a step in one shard."""
        return Competitor(label=ONE_PROCESS, rule={"name": "synchronous"}, num_shards=1)

    @property
    def momenta(self) -> tuple[float | None, ...]:
        """Return the momenta that are tried; None where the optimiser has no such argument."""
        return (0.0, 0.9) if self.base.get("optimizer", {}).get("name", "SGD") == "SGD" else (None,)

    @property
    def first_seed(self) -> int:
        """Return the seed of all trials; the runs that are reported have the next ones."""
        seed: int = self.base.get("train", {}).get("seed", 0)
        return seed

    @property
    def seeds(self) -> range:
        """Return the seeds of the runs that are reported."""
        return range(self.first_seed + 1, self.first_seed + 1 + self.budget.seeds)

    def config(self, competitor: Competitor, cluster: str | None, chosen: Settings, seed: int) -> Config:
        """Return the configuration of one run.

        Args:
            competitor: the solver.
            cluster: its name; None: one worker, and the costs that [cluster] has by default.
            chosen: what is tuned.
            seed: of the weights, the order of rows and the cluster's noise.

        Raises:
            ConfigError: a section, key, type or value is not valid.
        """
        tables: dict[str, Any] = {name: dict(table) for name, table in self.base.items()}
        knob = {} if competitor.knob is None else {competitor.knob: chosen.knob}
        tables["solver"] = {**competitor.rule, **knob}
        optimizer = {"name": "SGD", **tables.get("optimizer", {}), "lr": chosen.rate}
        if chosen.momentum is not None:
            optimizer["momentum"] = chosen.momentum
            if not chosen.momentum:  # torch refuses it without momentum
                optimizer.pop("nesterov", None)
        tables["optimizer"] = optimizer
        tables["train"] = {**tables.get("train", {}), "seed": seed}
        if competitor.num_shards is not None:
            tables["train"]["num_shards"] = competitor.num_shards
        own, workers = {}, 1
        if cluster is not None:
            own = {**tables.get("cluster", {}), **self.clusters[cluster]}
            workers = own.pop("num_workers", tables.get("engine", {}).get("num_workers"))
        tables["cluster"] = {**own, "seed": seed}
        tables["engine"] = {"name": "simulated", "num_workers": workers}
        return Config.from_dict(tables)
