"""`sparksgd.train`: training from a Python program, in a Spark session or in this process.

torch and Spark are imported only after the configuration is read: `train.instruction_set` must be known
before torch is imported, and the inline engine needs no Spark.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparksgd.arithmetic import instruction_set
from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError, SparkSGDError
from sparksgd.spark.given_rows import described_value, rows_of_training
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.storage import Location, location

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from torch import nn

    from sparksgd.runs.folder import RunFolder
    from sparksgd.spark.shared_rows import SharedRows
    from sparksgd.training.checkpointing import CheckpointStore
    from sparksgd.training.loop import Given
    from sparksgd.training.replay import Replay
    from sparksgd.training.state import Observer, Training

    _Rows = DataFrame | SharedRows | str

__all__ = ["train"]

log = logging.getLogger("sparksgd")


def train(
    config: Config | Mapping[str, Any],
    rows: DataFrame | SharedRows | str | Path,
    test: DataFrame | SharedRows | str | Path | None = None,
    *,
    module: nn.Module | None = None,
    loss: Callable[..., Any] | None = None,
    observers: Sequence[Observer] = (),
    out: str | Path | None = None,
    replay: Replay | None = None,
    resume_from: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
) -> Training:
    """Train a module on the rows of a DataFrame, or of Parquet.

    With a DataFrame, its own session is used. With paths it is the active session; if there is none, one is
    started, and left running. With `engine.name = "inline"` and paths, training runs in this
    process, without Spark.

    The logger "sparksgd" tells at INFO how far the run is, at most every ten seconds:
    `logging.basicConfig(level=logging.INFO)` shows it.

    Args:
        config: what to train, and how: a `Config`, or a dict of its tables, as
            {"train": {"epochs": 5}}. `rows` and `test` replace `data.train` and `data.test`.
        rows: rows to train on: a DataFrame, or a path or URI of a file or folder of Parquet, which must be no
            table with a log (Delta, Iceberg, Hudi): read such a table by its own reader. Only the
            columns that `data` names are read. In a row, a feature is
            binary (n bytes reach forward as uint8[B, n]), a list of n numbers or a vector of Spark ML
            (float32[B, n] or int64[B, n]), or a number (float32[B] or int64[B]); B rows are one batch. Rows
            that several trainings share, from `sparksgd.deal`, are checked and dealt only once.
        test: rows to evaluate on, like `rows`; None: those that `data.validation_fraction` or
            `data.validation_column` holds out, or none.
        module: a module of your own, with float32 parameters, instead of the one that `model.name` names;
            it is trained in place.
        loss: a loss of your own instead of the one that `loss.name` names: a function (output, label) that
            gives one value for each row, an `nn.Module` that does, or a class of such; `loss.kind` says what
            it is of. One that has an import path is taken by that, and so are model files and checkpoints
            that name it; any other one is sent by value, and `load_model` takes it as loss= again.
        observers: objects that watch the run, each an `Observer`; they may end it by `training.stop`.
        out: a folder, path or URI, for the run's files: metrics.jsonl, summary.json, and the model in
            model/, which `load_model` reads. It is created if it does not exist; the files of an earlier
            run in it are replaced, and one that still runs is refused. None: no files.
        replay: an earlier run of the same configuration, to be repeated, as `read_replay` returns it.
        resume_from: the folder of a run of the same configuration, rows and code that ended early, or with
            fewer epochs: training goes on from its last checkpoint, to the same bits as a run that was never
            stopped. It needs `out`, which may be the same folder.
        checkpoint_dir: a folder for the checkpoints of many runs, as of a cross-validation: each has a
            subfolder, named by its configuration, rows, module and code. A run that has checkpoints there
            goes on from the last one, as one of more epochs does from that of a shorter one; a run that is
            finished there makes no step. A second training of the same run is refused while the first one
            still trains.

    Returns:
        The run, which has ended. Its `module` is trained, `evaluations` has the test loss and accuracy of
        each evaluation, and `step_times` how long the steps took. `stopped_by` says what ended it early.

    Raises:
        ConfigError: an argument, a key of the configuration or its value is refused, before Spark is used.
        DataError: rows or files cannot be trained on.
        ModelError: the module, loss or optimiser cannot be trained.
        TrainingError: the training could not continue, for example because the loss became NaN.
        ClusterError: Spark could not do what was asked of it.

    Example, in this process; with a DataFrame as rows, leave "engine" out:

    >>> import tempfile, pyarrow, pyarrow.parquet, sparksgd, torch
    >>> points = [[x / 9, y / 9] for x in range(10) for y in range(10)]
    >>> table = pyarrow.table({"point": points, "above": [int(x > y) for x, y in points]})
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = f"{folder.name}/points.parquet"
    >>> pyarrow.parquet.write_table(table, path)
    >>> config = {
    ...     "data": {"features": "point", "label": "above"},
    ...     "optimizer": {"name": "Adam", "lr": 0.01},
    ...     "engine": {"name": "inline"},
    ...     "train": {"epochs": 5, "rows_per_step": 20, "num_shards": 4},
    ... }
    >>> module = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> training = sparksgd.train(config, path, path, module=module, out=f"{folder.name}/run")
    >>> training.version, training.evaluations[-1].rows
    (25, 100)
    >>> again = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> model = sparksgd.load_model(f"{folder.name}/run/model", again)
    >>> model.schema.columns
    ['point', 'above']
    """
    config = _configured(config)
    instruction_set.pin(config.train.instruction_set)  # before torch is imported
    rows = rows_of_training("rows", rows)
    test = None if test is None else rows_of_training("test", test)
    _check_arguments(module, observers, replay)
    config = _with_paths(config, rows, test)

    from sparksgd.solvers.rules import completed
    from sparksgd.training.given_loss import with_loss
    from sparksgd.training.names import check_names
    from sparksgd.training.preflight import allowed_engines
    from sparksgd.training.progress import ProgressLines

    config, own_loss = with_loss(completed(config), loss)
    kinds = allowed_engines(config, replay)
    on_spark = kinds[0].on_spark
    if on_spark:
        from sparksgd.spark.session import brings_files
    check_names(
        config,
        evaluates=test is not None,
        has_module=module is not None,
        has_loss=own_loss is not None,
        brings_files=brings_files if on_spark else None,
    )
    lead_to_hadoop()
    given_code = {"module": module, "loss": own_loss}
    folder, checkpoints_of = _files(config, out, resume_from, checkpoint_dir, replay, given_code)
    with ExitStack() as run:
        if folder is not None:
            run.enter_context(folder.held())
            folder.require_writable()
            observers = (folder, *observers)
        given: Given = {
            "module": module,
            "loss": own_loss,
            "observers": (
                *observers,
                ProgressLines(),
            ),  # last, so that the user's observers keep their numbers in checkpoints
            "replay": replay,
            "checkpoints": checkpoints_of(run),
        }
        if isinstance(rows, str) and (test is None or isinstance(test, str)) and not on_spark:
            from sparksgd.training.in_process import train_in_process

            return train_in_process(config, rows, test, **given)
        from sparksgd.spark.signals import interrupted_quietly
        from sparksgd.spark.train import train as train_in_session

        session, run_id = _session(config, rows, test), None if folder is None else folder.run_id
        with interrupted_quietly():
            return train_in_session(session, config, rows, test, run_id=run_id, kinds=kinds, **given)


def _configured(config: object) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return Config.from_dict(config)
    raise ConfigError(
        f"config is {described_value(config)}, but must be a sparksgd.Config or a dict of its tables: "
        f"Config.load(path) reads a TOML file"
    )


def _check_arguments(module: object, observers: object, replay: object) -> None:
    """Refuse arguments of other types than `train` declares, before anything else starts."""
    from torch import nn

    from sparksgd.training.replay import Replay
    from sparksgd.training.state import Observer

    if module is not None and not isinstance(module, nn.Module):
        made = ": make one of the class" if isinstance(module, type) else ""
        raise ConfigError(f"module is {described_value(module)}, but must be a torch.nn.Module{made}")
    if not isinstance(observers, Sequence) or not all(isinstance(each, Observer) for each in observers):
        raise ConfigError(
            f"observers is {described_value(observers)}, but must be a list of instances of sparksgd.Observer"
        )
    if replay is None:
        return
    if not isinstance(replay, Replay):
        raise ConfigError(
            f"replay is {described_value(replay)}, but must be what sparksgd.read_replay(folder) returns"
        )
    if replay.model_name is None and module is None:
        raise ConfigError(
            "module is None, but the run to be replayed trained a module given in Python: pass it as module="
        )


def _with_paths(config: Config, rows: _Rows, test: _Rows | None) -> Config:
    """Return the configuration with the paths of `rows` and `test`; log which paths they replace."""
    train, evaluated = (path if isinstance(path, str) else None for path in (rows, test))
    if config.data.train not in (None, train):
        log.warning("data.train is %s, but rows are given: they are used instead", config.data.train)
    if config.data.test not in (None, evaluated):
        instead = (
            "test is None: nothing is evaluated" if test is None else "test is given: it is used instead"
        )
        log.warning("data.test is %s, but %s", config.data.test, instead)
    return replace(config, data=replace(config.data, train=train, test=evaluated))


def _files(
    config: Config,
    out: object,
    resume_from: object,
    checkpoint_dir: object,
    replay: Replay | None,
    given_code: Mapping[str, Any],
) -> tuple[RunFolder | None, Callable[[ExitStack], CheckpointStore | None]]:
    """Return what writes the run's folder, and what finds its checkpoints once that is held.

    Raises:
        ConfigError: an argument names no folder, or does not go with another.
        DataError: a file is missing.
    """
    from sparksgd.runs.checkpoint_dir import CheckpointFolders
    from sparksgd.runs.earlier import Found, resumable, with_more_steps
    from sparksgd.runs.fingerprints import fingerprints_of
    from sparksgd.runs.folder import RunFolder
    from sparksgd.runs.names import CHECKPOINTS

    fingerprints = fingerprints_of(config, replay, given_code)
    places = {"out": out, "resume_from": resume_from, "checkpoint_dir": checkpoint_dir}
    given = {name: _folder_named(name, value) for name, value in places.items() if value is not None}
    if "resume_from" in given and ("out" not in given or "checkpoint_dir" in given):
        other = "checkpoint_dir is given, too" if "checkpoint_dir" in given else "out is None"
        raise ConfigError(
            f"resume_from is {str(resume_from)!r}, but {other}: pass out=, where the run's own checkpoints "
            f"go, which may be the same folder, and no checkpoint_dir="
        )
    if given:
        config.require_storable("or leave out= and checkpoint_dir= away")
    folder = RunFolder(given["out"], fingerprints) if "out" in given else None

    def checkpoints(until_end: ExitStack) -> CheckpointStore | None:
        if "checkpoint_dir" in given:
            where = location(given["checkpoint_dir"])
            return until_end.enter_context(CheckpointFolders(where, config, fingerprints))
        if folder is None:
            return None
        found = Found()
        if "resume_from" not in given:
            _tell_of_unfinished(location(given["out"]))
        else:
            found = resumable(location(given["resume_from"]), config, fingerprints, "resume_from")
            own = location(given["out"])
            if (own / CHECKPOINTS).names():  # of this very run, which was killed and goes on
                with suppress(ConfigError, DataError):
                    found = with_more_steps(resumable(own, config, fingerprints, "out"), found)
        return folder.checkpoints(config, found)

    return folder, checkpoints


def _tell_of_unfinished(folder: Location) -> None:
    """Warn of a run that could be gone on with, but is replaced."""
    from sparksgd.runs.checkpoints import manifests
    from sparksgd.runs.json_files import read_record
    from sparksgd.runs.names import CHECKPOINTS, SUMMARY

    with suppress(OSError, ValueError, LookupError, SparkSGDError):
        if (folder / SUMMARY).exists() and read_record(folder / SUMMARY)["status"] == "finished":
            return  # also one that early stopping ended
        for last in manifests(folder / CHECKPOINTS)[:1]:
            if last.turns < last.values["total_turns"]:
                log.warning(
                    "out is %s, which holds a run that stopped early and could go on from step %d: it is "
                    "replaced. To go on instead, pass the folder as resume_from=, too", folder, last.step,
                )  # fmt: skip


def _folder_named(name: str, folder: object) -> str:
    if not isinstance(folder, str | Path) or not str(folder).strip():
        raise ConfigError(f"{name} is {described_value(folder)}, but must name a folder, as a str or Path")
    if "PYSPARK_GATEWAY_PORT" in os.environ and name != "resume_from":  # under spark-submit
        from sparksgd.spark.session import refuse_lost_output

        refuse_lost_output(str(folder), name)
    return str(folder)


def _session(config: Config, rows: _Rows, test: _Rows | None) -> SparkSession:
    for given in (rows, test):
        if given is not None and not isinstance(given, str):
            frame: Any = getattr(given, "frame", given)  # of shared rows
            session: SparkSession = frame.sparkSession
            return session
    from sparksgd.spark.session import start_session

    return start_session("sparksgd", config.train)
