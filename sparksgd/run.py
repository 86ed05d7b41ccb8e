"""What the jobs do: train from a configuration, and evaluate a saved model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from sparksgd.config import Config, TrainConfig
from sparksgd.errors import ConfigError
from sparksgd.output import RunFolder, load_model
from sparksgd.participation import Record
from sparksgd.terminal import Terminal, log_to, open_console, scores_tables
from sparksgd.training import Training

__all__ = ["run", "run_evaluation"]


def run(config: Config, out: Path, record: Record | None = None) -> Training:
    """Train as a configuration says, on its Parquet, and write the run's folder.

    Args:
        config: data.train must be set.
        out: the folder; made if need be.
        record: of an earlier run, to be repeated.

    Raises:
        SparkSGDError: see errors.py.
    """
    train, test = config.data.train, config.data.test
    if train is None:
        raise ConfigError("data.train is not set: name the Parquet to train on")
    if record is not None and record.model_name is None:
        raise ConfigError(
            "the run to be replayed trained a module given in Python: replay it there, with "
            "train(..., module=, record=Record.read(folder))"
        )
    _require_writable(out)
    console = open_console()
    log_to(console)
    observers = (RunFolder(out), Terminal(console))
    if config.engine.name == "inline":
        from sparksgd.engines.inline import InlineEngine
        from sparksgd.local_rows import ParquetRows
        from sparksgd.training import train as train_here

        return train_here(
            config,
            rows=ParquetRows(train),
            test=None if test is None else ParquetRows(test),
            make_engine=InlineEngine,
            observers=observers,
            record=record,
        )
    from sparksgd.spark.session import job_session
    from sparksgd.spark.training import train_parquet

    with job_session(f"sparksgd {out.name}", config.train) as session:
        return train_parquet(session, config, observers, record)


def _require_writable(folder: Path) -> None:
    """Refuse, before hours of training, a folder that its results could not go to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {folder} cannot be written: {error.strerror}; name another folder"
        ) from error


def run_evaluation(folder: Path, data: str) -> None:
    """Print the scores of a saved model on Parquet.

    Args:
        folder: model/ of a run.
        data: Parquet with the columns that the model was trained on.
    """
    from sparksgd.spark.evaluation import evaluate
    from sparksgd.spark.rows import read_parquet
    from sparksgd.spark.session import job_session

    model = load_model(folder)
    with job_session("sparksgd evaluation", TrainConfig()) as session:
        scores = evaluate(read_parquet(session, data), model)
    for table in scores_tables(scores.rows, scores.loss, scores.accuracy, scores.confusion):
        Console().print(table)
