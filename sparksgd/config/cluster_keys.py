"""The section [cluster]: what things cost on the cluster that engine.name = "simulated" pretends to have."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from sparksgd.config.scopes import cluster_key
from sparksgd.errors import ConfigError

__all__ = ["ClusterConfig", "check_cluster"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A cluster in virtual time.  No other engine reads these keys."""

    seed: int = cluster_key(0)
    """The seed of what chance decides on the cluster.  Runs of one seed meet the same slow turns."""

    turn_s: float = cluster_key(0.02)
    """Seconds that a worker computes for one turn of a shard: all of them, the median (lognormal), or the
    mean (exponential)."""

    row_s: float = cluster_key(0.0)
    """Seconds that each row of a turn adds to turn_s, so that larger pieces take longer."""

    turn_times: Literal["constant", "lognormal", "exponential"] = cluster_key("lognormal")
    """How these seconds vary."""

    recorded: str | None = cluster_key(None)
    """The folder of a run on Spark: turns take as long as they did there, drawn from those of the worker of
    the same number.  It replaces turn_s, row_s, turn_times and spread.  If not set: these say how long."""

    spread: float = cluster_key(0.15)
    """lognormal: the standard deviation of the logarithm of the seconds."""

    tail_share: float = cluster_key(0.0)
    """The part of turns, from 0 to 1, that take longer by tail_s times a Pareto-distributed number from 1."""

    tail_s: float = cluster_key(0.02)
    """The least seconds by which these turns take longer."""

    tail_shape: float = cluster_key(1.2)
    """The exponent of the Pareto distribution: the smaller, the heavier the tail."""

    slow_workers: int = cluster_key(0)
    """How many workers, from the first one, are always slow."""

    slow_factor: float = cluster_key(2.0)
    """How many times as long their turns take."""

    latency_s: float = cluster_key(0.0002)
    """Seconds from the last byte of a message to its arrival."""

    link_bytes_per_s: float = cluster_key(125e6)
    """How fast each worker sends and receives: 125e6 is 1 Gbit/s."""

    server_bytes_per_s: float | None = cluster_key(None)
    """How fast the centre sends, and receives, one message after the other.  If not set: as a
    worker's link."""

    server_s: float = cluster_key(0.0)
    """Seconds that the centre needs for each message beside its transfer."""

    rounds: Literal["tree", "allreduce"] = cluster_key("tree")
    """How the sums of rounds travel: in a Spark job for each step to the driver, or between the workers."""

    job_s: float = cluster_key(0.04)
    """rounds = "tree": seconds that a Spark job takes without computing."""

    worker_life_s: float | None = cluster_key(None)
    """The mean seconds until a worker is lost, with all that its shards keep.  If not set: none is lost."""

    worker_back_s: float = cluster_key(10.0)
    """Seconds until another worker takes the place of one that was lost."""

    gradients: bool = cluster_key(True)
    """Whether gradients are computed.  If false, all are zeros: staleness and times are right, and nothing is
    learnt."""


_ABOVE_0 = (
    "turn_s", "tail_shape", "slow_factor", "link_bytes_per_s", "server_bytes_per_s", "worker_life_s",
)  # fmt: skip


def check_cluster(config: ClusterConfig) -> None:
    """Refuse values out of range.

    Raises:
        ConfigError: with the key, the value and the rule.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool | str) or value is None or field.name == "seed":
            continue
        if field.name in _ABOVE_0 and not value > 0:
            raise ConfigError(f"cluster.{field.name} is {value}, but must be above 0")
        if value < 0:
            raise ConfigError(f"cluster.{field.name} is {value}, but must be at least 0")
    for name, value, least, most in (
        ("spread", config.spread, 0.0, 10.0),
        ("tail_shape", config.tail_shape, 0.1, 1e6),
    ):
        if not least <= value <= most:
            raise ConfigError(f"cluster.{name} is {value}, but must be between {least:g} and {most:g}")
    if config.recorded is not None:
        for name in ("turn_s", "row_s", "turn_times", "spread"):
            if getattr(config, name) != getattr(ClusterConfig(), name):
                raise ConfigError(
                    f"cluster.{name} is set, but so is cluster.recorded, which says how long turns take: "
                    f"leave one of them out"
                )
    if config.tail_share > 1:
        raise ConfigError(f"cluster.tail_share is {config.tail_share}, but is a part: 1 at most")
    if not -(2**63) <= config.seed < 2**64:
        raise ConfigError(f"cluster.seed is {config.seed}, but must be a number of 64 bits")
