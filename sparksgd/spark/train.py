"""Training in a Spark session, on DataFrames or Parquet."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Unpack

from pyspark.sql import DataFrame, SparkSession

from sparksgd.arithmetic import instruction_set
from sparksgd.config import Config, EngineConfig
from sparksgd.data.held_out import Side, sides_of
from sparksgd.data.source import RowSource, Shards
from sparksgd.engines.compute import Plan
from sparksgd.engines.kinds import ALLREDUCE, EngineKind, candidates, first_of_each_name
from sparksgd.engines.memory import RunSizes, Takes
from sparksgd.engines.protocol import Engine
from sparksgd.errors import ClusterError, ConfigError, ModelError, OutOfMemory, SparkSGDError
from sparksgd.imports import resolve
from sparksgd.solvers.protocol import Need
from sparksgd.solvers.rules import completed, described
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.failures import final_error, session_stopped
from sparksgd.spark.cluster.memory import require_memory, warn_of_slow_results
from sparksgd.spark.cluster.slots import WorkerDemand
from sparksgd.spark.cluster.users_modules import require_modules, users_modules
from sparksgd.spark.engines.base import SparkEngine
from sparksgd.spark.frame_rows import DataFrameRows, read_parquet
from sparksgd.spark.session import check_session, refuse_plain_shards
from sparksgd.spark.shared_rows import SharedRows
from sparksgd.training.loop import Given
from sparksgd.training.loop import train as train_anywhere
from sparksgd.training.preflight import allowed_engines, needs_in
from sparksgd.training.replay import Replay
from sparksgd.training.start_up import StartUp
from sparksgd.training.state import Training

__all__ = ["class_of", "demand_of", "train"]

log = logging.getLogger("sparksgd")


def train(
    session: SparkSession,
    config: Config,
    rows: DataFrame | str | SharedRows,
    test: DataFrame | str | SharedRows | None = None,
    *,
    run_id: str | None = None,
    kinds: Sequence[EngineKind] | None = None,
    **given: Unpack[Given],
) -> Training:
    """Train a module in a session, by the engine that the configuration names.

    Args:
        session: yours; start it with `sparksgd.spark.session.start_session` for its best settings.
        config: what to train, and how; `data.train` and `data.test` are ignored.
        rows: rows to train on, a DataFrame, a path or URI of Parquet, or rows that trainings share; only the
            columns that config.data names are read.
        test: rows to evaluate on; None: those that config.data holds out, or none.
        run_id: names the run's jobs; None for a new name.
        kinds: the engines that are allowed, if they were asked for before.
        given: see `sparksgd.training.loop.train`.

    Returns:
        The finished run; its `module` is trained.

    Raises:
        SparkSGDError: see sparksgd/errors.py.
    """
    instruction_set.pin(config.train.instruction_set)
    config = completed(config)
    replay = given.get("replay")
    kinds = kinds or allowed_engines(config, replay)
    if not kinds[0].on_spark:
        raise ConfigError(
            f"{kinds[0]} computes without Spark, but the rows are a session's: leave engine.name out, or use "
            f'"tree", "allreduce" or "auto"'
        )
    trained, held_out = sides_of(config.data, has_test=test is not None)
    start_up = given["start_up"] = given.get("start_up") or StartUp()
    cluster = Cluster(session, demand_of(config, replay), run_id)
    refuse_plain_shards(cluster.context.getConf().get)  # before anybody waits for slots
    cluster.settle()
    start_up.reached("containers")
    check_session(session, config.train)
    make_engine = _OnCluster(cluster, config.engine, kinds)
    make_engine.check()
    with cluster.job_group():
        start_up.unpacked(cluster.check_executors(config.train.instruction_set))
        with cluster.job_watch.over(1):  # to read a schema is a job already: not before there are slots
            rows = _read(session, rows)
            test = rows if held_out else None if test is None else _read(session, test)
        try:
            return train_anywhere(
                config,
                rows=_source(rows, cluster, config.data.placement, trained),
                test=None if test is None else _source(test, cluster, side=held_out),
                make_engine=make_engine,
                **given,
            )
        except SparkSGDError:
            raise
        except Exception as error:
            final = final_error(error, cluster.context)
            if isinstance(final, OutOfMemory):
                raise final from error
            if cluster.is_stopped():  # then any call to it may fail, with any message
                raise session_stopped(cluster.context) from error
            raise


def _read(session: SparkSession, rows: DataFrame | str | SharedRows) -> DataFrame | SharedRows:
    return read_parquet(session, rows) if isinstance(rows, str) else rows


def _source(
    rows: DataFrame | SharedRows, cluster: Cluster, placement: str = "hashed", side: Side | None = None
) -> RowSource:
    if isinstance(rows, SharedRows):
        return rows.source(cluster, placement, side)
    return DataFrameRows(rows, cluster, placement, side)


def demand_of(config: Config, replay: Replay | None = None) -> WorkerDemand:
    """Return what a configuration asks of a cluster for its workers.

    Raises:
        ConfigError: its rule or its engine cannot be, or do not go together.
    """
    needs = needs_in(config, replay)
    return WorkerDemand(
        num_workers=config.engine.num_workers,
        num_shards=config.train.num_shards,
        one_shard_per_worker=Need.QUORUM in needs,
        barrier=candidates(config.engine, needs, described(config.solver))[0].barrier,
        threads=config.train.threads,
        slots_timeout_s=config.engine.slots_timeout_s,
        hashed=config.data.placement == "hashed",
    )


class _OnCluster:
    """Makes the engine of a run on a cluster: the first of several kinds that works.

    Args:
        cluster: where the workers are.
        config: how they work.
        kinds: the possible engines, in the order in which they are tried.
    """

    def __init__(self, cluster: Cluster, config: EngineConfig, kinds: Iterable[EngineKind]) -> None:
        self._cluster, self._config = cluster, config
        self.kinds = first_of_each_name(kinds)
        self._takes: dict[EngineKind, Takes] = {}
        self._left_out: str | None = None

    def check(self) -> None:
        """Refuse what cannot work at the driver, before the rows are dealt."""
        if len(self.kinds) == 1:
            class_of(self.kinds[0]).check(self._cluster, self._config)

    def check_code(self, *parts: object, replica: object = None) -> None:
        """Refuse parts that executors cannot import; leave all-reduce out, if it is only the replica."""
        require_modules(self._cluster, users_modules(*parts))
        if replica is not None and ALLREDUCE in self.kinds:
            try:
                require_modules(self._cluster, users_modules(replica))
            except ModelError as error:
                if len(self.kinds) == 1:
                    raise
                self.kinds.remove(ALLREDUCE)
                self._left_out = str(error)

    def check_memory(self, sizes: RunSizes, num_shards: int, /) -> None:
        """Leave out the engines that take more memory than there is; refuse the run if that are all."""
        refused: list[OutOfMemory] = []
        for kind in list(self.kinds):
            try:
                self._takes[kind] = require_memory(self._cluster, kind, sizes, num_shards)
            except OutOfMemory as error:
                refused.append(error)
                self.kinds.remove(kind)
        if not self.kinds:
            raise refused[0]
        if refused:
            self._left_out = str(refused[0])

    def __call__(self, plan: Plan, shards: Shards, test: Shards | None, /) -> Engine:
        """Return the engine; if there was a choice, log the reason for it."""
        *tried, last = self.kinds
        reason = self._left_out
        if reason is None and last.name != self._config.name:
            cannot = "does not carry this run" if self._config.barrier else "needs engine.barrier = true"
            reason = f"{ALLREDUCE.name} {cannot}"
        for kind in tried:
            engine = self._made(kind, plan, shards, test)
            with ExitStack() as unless_chosen:
                unless_chosen.callback(engine.close)
                reason = _obstacle(engine)
                if reason is None:
                    unless_chosen.pop_all()
                    workers = self._cluster.num_workers
                    log.info("engine: %s, because all %d workers reach each other", kind.name, workers)
                    return engine
        if reason is not None:
            log.warning("engine: %s, because %s", last.name, reason)
        return self._made(last, plan, shards, test)

    def _made(self, kind: EngineKind, plan: Plan, shards: Shards, test: Shards | None) -> SparkEngine:
        if kind is not ALLREDUCE and kind in self._takes:
            warn_of_slow_results(self._cluster, self._takes[kind].largest_result)
        return class_of(kind)(self._cluster, self._config, plan, shards, test)


def class_of(kind: EngineKind) -> type[SparkEngine]:
    """Return the class of an engine on Spark."""
    found: type[SparkEngine] = resolve("engine.name", kind.home, {})
    return found


def _obstacle(engine: SparkEngine) -> str | None:
    """Open an engine; return why it cannot work here, or None."""
    try:
        engine.open()
        return engine.obstacle()
    except ClusterError as error:
        return f"workers cannot sum among themselves: {error}"
