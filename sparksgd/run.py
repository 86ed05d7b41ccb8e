"""What the jobs do: train from a configuration, and evaluate a saved model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sparksgd.config import Config, TrainConfig
from sparksgd.output import RunFolder, load_model
from sparksgd.terminal import Terminal, log_to, open_console, scores_tables
from sparksgd.training import Training

__all__ = ["run", "run_evaluation"]


def run(config: Config, out: Path) -> Training:
    """Train as a configuration says, on its Parquet, and write the run's folder.

    Args:
        config: data.train must be set.
        out: the folder.

    Raises:
        SparkSGDError: see errors.py.
    """
    assert config.data.train is not None
    console = open_console()
    log_to(console)
    observers = (RunFolder(out), Terminal(console))
    train, test = config.data.train, config.data.test
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
        )
    from sparksgd.spark.rows import read_parquet
    from sparksgd.spark.session import start_session
    from sparksgd.spark.training import train as train_on_spark

    session = start_session(f"sparksgd {out.name}", config.train)
    try:
        return train_on_spark(
            session,
            config,
            read_parquet(session, train),
            None if test is None else read_parquet(session, test),
            observers=observers,
        )
    finally:
        session.stop()


def run_evaluation(folder: Path, data: str) -> None:
    """Print the scores of a saved model on Parquet.

    Args:
        folder: model/ of a run.
        data: Parquet with the columns that the model was trained on.
    """
    from sparksgd.spark.evaluation import evaluate
    from sparksgd.spark.rows import read_parquet
    from sparksgd.spark.session import start_session

    model = load_model(folder)
    session = start_session("sparksgd evaluation", TrainConfig())
    try:
        scores = evaluate(read_parquet(session, data), model)
    finally:
        session.stop()
    for table in scores_tables(scores.rows, scores.loss, scores.accuracy, scores.confusion):
        Console().print(table)
