"""Training in this process alone, on Parquet, without Spark."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import nn

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.tables import refuse_tables
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import DataError
from sparksgd.storage import local_copy
from sparksgd.training.checkpointing import CheckpointStore
from sparksgd.training.loop import train
from sparksgd.training.replay import Replay
from sparksgd.training.start_up import StartUp
from sparksgd.training.state import Observer, Training

__all__ = ["train_in_process"]


def train_in_process(
    config: Config,
    rows: str,
    test: str | None = None,
    *,
    module: nn.Module | None = None,
    observers: Sequence[Observer] = (),
    replay: Replay | None = None,
    start_up: StartUp | None = None,
    checkpoints: CheckpointStore | None = None,
) -> Training:
    """Train a module on the rows of Parquet by the inline engine; files on other machines are copied first.

    Args:
        config: what to train, and how; `data.train` and `data.test` are ignored.
        rows: a path or URI of the rows to train on.
        test: a path or URI of the rows to evaluate on.
        module: a module of your own, instead of the one that config.model names; trained in place.
        observers: who watches.
        replay: an earlier run of the same configuration, to be repeated.
        start_up: what the run's start took so far.
        checkpoints: where checkpoints go, and the one that the run goes on from; None: there are none.

    Returns:
        The finished run; its `module` is trained.

    Raises:
        SparkSGDError: see sparksgd/errors.py.
    """
    with ExitStack() as copies:
        return train(
            config,
            rows=_rows(rows, copies),
            test=None if test is None else _rows(test, copies),
            make_engine=InlineEngine,
            module=module,
            observers=observers,
            replay=replay,
            start_up=start_up,
            checkpoints=checkpoints,
        )


def _rows(path: str, copies: ExitStack) -> ParquetRows:
    refuse_tables(path, by_spark=False)
    try:
        return ParquetRows(copies.enter_context(local_copy(path)))
    except OSError as error:
        raise DataError(f"cannot read {path} as Parquet: {error.strerror}") from error
