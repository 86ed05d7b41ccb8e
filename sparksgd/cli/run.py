"""What the jobs do: train from a configuration, and evaluate a saved model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console

from sparksgd.cli.terminal import Terminal, scores_tables
from sparksgd.config import Config, EngineConfig, TrainConfig
from sparksgd.errors import ConfigError
from sparksgd.runs.asked import Asked, IfExists
from sparksgd.runs.earlier import earlier_run
from sparksgd.runs.fingerprints import code_fingerprints, fingerprints_of
from sparksgd.runs.folder import RunFolder
from sparksgd.runs.holder import attempt_here
from sparksgd.runs.lease import IfRunning
from sparksgd.runs.model import load_model
from sparksgd.solvers.rules import completed
from sparksgd.storage import location
from sparksgd.training.loop import Given
from sparksgd.training.names import check_names
from sparksgd.training.preflight import allowed_engines
from sparksgd.training.replay import Replay
from sparksgd.training.start_up import StartUp
from sparksgd.training.state import Observer

__all__ = ["run", "run_evaluation"]

log = logging.getLogger("sparksgd")


def run(
    config: Config,
    out: str,
    *,
    run_id: str,
    terminal: Terminal,
    callbacks: Sequence[Observer] = (),
    status_when_stopped: int = 0,
    replay: Replay | None = None,
    if_exists: IfExists = "skip",
    resume: str = "auto",
    if_running: IfRunning = "refuse",
) -> int:
    """Train as a configuration says, on its Parquet, write the run's folder, and return the exit status.

    Args:
        config: data.train must be set.
        out: the folder, a path or URI; created if it does not exist.
        run_id: names the run.
        terminal: shows the progress.
        callbacks: who watches it, too.
        status_when_stopped: the exit status of a run that train.max_wall_s stopped.
        replay: an earlier run, to be repeated.
        if_exists: what to do if the folder holds a finished run, or another one, see runs/earlier.py.
        resume: whether the run goes on from a checkpoint: auto, never, must, or the folder of a run.
        if_running: what to do if another run writes to the folder, see `RunFolder.held`.

    Raises:
        SparkSGDError: see errors.py.
    """
    rows, test = config.data.train, config.data.test
    if rows is None:
        raise ConfigError("data.train is not set: name the Parquet to train on")
    if replay is not None and replay.model_name is None:
        raise ConfigError(
            "the run to be replayed trained a module given in Python: replay it in Python, with "
            "train(..., module=, replay=read_replay(folder))"
        )
    code = code_fingerprints(config)  # before it is imported
    config = completed(config)
    kinds = allowed_engines(config, replay)
    on_spark = kinds[0].on_spark
    if on_spark:
        from sparksgd.spark.session import brings_files
    check_names(config, evaluates=test is not None, brings_files=brings_files if on_spark else None)
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # under spark-submit
        from sparksgd.spark.session import refuse_lost_output

        refuse_lost_output(out, "--out")
    start_up = StartUp()
    if on_spark:
        from sparksgd.spark.session import submitted_at_s

        start_up = StartUp(submitted_at_s())
    folder = location(out)
    run_folder = RunFolder(folder, run_id=run_id, called="--out")
    with run_folder.held(if_running), _interruption_told(run_folder):
        run_folder.fingerprints = fingerprints_of(config, replay)  # files may change while we wait
        if not (on_spark and code and brings_files()):  # else the session finds other code than we do here
            _refuse_changed(code, run_folder.fingerprints)
        asked = Asked(
            config=config,
            fingerprints=run_folder.fingerprints,
            if_exists=if_exists,
            resume=resume,
            attempt=attempt_here(),
        )
        found = earlier_run(folder, asked)
        if found.is_done:
            return 0
        run_folder.require_writable()
        given: Given = {
            "observers": (run_folder, *callbacks, terminal),
            "replay": replay,
            "start_up": start_up,
            "checkpoints": run_folder.checkpoints(config, found),
        }
        if on_spark:
            from sparksgd.spark.session import job_session
            from sparksgd.spark.train import train

            name, patience_s = f"sparksgd {folder.name} {run_id}", config.engine.slots_timeout_s
            with job_session(name, config.train, patience_s) as session:
                start_up.reached("submit")
                training = train(session, config, rows, test, run_id=run_id, kinds=kinds, **given)
        else:
            from sparksgd.training.in_process import train_in_process

            training = train_in_process(config, rows, test, **given)
        return status_when_stopped if training.is_out_of_time else 0


def _refuse_changed(code: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse a run whose record would have digests of code that was not imported.

    Args:
        code: digests by their keys, from before the code was imported.
        now: digests that the record has, of code and of other things.

    Raises:
        ConfigError: code was changed since.
    """
    for key, digest in code.items():
        if now.get(key) != digest:
            raise ConfigError(f"the code of {key} was changed while this run waited: start it again")


@contextmanager
def _interruption_told(run_folder: RunFolder) -> Iterator[None]:
    """Let an interruption say where the run ended, and what the same command will do."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(run_folder.after_interruption()) from error


def run_evaluation(folder: str, data: str, trust: Sequence[str] = (), *, strict: bool = False) -> None:
    """Print the scores of a saved model on Parquet.

    Args:
        folder: the folder model/ of a run, a path or URI.
        data: Parquet with the columns that the model was trained on, a path or URI.
        trust: packages whose code may run, if the model names it.
        strict: refuse a model whose code is not that of the training.
    """
    from sparksgd.spark.evaluation import evaluate_parquet
    from sparksgd.spark.session import job_session

    model = load_model(folder, trust=trust, strict=strict)
    patience_s = EngineConfig().slots_timeout_s
    with job_session(f"sparksgd evaluation of {folder}", TrainConfig(), patience_s) as session:
        scores = evaluate_parquet(session, data, model)
    for table in scores_tables(scores.rows, scores.loss, scores.accuracy, scores.confusion):
        Console().print(table)
