"""Training in this process alone, on Parquet, without Spark."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Unpack

from sparksgd.config import Config
from sparksgd.data.held_out import sides_of
from sparksgd.data.local_files import ParquetRows
from sparksgd.data.tables import refuse_tables
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import DataError
from sparksgd.storage import local_copy
from sparksgd.training.loop import Given, train
from sparksgd.training.state import Training

__all__ = ["train_in_process"]


def train_in_process(config: Config, rows: str, test: str | None = None, **given: Unpack[Given]) -> Training:
    """Train a module on the rows of Parquet by the inline engine; files on other machines are copied first.

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
            make_engine=InlineEngine,
            **given,
        )


def _local(path: str, copies: ExitStack) -> str:
    """Return the path of a copy on this machine, or the path itself."""
    refuse_tables(path, by_spark=False)
    try:
        return copies.enter_context(local_copy(path))
    except OSError as error:
        raise DataError(f"cannot read {path} as Parquet: {error.strerror}") from error
