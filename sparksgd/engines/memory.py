"""How much memory a run takes: at the driver, on executors, in Python workers; said before rows are dealt.

    what a process holds at its peak = the process itself + copies x bytes of
        weights      a vector of the parameters
        optimiser    what it keeps for each of them
        sums         what one worker, or all of them, send to the driver in a step or a segment
        rows         of a piece, or of an evaluation

The copies were counted in the code, and measured by tests/bench/memory_said.py.  What forward
computes between its layers is the module's own affair, and is not counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from sparksgd.engines.forward import EVALUATION_ROWS, TRIAL_ROWS
from sparksgd.engines.kinds import ALLREDUCE, INLINE, SERVER, EngineKind
from sparksgd.errors import OutOfMemory

__all__ = [
    "LARGEST_RESULT",
    "Copies",
    "Places",
    "RunSizes",
    "Takes",
    "limit_files",
    "listed",
    "machine_bytes",
    "require_for_trial",
    "require_here",
    "takes",
    "total",
]

LARGEST_RESULT = (1 << 31) - 1
"""Bytes of a Java array: what one task returns is one."""

_MIB = 1 << 20
_GROUPS = Path("/proc/self/cgroup")

# Processes with nothing of a run in them, and copies at the peak.
_DRIVER_MIB = 375  # Python, torch, pyspark
_WORKER_MIB = 345
_SPARK_MIB = 110  # of heap
_TRIAL = 24  # the module's own, copies that are compared, gradients
_TRIAL_IN_FLOAT64 = 37  # of modules that are small enough to be compared in float64, too
_SMALL = 40_000_000  # bytes of their parameters; see engines/trial/mixing.py
_OPTIMISERS = 3  # of a strip: kept, returned, pickled
_IN_CHECKPOINTS = 3.1  # as it is copied, as the first one is read back, and as that is decoded
_ROOM = 1.4
"""A heap must be so many times what lies in it: Java does not move large arrays, and cannot use every gap
between them."""

_SENT = 2 * _ROOM  # of this step and of the last one, which is removed behind it
_RETURNING = 4 * _ROOM  # a result as Python sent it, serialized, in a message, in one piece
_GROWING = 2 * _ROOM  # the array that it is serialized into grows by doubling
_ARRIVING = 3 * _ROOM  # a result as it came, and twice as it is unwrapped


@dataclass(frozen=True, kw_only=True)
class RunSizes:
    """What a run is made of, in bytes."""

    weights: int
    """A vector of the trainable parameters."""

    constants: int = 0
    """Frozen parameters and buffers."""

    optimiser: int = 0
    """What the optimiser keeps after some steps."""

    message_vectors: int = 1
    """Vectors, each as large as the weights, in a shard's message."""

    has_local_models: bool = False
    """Whether worker halves have models of their own, each with an optimiser."""

    keeps_shards: bool = False
    """Whether a worker keeps such a model for each of its shards; else one for all of them."""

    shard_state: int = 0
    """What a checkpoint holds for each shard."""

    record: int = 0
    """A row."""

    piece_rows: int = 0
    """Rows of one backward pass."""

    evaluates: bool = False
    """Whether test rows are evaluated."""

    reads_differ: bool = False
    """Whether each shard may have weights of another version, as messages that arrive one by one let it."""

    keeps_best: bool = False
    """Whether the driver keeps the weights of the best evaluation, and a copy of them in each checkpoint."""

    by_strips: bool = True
    """All-reduce: whether each worker keeps only its strip of the optimiser."""

    @property
    def message(self) -> int:
        """Bytes of a shard's message."""
        return self.message_vectors * self.weights

    @property
    def local_model(self) -> int:
        """Bytes of a model that a half keeps, if it keeps one: parameters, gradients, what it sends."""
        return 3 * self.weights + self.optimiser if self.has_local_models else 0

    @property
    def trial_rows(self) -> int:
        """Bytes of the rows that the trial reads at once."""
        return self.record * max(min(self.piece_rows, TRIAL_ROWS), EVALUATION_ROWS if self.evaluates else 0)

    @property
    def rows(self) -> int:
        """Bytes of the rows that a process reads at once: of a backward pass, or of an evaluation."""
        return self.record * max(self.piece_rows, EVALUATION_ROWS if self.evaluates else 0)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run computes."""

    num_workers: int = 1

    workers_per_executor: int = 1
    """The most workers that share an executor's heap."""

    in_driver: bool = False
    """Whether the driver's JVM is the executor, too, as in Spark's local mode."""

    shards_of_worker: int = 1
    """The most shards of a worker."""

    sums_of_worker: int = 1
    """The most partial sums that a worker is left with."""

    sums_of_task: int = 1
    """The most partial sums in one task's result."""

    sums: int = 1
    """Partial sums that reach the driver in a step."""


@dataclass(frozen=True)
class Copies:
    """Some copies of one thing."""

    what: str
    copies: float
    bytes: int

    @property
    def total(self) -> int:
        """Bytes of all copies."""
        return round(self.copies * self.bytes)

    def __str__(self) -> str:
        return f"{self.copies:g} x {decimal(self.bytes)} ({self.what})"


