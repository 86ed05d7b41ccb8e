"""Slots for workers: what a run needs, what its session has, and the wait until there are enough."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from pyspark import SparkConf, SparkContext

from sparksgd.arithmetic.addition_tree import partials_sent, useful_workers
from sparksgd.errors import ClusterError, ConfigError, NotEnoughSlots
from sparksgd.spark.cluster.failures import is_stopped, session_stopped
from sparksgd.spark.cluster.placement import Placement, is_local

__all__ = ["Slots", "WorkerDemand", "asked_slots", "is_elastic"]

log = logging.getLogger("sparksgd")

_POLL_S = 0.2
_SETTLED_S = 3.0
_SAID_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class WorkerDemand:
    """What a run asks of a cluster for its workers."""

    num_workers: int | None
    """How many workers; None: as many as are useful."""

    num_shards: int
    """How many shards the workers own."""

    one_shard_per_worker: bool = False
    """Whether there is one worker for each shard, unless num_workers is set; backup workers need it."""

    barrier: bool
    """Whether the tasks of a job must start together."""

    threads: int = 1
    """How many cores a worker uses."""

    slots_timeout_s: float
    """How long to wait for slots."""

    hashed: bool = True
    """Whether each worker owns a contiguous range of shards; else Spark chooses."""

    @property
    def sized_by(self) -> str:
        """Return the key of the configuration that sets the number of workers."""
        return "train.num_shards" if self.one_shard_per_worker else "engine.num_workers"


class Slots:
    """The slots of a session, for the workers of a run.

    Args:
        context: whose slots.
        demand: what the run asks for.
        placement: knows the executors.
    """

    def __init__(self, context: SparkContext, demand: WorkerDemand, placement: Placement) -> None:
        self._context = context
        self._demand = demand
        self._placement = placement

    @cached_property
    def are_elastic(self) -> bool:
        """Return whether executors are added when tasks wait for them (dynamic allocation)."""
        return is_elastic(self._context.getConf())

    def count(self) -> int:
        """Return how many tasks can run at once."""
        spark = self._context._jsc.sc()
        profile = spark.resourceProfileManager().defaultResourceProfile()
        return int(spark.maxNumConcurrentTasks(profile))

    def check_settings(self) -> None:
        """Refuse a session whose settings do not fit the run.

        Raises:
            ClusterError: barrier-mode jobs cannot run here.
            ConfigError: a worker would use more cores than its task has.
        """
        self.check_barrier()
        self.check_threads()

    def check_barrier(self) -> None:
        """Refuse a run in barrier mode, where executors come and go.

        Raises:
            ClusterError: dynamic allocation is on.
        """
        if self.are_elastic and self._demand.barrier:
            raise ClusterError(
                "spark.dynamicAllocation.enabled is true, but Spark runs no barrier-mode job then: "
                "submit with --conf spark.dynamicAllocation.enabled=false and a fixed number of executors, "
                "or set engine.barrier=false (tree engine, ordinary stages)"
            )

    def check_threads(self) -> None:
        """Refuse workers that would use more cores than Spark gives to their tasks.

        Raises:
            ConfigError: with the setting.
        """
        threads = self._demand.threads
        task_cpus = int(self._context.getConf().get("spark.task.cpus", "1") or 1)
        if threads > task_cpus:
            raise ConfigError(
                f"train.threads is {threads}, but spark.task.cpus is {task_cpus}: workers "
                f"would take cores that Spark gave to others; submit with "
                f"--conf spark.task.cpus={threads}"
            )

    def settled_workers(self) -> int:
        """Return the number of workers: the one that was set, or as many as slots when no more come.

        Raises:
            ConfigError: more workers are asked for than there are shards.
            NotEnoughSlots: there are fewer slots than workers, even after the demand's `slots_timeout_s`.
            ClusterError: the session ended meanwhile.
        """
        wanted, shards = self._demand.num_workers, self._demand.num_shards
        if wanted is not None:
            if wanted > shards:
                raise ConfigError(
                    f"engine.num_workers is {wanted}, but train.num_shards is {shards}, and a worker "
                    f"owns one shard at least: set engine.num_workers={shards}, or more shards"
                )
            asked = self._asked()
            if asked is not None and asked[0] < wanted:
                raise NotEnoughSlots(self._too_few(wanted, self.count(), 0.0))
            self.wait_for(wanted)
            _warn_of_waste(wanted, self._demand)
            return wanted
        if self._demand.one_shard_per_worker or self.are_elastic:
            self.wait_for(shards)
            return shards
        asked = self._asked()
        self.wait_for(1 if asked is None else max(1, min(asked[0], shards)))
        slots, since = self.count(), time.monotonic()
        grows = asked is None and not is_local(self._context)
        while grows and slots < shards and time.monotonic() - since < _SETTLED_S:
            time.sleep(_POLL_S)
            if (now := self.count()) != slots:
                slots, since = now, time.monotonic()
        workers = _as_fast(min(slots, shards), shards)
        log.info("%d workers for %d shards: the cluster has %d slots", workers, shards, slots)
        _warn_of_waste(workers, self._demand)
        return workers

    def wait_for(self, wanted: int) -> None:
        """Wait until there are this many slots; with dynamic allocation, return at once.

        Raises:
            NotEnoughSlots: not within the demand's `slots_timeout_s`.
            ClusterError: the session ended meanwhile.
        """
        if self.are_elastic:
            return
        start, said = time.monotonic(), 0.0
        while (slots := self._count_while_it_lasts()) < wanted:
            waited_s = time.monotonic() - start
            if is_local(self._context) or waited_s >= self._demand.slots_timeout_s:
                raise NotEnoughSlots(self._too_few(wanted, slots, waited_s))
            if waited_s - said >= _SAID_EVERY_S:
                said = waited_s
                log.info("waiting for slots: %d of %d have come (%.0f s)", slots, wanted, waited_s)
            time.sleep(_POLL_S)

    def _count_while_it_lasts(self) -> int:
        """Return how many slots there are; raise an error if the session has ended."""
        try:
            slots = self.count()
        except Exception:
            slots = 0
            if not is_stopped(self._context):
                raise
        if is_stopped(self._context):
            raise session_stopped(self._context, "waiting for slots")
        return slots

    def _asked(self) -> tuple[int, str] | None:
        return None if self.are_elastic else asked_slots(self._context.getConf(), str(self._context.master))

    def _too_few(self, wanted: int, slots: int, waited_s: float) -> str:
        """Return the error: what was asked for, what came, and what to change."""
        sized_by = self._demand.sized_by
        fewer = f"set {sized_by}={slots}" if slots else "check that executors can start"
        asked = self._asked()
        if asked is None:
            waited = "" if is_local(self._context) else f" after {waited_s:.0f} s"
            return (
                f"{sized_by} is {wanted}, but the cluster has {slots} slots{waited}: "
                f"give it {wanted} cores (now {self._context.master}), or {fewer}"
            )
        asked_for, settings = asked
        executors = len(self._placement.places())
        if asked_for < wanted:
            return (
                f"{sized_by} is {wanted}, but only {asked_for} slots were asked for ({settings}): "
                f"ask for more executors, or set {sized_by}={asked_for}"
            )
        return (
            f"{wanted} slots are needed, and {asked_for} were asked for ({settings}), but after "
            f"{waited_s:.0f} s there are {slots}, of {executors} executors: the queue may hold no more, or "
            f"be full of others. Ask for fewer executors, or {fewer}, or wait longer "
            f"(engine.slots_timeout_s={2 * max(waited_s, 30):.0f})"
        )


def asked_slots(conf: SparkConf, master: str) -> tuple[int, str] | None:
    """Return how many slots a session asked its cluster for, and by which settings; None: all that there are.

    Args:
        conf: the session's settings; its number of executors is fixed.
        master: the cluster.
    """
    by_resources = any(key.startswith("spark.task.resource.") for key, _ in conf.getAll())
    if by_resources or not master.startswith(("yarn", "k8s:", "spark:")):
        return None
    task_cpus = int(str(conf.get("spark.task.cpus", "1")))
    cores = conf.get("spark.executor.cores", None)
    if master.startswith("spark:"):
        total = conf.get("spark.cores.max", None)
        if total is None or (cores is None and task_cpus > 1):  # executors' sizes are unknown
            return None
        each = int(cores or total)
        return int(total) // each * (each // task_cpus), f"spark.cores.max={total}"
    executors = int(str(conf.get("spark.executor.instances", "2")))
    each = int(cores or 1)
    return executors * (each // task_cpus), f"spark.executor.instances={executors} of {each} cores"


def is_elastic(conf: SparkConf) -> bool:
    """Return whether executors are added when tasks wait for them (dynamic allocation)."""
    return str(conf.get("spark.dynamicAllocation.enabled", "false")).lower() == "true"


def _as_fast(workers: int, shards: int) -> int:
    """Return the smallest number of workers with which none owns more shards than the busiest of these.

    >>> _as_fast(6, 8)
    4
    """
    return ceil(shards / ceil(shards / workers))


def _warn_of_waste(workers: int, demand: WorkerDemand) -> None:
    """Warn if some of this number of workers wait for others, or send more than necessary."""
    if not demand.hashed:
        return  # then Spark chooses which worker owns which shards
    shards = demand.num_shards
    fewer, sent = _as_fast(workers, shards), sum(partials_sent(workers, shards))
    if fewer < workers:
        log.warning(
            "%d workers are no faster than %d: of %d shards the busiest owns %d either way; without waste "
            "are %s workers",
            workers, fewer, shards, ceil(shards / workers), _listed(useful_workers(shards)),
        )  # fmt: skip
    elif sent > workers:
        log.warning(
            "%d workers send %d partial sums a step instead of %d, because their ranges of %d shards are no "
            "whole branches of the addition tree; without waste are %s workers",
            workers, sent, workers, shards, _listed(useful_workers(shards)),
        )  # fmt: skip


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
