"""Whether the cluster has the memory, and the disk, that the configuration's run would take.

    module, first rows ── trial ── sizes of the run ── memory of every process, disk of its shards

Without data.train, the rows are those of MNIST if the model is LeNet; of other models nothing can be said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession
from rich.filesize import decimal
from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.schema import RowSchema
from sparksgd.engines.kinds import ALLREDUCE, EngineKind
from sparksgd.engines.memory import Places, RunSizes, Takes, total
from sparksgd.errors import SparkSGDError
from sparksgd.solvers.protocol import CentralSolver
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.memory import (
    Limits,
    at_driver,
    places_of,
    require_memory,
    warn_of_slow_results,
)
from sparksgd.spark.doctor.findings import Finding, broken, good, poor
from sparksgd.spark.doctor.machines import Executor, free_on_disks, listed_disks
from sparksgd.spark.frame_rows import DataFrameRows, disk_bytes, read_parquet, require_disk
from sparksgd.storage.scratch import scratch_folder
from sparksgd.training.preflight import tried_sizes

__all__ = ["Model", "has_rows", "judge_disk", "judge_hosts_memory", "judge_memory", "measured_model"]

_MADE_UP_ROWS = 60_000
_FEW = 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a configuration would train, and on how much."""

    sizes: RunSizes
    schema: RowSchema
    rows: int
    parameters: int
    rows_from: str
    """Where the rows are, for a line."""

    solver: CentralSolver
    """Which would train it."""


def has_rows(config: Config) -> bool:
    """Return whether rows are known to try the module with."""
    return config.data.train is not None or config.model.name == "lenet"


def measured_model(session: SparkSession, config: Config, cluster: Cluster, module: nn.Module) -> Model:
    """Try the module on the first rows, and count all of them.

    Args:
        session: reads the rows.
        config: what would be trained.
        cluster: where they are read.
        module: the one that the configuration names.

    Raises:
        SparkSGDError: the rows, or the module, would be refused.
    """
    if config.data.train is not None:
        frame, rows_from = read_parquet(session, config.data.train), config.data.train
        rows = frame.count()
        sizes, schema, solver = tried_sizes(config, module, DataFrameRows(frame, cluster))
    else:
        few = replace(config.data, features=config.data.features[:1], id=None, weight=None)
        config = replace(config, data=few)
        rows, rows_from = _MADE_UP_ROWS, "rows made up like MNIST's"
        with _made_up(config) as made:
            sizes, schema, solver = tried_sizes(config, module, made)
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Model(
        sizes=sizes, schema=schema, rows=rows, parameters=parameters, rows_from=rows_from, solver=solver
    )


@contextmanager
def _made_up(config: Config) -> Iterator[ParquetRows]:
    """Yield some rows of the size of MNIST's."""
    data, several = config.data, config.loss.kind == "several labels"
    labels = [[row % 2] * 10 if several else row % 10 for row in range(_FEW)]
    columns = {data.features[0]: [bytes(784)] * _FEW, data.label: labels}
    with scratch_folder() as folder:
        path = folder / "rows.parquet"
        pq.write_table(pa.table(columns), path)
        yield ParquetRows(str(path))


def judge_memory(
    cluster: Cluster,
    kinds: Sequence[EngineKind],
    model: Model,
    num_shards: int,
) -> Iterator[Finding]:
    """Yield for each engine whether the session has the memory, and whether its results travel directly.

    Args:
        cluster: where the run would compute.
        kinds: the engines that the configuration allows.
        model: what it trains.
        num_shards: S.
    """
    limits = Limits.of(cluster)
    for kind in kinds:
        try:
            needed = require_memory(cluster, kind, model.sizes, num_shards)
        except SparkSGDError as error:
            yield broken("memory", error, "a larger driver, or larger executors")
            continue
        yield good("memory", f"{kind.name}: {_listed(needed, limits, places_of(cluster, kind, num_shards))}")
        if kind is not ALLREDUCE:
            warn_of_slow_results(cluster, needed.largest_result)


def _listed(needed: Takes, limits: Limits, places: Places) -> str:
    """Return what the processes take of what they have."""
    workers = total(needed.worker_python)
    parts = [
        f"at the driver, with its heap, {decimal(total(at_driver(needed, places)))} of "
        f"{decimal(limits.driver)}",
        f"its heap alone {decimal(total(needed.driver_heap))} of {decimal(limits.driver_heap)}",
    ]
    if limits.executor_heap is not None:
        heap = decimal(total(needed.executor_heap))
        parts.append(f"an executor's heap {heap} of {decimal(limits.executor_heap)}")
    parts.append(f"a worker {decimal(workers)}")
    parts.append(f"a task's result {decimal(needed.largest_result)}")
    return ", ".join(parts)


def judge_hosts_memory(
    cluster: Cluster, kind: EngineKind, model: Model, num_shards: int, found: Sequence[Executor]
) -> Finding | None:
    """Return whether a machine has the memory of all its executors, where no container bounds them.

    Args:
        cluster: where the run would compute.
        kind: the engine.
        model: what it trains.
        num_shards: S.
        found: the executors.

    Returns:
        None where containers bound it, which `judge_memory` has asked.
    """
    limits = Limits.of(cluster)
    if limits.executor is not None:
        return None
    places = places_of(cluster, kind, num_shards)
    needed = require_memory(cluster, kind, model.sizes, num_shards)
    each = places.workers_per_executor * total(needed.worker_python) + total(needed.executor_heap)
    executors = Counter(host for host, _ in {(one.host, one.process) for one in found})
    memory = {one.host: one.memory_bytes for one in found}
    return judge_machines({host: (count * each, memory[host]) for host, count in executors.items()})


def judge_machines(of_host: dict[str, tuple[int, int]]) -> Finding:
    """Return whether machines have what their executors take.

    Args:
        of_host: of each host the bytes that are needed, and those that it has.
    """
    short = {host: pair for host, pair in of_host.items() if pair[0] > pair[1]}
    if short:
        told = "; ".join(f"{host}: {decimal(a)} of {decimal(b)}" for host, (a, b) in sorted(short.items()))
        return poor(
            "executors' hosts",
            f"workers and executors take more than the machine has: {told}",
            "fewer --executor-cores, or engine.num_workers: nothing bounds their memory, so the kernel kills",
        )
    host, (needed, has) = max(of_host.items(), key=lambda item: item[1][0] / item[1][1])
    return good(
        "executors' hosts", f"workers and executors take {decimal(needed)} of {decimal(has)} on {host}"
    )


def judge_disk(schema: RowSchema, rows: int, placement: str, found: Sequence[Executor]) -> Finding:
    """Return whether the shards fit on the executors' disks.

    Args:
        schema: of a row.
        rows: how many.
        placement: hashed or in_place.
        found: the executors.
    """
    free = free_on_disks(found)
    size, passing = disk_bytes(schema, rows)
    try:
        require_disk(size, passing, sum(free.values()), placement)
    except SparkSGDError as error:
        return broken("disk", error, "give spark.local.dir more")
    return good(
        "disk",
        f"{decimal(size)} for shards of {rows:,} rows, and {decimal(passing)} for the way there; "
        f"free: {listed_disks(free)}",
    )
