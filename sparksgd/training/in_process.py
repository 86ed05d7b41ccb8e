"""Training in this process alone, on Parquet, without Spark: real or in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Unpack

from sparksgd.config import Config
from sparksgd.data.held_out import sides_of
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.source import Shards
from sparksgd.data.tables import refuse_tables
from sparksgd.engines.compute import Plan
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.kinds import INLINE, SIMULATED, EngineKind
from sparksgd.engines.memory import RunSizes
from sparksgd.engines.protocol import Engine
from sparksgd.engines.recorded import RecordedArrivals
from sparksgd.engines.simulated.engine import SimulatedEngine
from sparksgd.errors import DataError
from sparksgd.storage import local_copy
from sparksgd.training.loop import Given, train
from sparksgd.training.replay import Replay
from sparksgd.training.state import Training

__all__ = ["train_in_process"]


@dataclass(frozen=True)
class _EngineInProcess:
    """Makes the engine that a configuration names, if it computes in this process."""

    config: Config

    replay: Replay | None = None
    """The run to be repeated."""

    @property
    def kinds(self) -> Sequence[EngineKind]:
        """Return the engine."""
        return [SIMULATED if self.config.engine.name == SIMULATED.name else INLINE]

    def check_code(self, *parts: object, replica: object = None) -> None:
        """Refuse nothing: this process has imported all parts."""

    def check_memory(self, sizes: RunSizes, num_shards: int) -> None:
        """Refuse a run that takes more memory than this machine has."""
        InlineEngine.check_memory(sizes, num_shards)

    def __call__(self, plan: Plan, shards: Shards, test: Shards | None) -> Engine:
        """Return the engine, not opened yet."""
        if self.config.engine.name == SIMULATED.name:
            workers = self.config.engine.num_workers or self.config.train.num_shards
            return SimulatedEngine(plan, shards, test, self.config.cluster, workers)
        if self.replay is not None and self.replay.arrivals is not None:
            return RecordedArrivals(plan, shards, test, self.replay.arrivals, self.replay.steps)
        return InlineEngine(plan, shards, test)


def train_in_process(config: Config, rows: str, test: str | None = None, **given: Unpack[Given]) -> Training:
    """Train a module on the rows of Parquet in this process; files on other machines are copied first.

    Args:
        config: what to train, and how; `data.train` and `data.test` are ignored.
        rows: a path or URI of the rows to train on.
        test: a path or URI of the rows to evaluate on; None: those that config.data holds out, or none.
        given: see `sparksgd.training.loop.train`.

    Returns:
        The finished run; its `module` is trained.

    Raises:
        SparkSGDError: see sparksgd/errors.py.
    """
    trained, held_out = sides_of(config.data, has_test=test is not None)
    evaluated = rows if held_out else test
    with ExitStack() as copies:
        local = {path: _local(path, copies) for path in (rows, evaluated) if path is not None}
        return train(
            config,
            rows=ParquetRows(local[rows], trained),
            test=None if evaluated is None else ParquetRows(local[evaluated], held_out),
            make_engine=_EngineInProcess(config, given.get("replay")),
            **given,
        )


def _local(path: str, copies: ExitStack) -> str:
    """Return the path of a copy on this machine, or the path itself."""
    refuse_tables(path, by_spark=False)
    try:
        return copies.enter_context(local_copy(path))
    except OSError as error:
        raise DataError(f"cannot read {path} as Parquet: {error.strerror}") from error
