"""What the jobs do: train from a configuration, and evaluate a saved model."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack

from rich.console import Console

from sparksgd.config import Config, EngineConfig, TrainConfig
from sparksgd.earlier import IfExists, is_done
from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import source_digest
from sparksgd.output import RunFolder, load_model
from sparksgd.participation import Record
from sparksgd.start_up import StartUp
from sparksgd.storage import Location, fingerprint, local_copy, location, unanswered
from sparksgd.terminal import Terminal, scores_tables
from sparksgd.training import Observer, check_solver

__all__ = ["run", "run_evaluation"]


def run(
    config: Config,
    out: str,
    *,
    run_id: str,
    terminal: Terminal,
    record: Record | None = None,
    if_exists: IfExists = "skip",
) -> None:
    """Train as a configuration says, on its Parquet, and write the run's folder.

    Args:
        config: data.train must be set.
        out: the folder, a path or URI; made if need be.
        run_id: names the run.
        terminal: shows it.
        record: of an earlier run, to be repeated.
        if_exists: what to do if the folder holds a finished run, see `earlier.is_done`.

    Raises:
        SparkSGDError: see errors.py.
    """
    data = {"data.train": config.data.train, "data.test": config.data.test}
    if config.data.train is None:
        raise ConfigError("data.train is not set: name the Parquet to train on")
    if record is not None and record.model_name is None:
        raise ConfigError(
            "the run to be replayed trained a module given in Python: replay it there, with "
            "train(..., module=, record=Record.read(folder))"
        )
    check_solver(config)
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # under spark-submit
        from sparksgd.spark.session import refuse_lost_output

        refuse_lost_output(out)
    on_spark = config.engine.name != "inline"
    start_up = StartUp()
    if on_spark:
        from sparksgd.spark.session import submitted_at_s

        start_up = StartUp(submitted_at_s())
    folder = location(out)
    try:
        fingerprints = {key: fingerprint(path) for key, path in data.items() if path is not None}
    except OSError as error:
        refusal = DataError(f"cannot read {error.filename} as Parquet: {error.strerror}")
        raise unanswered(error, refusal) from error
    code = {
        "model.name": config.model.name,
        "loss.name": config.loss.name,
        "optimizer.name": config.optimizer.name,
        "schedule.name": config.schedule.name,
    }
    digests = {key: source_digest(name) for key, name in code.items()}
    fingerprints |= {key: digest for key, digest in digests.items() if digest is not None}
    if record is not None:
        fingerprints["replay"] = record.fingerprint()
    if is_done(folder, config, fingerprints, if_exists):
        return
    _require_writable(folder)
    observers = (RunFolder(folder, fingerprints, run_id), terminal)
    if on_spark:
        from sparksgd.spark.session import job_session
        from sparksgd.spark.training import train_parquet

        name, patience_s = f"sparksgd {folder.name} {run_id}", config.engine.slots_timeout_s
        with job_session(name, config.train, patience_s) as session:
            start_up.reached("submit")
            train_parquet(session, config, observers, record, run_id=run_id, start_up=start_up)
    else:
        _train_here(config, observers, record, start_up)


def _train_here(
    config: Config, observers: tuple[Observer, ...], record: Record | None, start_up: StartUp
) -> None:
    """Train in this process, on copies of files that are elsewhere."""
    from sparksgd.engines.inline import InlineEngine
    from sparksgd.local_rows import ParquetRows
    from sparksgd.training import train

    with ExitStack() as copies:

        def rows(path: str | None) -> ParquetRows | None:
            if path is None:
                return None
            try:
                return ParquetRows(copies.enter_context(local_copy(path)))
            except OSError as error:
                raise DataError(f"cannot read {path} as Parquet: {error.strerror}") from error

        training_rows = rows(config.data.train)
        assert training_rows is not None
        train(
            config,
            rows=training_rows,
            test=rows(config.data.test),
            make_engine=InlineEngine,
            observers=observers,
            record=record,
            start_up=start_up,
        )


def _require_writable(folder: Location) -> None:
    """Refuse, before hours of training, a folder that its results could not go to."""
    trial = folder / f".{uuid.uuid4().hex}"
    try:
        trial.write_bytes(b"")
        trial.remove()
    except OSError as error:
        refusal = ConfigError(f"--out {folder} cannot be written: {error.strerror}; name another folder")
        raise unanswered(error, refusal) from error


def run_evaluation(folder: str, data: str) -> None:
    """Print the scores of a saved model on Parquet.

    Args:
        folder: model/ of a run, a path or URI.
        data: Parquet with the columns that the model was trained on, a path or URI.
    """
    from sparksgd.spark.evaluation import evaluate_parquet
    from sparksgd.spark.session import job_session

    model = load_model(folder)
    patience_s = EngineConfig().slots_timeout_s
    with job_session(f"sparksgd evaluation of {folder}", TrainConfig(), patience_s) as session:
        scores = evaluate_parquet(session, data, model)
    for table in scores_tables(scores.rows, scores.loss, scores.accuracy, scores.confusion):
        Console().print(table)