Parts = tuple[Copies, ...]


@dataclass(frozen=True, kw_only=True)
class Takes:
    """What a run takes at its peak."""

    trial: Parts
    """The driver's Python process in the trial before the training; the JVM has only just started then."""

    steps: Parts
    """The driver's Python process from then on."""

    spark: Parts = ()
    """The driver's JVM when it has just started; nothing where there is none."""

    driver_heap: Parts = ()
    """The driver's JVM from then on; nothing where there is none."""

    executor_heap: Parts = ()
    """An executor's JVM; nothing where it is the driver's."""

    worker_python: Parts = ()
    """One Python worker; nothing where the driver computes."""

    results: int = 0
    """Bytes of the results of one Spark job."""

    largest_result: int = 0
    """Bytes of the result of one task."""

    @property
    def driver_python(self) -> Parts:
        """The driver's Python process at its peak."""
        return max(self.trial, self.steps, key=total)

    def at_driver(self, num_workers: int = 0) -> Parts:
        """Return what the driver's container or machine holds at its peak: Python and JVM.

        Args:
            num_workers: how many Python workers are there, too.
        """
        workers = self.workers(num_workers)
        return max((*self.trial, *self.spark), (*self.steps, *self.driver_heap, *workers), key=total)

    def workers(self, count: int) -> Parts:
        """Return what so many Python workers hold."""
        return tuple(Copies(one.what, count * one.copies, one.bytes) for one in self.worker_python)


def total(parts: Sequence[Copies]) -> int:
    """Return the bytes of all parts."""
    return sum(part.total for part in parts)


def listed(parts: Sequence[Copies]) -> str:
    """Return the arithmetic, for an error."""
    return " + ".join(map(str, parts))


def takes(kind: EngineKind, sizes: RunSizes, places: Places | None = None) -> Takes:
    """Return what a run takes at its peak, in bytes.

    Args:
        kind: the engine.
        sizes: of the run.
        places: where it computes; None: in this process.
    """
    trial = _held(
        _DRIVER_MIB, sizes, weights=_of_trial(sizes.weights), optimisers=1, constants=8, rows=sizes.trial_rows
    )
    best = 3 if sizes.keeps_best else 0  # kept, in a checkpoint, and read back from the first one
    if kind is INLINE or places is None:
        steps = _held(
            _DRIVER_MIB, sizes, weights=11.5 + best, optimisers=1, constants=3 + best, local_models=1,
            rows=sizes.rows,
        )  # fmt: skip
        return Takes(trial=trial, steps=steps)
    spark = Copies("Spark", 1, _SPARK_MIB * _MIB)
    if kind is SERVER:  # its vectors travel beside Spark
        return Takes(
            trial=trial,
            steps=_of_server(sizes, places, best),
            spark=(spark,),
            driver_heap=(spark,),
            executor_heap=() if places.in_driver else (spark,),
            worker_python=_of_server_s_worker(sizes, places),
        )
    result, results = _results(kind, sizes, places)
    by_allreduce = kind is ALLREDUCE
    steps = _held(
        _DRIVER_MIB, sizes, weights=6 + best, optimisers=2 if by_allreduce else 1, constants=3 + best,
        results=(3, results),
    )  # fmt: skip  # it reads no rows
    sent = Copies("what is sent to workers", _SENT, sizes.weights + (sizes.optimiser if by_allreduce else 0))
    returning = Copies("results that executors return", _RETURNING * places.workers_per_executor, result)
    growing = Copies("a result that is serialized", _GROWING, result)
    leaving: Parts = (returning, growing)
    arriving: Parts = (Copies("results that arrive", _ARRIVING, results),)
    return Takes(
        trial=trial,
        steps=steps,
        spark=(spark,),
        driver_heap=(spark, sent, *(max(leaving, arriving, key=total) if places.in_driver else arriving)),
        executor_heap=() if places.in_driver else (spark, sent, *leaving),
        worker_python=_of_worker(kind, sizes, places),
        results=results,
        largest_result=result if by_allreduce else places.sums_of_task * sizes.message,
    )


def _of_server(sizes: RunSizes, places: Places, best: int) -> Parts:
    """Return what the driver holds: for each shard the weights that it has read, and its message."""
    shards = places.num_workers * places.shards_of_worker
    return _held(
        _DRIVER_MIB, sizes, weights=6 + best + shards, optimisers=1, constants=3 + best,
        results=(shards, sizes.message),
    )  # fmt: skip


def _of_server_s_worker(sizes: RunSizes, places: Places) -> Parts:
    """Return what one of its workers holds: each shard has an answer of its own, and maybe a model."""
    return _held(
        _WORKER_MIB, sizes, weights=8.75 + places.shards_of_worker, constants=3,
        local_models=places.shards_of_worker if sizes.keeps_shards else 1,
        results=(2, sizes.message), rows=sizes.rows,
    )  # fmt: skip


