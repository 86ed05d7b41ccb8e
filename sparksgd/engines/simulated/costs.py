"""What things cost in virtual time: computing, links, Spark jobs, losses of workers.

Each cost is a pure function of the seed and of what it is the cost of.  So runs with different solvers on one
cluster meet the same slow turns and the same losses, and can be compared in pairs.
"""

from __future__ import annotations

import math

import numpy as np

from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import ClusterConfig
from sparksgd.engines.simulated.recorded_times import recorded_turns_s
from sparksgd.errors import ClusterError, ConfigError
from sparksgd.solvers.protocol import Need

__all__ = ["Costs", "Link", "refuse_endless_losses", "refuse_impossible", "sums_at_driver"]


class Costs:
    """The costs of a cluster.

    Args:
        config: the section [cluster].
        vector_bytes: of one vector of the parameters.

    Raises:
        DataError: cluster.recorded names no run, or too short a one.
    """

    def __init__(self, config: ClusterConfig, vector_bytes: int) -> None:
        self.config, self.vector_bytes = config, vector_bytes
        self._recorded_s = None if config.recorded is None else recorded_turns_s(config.recorded)

    def turn_s(self, worker: int, shard: int, turn: int, rows: int) -> float:
        """Return the seconds that a worker computes for a turn of a shard, of so many rows."""
        config = self.config
        drawn = self._drawn("turn", shard, turn)
        seconds = config.turn_s + rows * config.row_s
        if self._recorded_s is not None:
            seconds = float(drawn.choice(self._recorded_s[worker % len(self._recorded_s)]))
        elif config.turn_times == "lognormal":
            seconds *= math.exp(config.spread * drawn.standard_normal())
        elif config.turn_times == "exponential":
            seconds *= drawn.standard_exponential()
        if config.tail_share and drawn.random() < config.tail_share:
            seconds += config.tail_s * (1 + drawn.pareto(config.tail_shape))
        return seconds * (config.slow_factor if worker < config.slow_workers else 1.0)

    def until_loss_s(self, worker: int, life: int) -> float:
        """Return for how many seconds a worker lives; infinite if none is ever lost."""
        mean_s = self.config.worker_life_s
        return (
            math.inf if mean_s is None else mean_s * self._drawn("life", worker, life).standard_exponential()
        )

    def vectors_s(self, vectors: int) -> float:
        """Return the seconds that some vectors take on a worker's link, without its latency."""
        return vectors * self.vector_bytes / self.config.link_bytes_per_s

    def at_server_s(self, vectors: int) -> float:
        """Return the seconds that some vectors take on the server's link."""
        speed = self.config.server_bytes_per_s or self.config.link_bytes_per_s
        return vectors * self.vector_bytes / speed

    def all_reduce_s(self, vectors: int, workers: int) -> float:
        """Return the seconds of a part-reduce and a part-broadcast between some workers.

        Thakur, Rabenseifner, Gropp 2005: 2 (p - 1) / p of the bytes leave each worker; all at once.
        """
        if workers == 1:
            return 0.0
        return 2 * self.config.latency_s + 2 * (workers - 1) / workers * self.vectors_s(vectors)

    def _drawn(self, purpose: str, *key: int) -> np.random.Generator:
        return np.random.default_rng(seed32(self.config.seed, f"simulated {purpose}", *key))


def refuse_impossible(cluster: ClusterConfig, needs: frozenset[Need]) -> None:
    """Refuse what no cluster of this kind does.

    Raises:
        ConfigError: with the key, and why.
        DataError: cluster.recorded names no run, or too short a one.
    """
    if cluster.recorded is not None:
        recorded_turns_s(cluster.recorded)
    if cluster.worker_life_s is not None and Need.SHARD_STATE in needs:
        raise ConfigError(
            f"cluster.worker_life_s is {cluster.worker_life_s}, but with this solver a lost worker takes the "
            f"models of its shards along, and no rule says how they begin anew: leave it out"
        )
    if cluster.rounds == "allreduce" and Need.QUORUM in needs:
        raise ConfigError(
            'cluster.rounds is "allreduce", but solver.backup_workers is set, and all workers wait for each '
            'other in such a sum: use cluster.rounds = "tree"'
        )


_MOST_LOSSES = 1000  # of a worker, without a step


def refuse_endless_losses(config: ClusterConfig, losses: int, workers: int) -> None:
    """Refuse to go on where workers are lost before they get anything done.

    Raises:
        ClusterError: each was lost a thousand times since the last step.
    """
    if losses > _MOST_LOSSES * workers:
        raise ClusterError(
            f"{workers} workers were lost {losses} times without a step: cluster.worker_life_s is "
            f"{config.worker_life_s}, but their turns take longer: raise it, or let shards send after fewer "
            f"turns"
        )


def sums_at_driver(workers: int) -> int:
    """Return how many partial sums of so many workers reach the driver, as treeAggregate divides them.

    >>> [sums_at_driver(workers) for workers in (4, 8, 30)]
    [4, 2, 5]
    """
    scale, left = max(2, math.ceil(math.sqrt(workers))), workers
    while left > scale + math.ceil(left / scale):
        left //= scale
    return left


class Link:
    """A link that carries one message after the other, in the order in which they come."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def carry(self, now_s: float, seconds: float) -> float:
        """Return when a message is through that comes now, and takes this long."""
        self._free_s = max(now_s, self._free_s) + seconds
        return self._free_s
