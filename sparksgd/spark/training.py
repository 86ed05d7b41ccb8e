"""Training on Spark, from a session and DataFrames: the way in for notebooks and jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from pyspark.sql import DataFrame, SparkSession
from torch import nn

from sparksgd import instruction_set
from sparksgd.compute import Plan
from sparksgd.config import Config, EngineConfig
from sparksgd.engines.allreduce import AllReduceEngine
from sparksgd.engines.arrivals import ArrivalsEngine
from sparksgd.engines.protocol import Engine, Shards
from sparksgd.engines.tree import TreeEngine
from sparksgd.errors import ClusterError, ConfigError, SparkSGDError
from sparksgd.participation import Record
from sparksgd.spark.cluster import Cluster, session_stopped
from sparksgd.spark.rows import DataFrameRows, read_parquet
from sparksgd.spark.session import check_session
from sparksgd.start_up import StartUp
from sparksgd.training import Observer, Training
from sparksgd.training import train as train_anywhere

__all__ = ["train", "train_parquet"]

log = logging.getLogger("sparksgd")


def train(
    session: SparkSession,
    config: Config,
    rows: DataFrame,
    test: DataFrame | None = None,
    *,
    module: nn.Module | None = None,
    observers: Sequence[Observer] = (),
    record: Record | None = None,
    before_gradients: Callable[[int, int], None] | None = None,
) -> Training:
    """Train a module on the rows of a DataFrame, by the engine that the configuration names.

    Args:
        session: yours; start it with `sparksgd.spark.session.start_session` for its best settings.
        config: what to train, and how; `data.train` and `data.test` are not looked at.
        rows: rows to train on; only the columns that config.data names are read.
        test: rows to evaluate on.
        module: a module of your own, instead of the one that config.model names; trained in place.
        observers: who watches.
        record: of an earlier run of the same configuration, to be repeated.
        before_gradients: called with worker and step before a worker computes: makes stragglers for tests
            and benchmarks.

    Returns:
        The finished run; its `module` is trained.

    Raises:
        SparkSGDError: see sparksgd/errors.py.
    """
    return _train(session, config, lambda: (rows, test), module, observers, record, before_gradients)


def train_parquet(
    session: SparkSession,
    config: Config,
    observers: Sequence[Observer] = (),
    record: Record | None = None,
    *,
    run_id: str | None = None,
    start_up: StartUp | None = None,
) -> Training:
    """Train as `train` does, on the Parquet that the configuration names; data.train must be set.

    Args:
        session: as for `train`.
        config: what to train, on what, and how.
        observers: who watches.
        record: of an earlier run of the same configuration, to be repeated.
        run_id: names the run's jobs; None for a new name.
        start_up: what the run's start took so far.
    """

    def frames() -> tuple[DataFrame, DataFrame | None]:
        assert config.data.train is not None
        test = config.data.test
        return read_parquet(session, config.data.train), None if test is None else read_parquet(session, test)

    return _train(session, config, frames, None, observers, record, run_id=run_id, start_up=start_up)


def _train(
    session: SparkSession,
    config: Config,
    frames: Callable[[], tuple[DataFrame, DataFrame | None]],
    module: nn.Module | None,
    observers: Sequence[Observer],
    record: Record | None,
    before_gradients: Callable[[int, int], None] | None = None,
    *,
    run_id: str | None = None,
    start_up: StartUp | None = None,
) -> Training:
    """Train on frames that are made once there are slots: to read a schema is a job already."""
    if config.engine.name == "inline":
        raise ConfigError(
            'engine.name is "inline", which computes without Spark: for rows of a session use "tree", '
            '"allreduce" or "auto"'
        )
    instruction_set.pin(config.train.instruction_set)
    start_up = start_up or StartUp()
    cluster = Cluster(session, config, run_id)
    start_up.reached("containers")
    if config.engine.name == "auto" and not config.needs_barrier:
        log.info("engine: tree, because the all-reduce engine's workers all wait for each other")
    make_engine = _ENGINES[config.engine.name] if config.needs_barrier else ArrivalsEngine
    check_session(session, config.train)
    if config.engine.name == "allreduce":
        AllReduceEngine.check(cluster, config.engine)
    with cluster.job_group():
        start_up.unpacked(cluster.unpacked_environments())
        with cluster.job_watch.over(1):
            rows, test = frames()
        try:
            return train_anywhere(
                config,
                rows=DataFrameRows(rows, cluster, config.data.placement),
                test=None if test is None else DataFrameRows(test, cluster),
                make_engine=partial(make_engine, cluster, config.engine),
                module=module,
                observers=observers,
                record=record,
                before_gradients=before_gradients,
                start_up=start_up,
            )
        except SparkSGDError:
            raise
        except Exception as error:
            if cluster.is_stopped():  # then any call into it may fail, with words of its own
                raise session_stopped(cluster.context) from error
            raise


def _chosen(
    cluster: Cluster, config: EngineConfig, plan: Plan, shards: Shards, test: Shards | None
) -> Engine:
    """Return the all-reduce engine where its workers can meet, else the tree engine; and say why."""
    if cluster.num_workers == 1:
        log.info("engine: tree, because there is one worker, which has nobody to sum with")
        return TreeEngine(cluster, config, plan, shards, test)
    try:
        engine = AllReduceEngine(cluster, config, plan, shards, test)
    except ClusterError as error:
        obstacle: str | None = str(error)
    else:
        with ExitStack() as unless_chosen:
            unless_chosen.callback(engine.close)
            obstacle = engine.obstacle()
            if obstacle is None:
                unless_chosen.pop_all()
                log.info("engine: allreduce, because all %d workers reach each other", cluster.num_workers)
                return engine
    log.warning("engine: tree, because workers cannot sum among themselves: %s", obstacle)
    return TreeEngine(cluster, config, plan, shards, test)


_ENGINES: dict[str, Callable[[Cluster, EngineConfig, Plan, Shards, Shards | None], Engine]] = {
    "tree": TreeEngine,
    "allreduce": AllReduceEngine,
    "auto": _chosen,
}