def _results(kind: EngineKind, sizes: RunSizes, places: Places) -> tuple[int, int]:
    """Return the bytes that a worker returns in a step or segment, at most, and all that reach the driver."""
    if kind is not ALLREDUCE:
        return places.sums_of_worker * sizes.message, places.sums * sizes.message
    state = sizes.weights + sizes.optimiser
    return (-(-state // places.num_workers) if sizes.by_strips else state), state


def _of_worker(kind: EngineKind, sizes: RunSizes, places: Places) -> Parts:
    """Return what one Python worker holds."""
    several = places.shards_of_worker > 1
    models = places.shards_of_worker if sizes.keeps_shards else 1
    if kind is not ALLREDUCE:
        # Each sum, and two more messages: of the shard that is computed, and the reply on its way.
        sums = (places.sums_of_worker + 2, sizes.message)
        weights = 8.75 if several else 8.25
        return _held(
            _WORKER_MIB,
            sizes,
            weights=weights,
            constants=3,
            local_models=models,
            results=sums,
            rows=sizes.rows,
        )
    weights = (10.0 if several else 8.75) + (2 if sizes.has_local_models else 0)  # the centre's, apart
    strips = places.num_workers if sizes.by_strips else 1
    return _held(
        _WORKER_MIB,
        sizes,
        weights=weights,
        optimisers=1 + _OPTIMISERS / strips,
        constants=3,
        local_models=models,
        results=(2 + places.sums / places.num_workers, sizes.message),
        rows=sizes.rows,
    )


def _held(
    process_mib: int,
    sizes: RunSizes,
    *,
    weights: float,
    optimisers: float = 0,
    constants: int = 0,
    local_models: int = 0,
    results: tuple[float, int] = (0, 0),
    rows: int = 0,
) -> Parts:
    """Return what a Python process holds: itself, copies of these things, and rows."""
    parts = (
        Copies("Python and torch", 1, process_mib * _MIB),
        Copies("weights", weights, sizes.weights),
        Copies("the optimiser's state", optimisers, sizes.optimiser),
        Copies("frozen parameters and buffers", constants, sizes.constants),
        Copies("local models", local_models, sizes.local_model),
        Copies("sums and results", *results),
        Copies("rows", 3, rows),  # records, tensors of them, and what a cast makes
    )
    return tuple(part for part in parts if part.total)


# What this process may use


def machine_bytes() -> int:
    """Return the memory of this machine, or of the least group of processes that bounds this one."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in limit_files(_GROUPS.read_text() if _GROUPS.exists() else ""):
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return min(found)


def limit_files(groups: str) -> Iterator[Path]:
    """Yield the files that may bound the memory of a process: those of its groups, and of the groups around.

    >>> [str(file) for file in limit_files("0::/slurm/job_7\\n")]  # cgroup v2
    ['/sys/fs/cgroup/slurm/job_7/memory.max', '/sys/fs/cgroup/slurm/memory.max', '/sys/fs/cgroup/memory.max']
    >>> [str(file) for file in limit_files("9:cpu:/\\n4:memory:/yarn\\n")]  # cgroup v1
    ['/sys/fs/cgroup/memory/yarn/memory.limit_in_bytes', '/sys/fs/cgroup/memory/memory.limit_in_bytes']
    """
    for line in groups.splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds and "memory" not in kinds.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder / ("memory.limit_in_bytes" if kinds else "memory.max")
            if folder == root:
                break


def require_here(sizes: RunSizes, num_shards: int) -> None:
    """Refuse a run that is computed in this process, and takes more than this machine has.

    Args:
        sizes: of the run.
        num_shards: S.

    Raises:
        OutOfMemory: with the arithmetic.
    """
    needed, limit = takes(INLINE, sizes).driver_python, machine_bytes()
    of_shard = sizes.weights * sizes.reads_differ + sizes.local_model * sizes.keeps_shards
    if of_shard:
        needed = (*needed, Copies("what each shard keeps", num_shards, of_shard))
    if sizes.shard_state:
        copies = _IN_CHECKPOINTS * num_shards
        needed = (*needed, Copies("what each shard keeps, in checkpoints", copies, sizes.shard_state))
    if total(needed) > limit:
        raise OutOfMemory(
            f"this machine, or its container, has {decimal(limit)} of memory, but the run takes "
            f"{listed(needed)} = {decimal(total(needed))}: use a larger one, or fewer parameters"
        )


def _of_trial(weights: int) -> float:
    """Return how many vectors of so many bytes the trial holds at its peak."""
    return _TRIAL_IN_FLOAT64 if weights <= _SMALL else _TRIAL


def require_for_trial(weights: int) -> None:
    """Refuse parameters of which the trial could not hold its copies.

    Raises:
        OutOfMemory: with the arithmetic.
    """
    needed = _held(_DRIVER_MIB, RunSizes(weights=weights), weights=_of_trial(weights))
    if total(needed) > machine_bytes():
        raise OutOfMemory(
            f"this machine, or its container, has {decimal(machine_bytes())} of memory, but the trial before "
            f"the training takes {listed(needed)} = {decimal(total(needed))}: use a larger one, or "
            f"fewer parameters"
        )
