"""What is checked before the first step, so that no run fails after hours for a reason known before.

configuration ── first rows ── trial: some steps of a copy ── schema ── every row inspected
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule, mixes_rows, mixes_rows_of_evaluations
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.config import Config, DataConfig, OptimizerConfig, ScheduleConfig
from sparksgd.data.row_report import RowReport
from sparksgd.data.sampling import Sampling
from sparksgd.data.schema import RowSchema
from sparksgd.data.source import RowSource
from sparksgd.engines.kinds import SIMULATED, EngineKind, candidates, refuse_uncarried
from sparksgd.engines.memory import RunSizes, require_for_trial
from sparksgd.engines.simulated.costs import refuse_impossible
from sparksgd.engines.trial.trial import Found, Use, try_out
from sparksgd.errors import ConfigError, DataError, ModelError, UserCodeError
from sparksgd.models.losses import Loss, has_accuracy, is_of_classes, loss_kind, make_loss, num_classes
from sparksgd.models.metrics import check_ranked
from sparksgd.models.outputs import Output
from sparksgd.models.own_metrics import own_metrics
from sparksgd.solvers.protocol import CentralSolver, Need
from sparksgd.solvers.rules import Experiment, described, make_solver, needs_of, settings_of
from sparksgd.solvers.schedules import own_schedule
from sparksgd.solvers.torch_optimizers import own_optimizer
from sparksgd.solvers.without_compiler import without_compiler
from sparksgd.training.early_stopping import (
    check_judged,
    check_named_metrics,
    check_own_metrics,
    judged_metrics,
    keeps_best,
)
from sparksgd.training.first_rows import first_records
from sparksgd.training.rebuilding import Sample, check_rebuilding, try_metrics
from sparksgd.training.replay import Replay
from sparksgd.training.saved_state import check_saving
from sparksgd.training.shard_states import bytes_of_shard

__all__ = [
    "Checked",
    "allowed_engines",
    "check",
    "check_engine",
    "check_evaluation",
    "check_pieces",
    "check_solver",
    "needs_in",
    "sizes_of",
    "tried_sizes",
    "warn_of_differences",
]

log = logging.getLogger("sparksgd")

_TRIED_ROWS = 4
_TRIED_SIZE = 3  # of a dimension of a parameter


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What is known about a run before its rows are dealt."""

    loss: Loss
    """One value per row."""

    schema: RowSchema
    """What a row must be."""

    channels_last: bool
    """See Plan.channels_last."""

    harmless: frozenset[str]
    """See Plan.harmless."""

    float16: bool
    """See Plan.float16."""

    outputs: tuple[Output, ...]
    """What the module gives of a row; none if that is not known, because all of the first rows are bad."""

    optimiser_bytes: int
    """Bytes of what the optimiser keeps."""

    rows: RowReport
    """The rows to train on."""

    test_rows: RowReport | None
    """The rows to evaluate on."""

    needs: frozenset[Need]
    """What the solver needs of the engine."""

    experiment: Experiment
    """What the solver must know about the run."""

    sample: Sample
    """Some rows, to compare a module with the one that is built again."""

    drawn: frozenset[str]
    """Paths of the tensors, arrays and plain values that are others when the module is built again."""


def check(
    config: Config,
    module: nn.Module,
    rows: RowSource,
    test: RowSource | None,
    *,
    loss: Loss,
    kinds: Sequence[EngineKind],
    replay: Replay | None,
    dtype: torch.dtype,
    is_named: bool = False,
) -> Checked:
    """Refuse what cannot be trained, and return what the checks found.

    Args:
        config: what to train, and how.
        module: the module.
        rows: rows to train on; every one is read once.
        test: rows to evaluate on; every one is read once.
        loss: one value per row.
        kinds: the engines that may compute it.
        replay: the run to be repeated.
        dtype: type of the parameters.
        is_named: whether the module was built from its name in the configuration.

    Raises:
        SparkSGDError: see errors.py.
    """
    without_compiler()  # before this process makes its first optimiser
    kind = loss_kind(config.loss)
    needs = needs_in(config, replay)
    check_engine(config, kinds, needs)
    check_judged(config, evaluates=test is not None, classifies=has_accuracy(kind))
    _require_for_trial(module)
    check_named_metrics(config, kind, None)
    schema, found, records = _tried(config, module, loss, rows, dtype, evaluates=test is not None)
    check_named_metrics(config, kind, schema.classes)
    check_own_metrics(config)
    check_solver(config, replay, module, dtype)
    check_saving(module)
    sample = Sample(records=records, schema=schema, threads=config.train.threads, dtype=dtype)
    try_metrics(own_metrics(judged_metrics(config)), module, sample)
    drawn = check_rebuilding(config, module, sample) if is_named else frozenset[str]()
    _warn_of_evaluation_mode(module)
    if test is not None:
        schema.check_columns(*test.first_rows(schema.columns, 1), "the test data")
    report = _inspected(rows, schema, config, "training")
    evaluated = config.data.evaluated_rows
    test_report = _inspected(test, schema, config, evaluated) if test is not None else None
    check_ranked(judged_metrics(config), 0 if test_report is None else test_report.rows)
    if replay is not None:
        evaluated_on = None if test_report is None else test_report.data_digest
        replay.check(config, report.data_digest, report.content_digest, evaluated_on)
    _check_num_shards(config.train.num_shards, report.rows)
    turns_per_epoch = math.ceil(report.rows / config.train.rows_per_step)
    total_turns = config.train.epochs * turns_per_epoch
    return Checked(
        loss=loss,
        schema=schema,
        channels_last=found.channels_last,
        float16=found.float16,
        harmless=found.harmless,
        outputs=found.outputs,
        optimiser_bytes=found.optimiser_bytes,
        rows=report,
        test_rows=test_report,
        needs=needs,
        experiment=_experiment(
            config, turns_per_epoch, min(total_turns, config.train.steps or total_turns), report.rows
        ),
        sample=sample,
        drawn=drawn,
    )


def sizes_of(
    config: Config,
    flat: FlatModule,
    solver: CentralSolver,
    schema: RowSchema,
    optimiser_bytes: int,
    *,
    evaluates: bool,
    has_checkpoints: bool,
) -> RunSizes:
    """Return what a run is made of, in bytes, before its rows are dealt."""
    halves, train = solver.halves, config.train
    piece = math.ceil(train.rows_per_step / train.num_shards)
    return RunSizes(
        weights=flat.parameters.nbytes,
        constants=sum(tensor.numel() * tensor.element_size() for _, tensor in flat.constants()),
        optimiser=optimiser_bytes,
        message_vectors=halves.vectors,
        has_local_models=halves.have_local_models,
        keeps_shards=halves.keep_state,
        reads_differ=Need.ARRIVALS in solver.needs,
        record=schema.record.itemsize,
        piece_rows=min(piece, train.rows_per_backward or piece),
        evaluates=evaluates,
        keeps_best=keeps_best(config.early_stopping),
        by_strips=solver.by_strips,
        shard_state=bytes_of_shard(flat, solver, optimiser_bytes) if has_checkpoints else 0,
    )


def tried_sizes(
    config: Config, module: nn.Module, rows: RowSource
) -> tuple[RunSizes, RowSchema, CentralSolver]:
    """Return what a run is made of, the schema of a row, and a solver; only the first rows are read.

    Args:
        config: what would be trained.
        module: the module.
        rows: rows to train on.

    Raises:
        SparkSGDError: these rows, or the module, would be refused.
    """
    without_compiler()  # before this process makes its first optimiser
    _require_for_trial(module)
    evaluates = config.data.test is not None or config.data.held_out_by is not None
    loss = make_loss(config.loss, config.train.seed)
    schema, found, _ = _tried(config, module, loss, rows, torch.float32, evaluates=evaluates)
    flat = FlatModule(module, torch.float32)
    solver = make_solver(config, flat, _experiment(config, 1, 0))
    sizes = sizes_of(
        config, flat, solver, schema, found.optimiser_bytes, evaluates=evaluates, has_checkpoints=True
    )
    return sizes, schema, solver


def check_solver(
    config: Config,
    replay: Replay | None = None,
    module: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse a solver that cannot be made, before anything else starts.

    Args:
        config: names the rule, the optimiser and the schedule.
        replay: the run to be repeated.
        module: whose parameters the solver would move; None: what the user's own optimiser and schedule do
            is not tried yet, because they may look at these.
        dtype: type of the parameters.

    Raises:
        ConfigError: the rule, its keys, the optimiser or the schedule.
    """
    without_compiler()  # before this process makes its first optimiser
    optimizer, schedule = own_optimizer(config.optimizer), own_schedule(config.schedule)
    if module is not None and (optimizer or schedule):
        trial = FlatModule(copied(module), dtype)
    else:
        trained = [] if module is None else [p for p in module.parameters() if p.requires_grad]
        shapes = {p.ndim: [min(size, _TRIED_SIZE) for size in p.shape] for p in trained} or {2: [2, 2]}
        trial = FlatModule(
            nn.ParameterList(
                [nn.Parameter(torch.zeros(shape, dtype=torch.float32)) for shape in shapes.values()]
            )
        )
        if optimizer:
            config = replace(config, optimizer=OptimizerConfig(), schedule=ScheduleConfig())
        elif schedule:
            config = replace(config, schedule=ScheduleConfig())
    took_part = None if replay is None else replay.took_part
    make_solver(config, trial, _experiment(config, 1, 0), took_part)


def needs_in(config: Config, replay: Replay | None = None) -> frozenset[Need]:
    """Return what a run needs of its engine."""
    took_part = None if replay is None else replay.took_part
    return needs_of(settings_of(config.solver), config.train.num_shards, took_part)


def allowed_engines(config: Config, replay: Replay | None = None) -> list[EngineKind]:
    """Return the engines that a configuration allows, the one to try first at the beginning.

    Args:
        config: with every key of its rule, see `completed`.
        replay: the run to be repeated.

    Raises:
        ConfigError: the solver or the engine cannot be, or they do not go together.
        DataError: the run to be repeated names code that is not trusted.
    """
    if replay is not None:
        replay.check_code()
        replay.check_family(config)
    check_solver(config, replay)
    needs = needs_in(config, replay)
    kinds = candidates(config.engine, needs, described(config.solver))
    check_engine(config, kinds[:1], needs)
    return kinds


def check_engine(config: Config, kinds: Sequence[EngineKind], needs: frozenset[Need]) -> None:
    """Refuse an engine that cannot compute the run, before anything else starts.

    Raises:
        ConfigError: it does not carry what the solver needs, or the placement of the rows.
    """
    for kind in kinds:
        refuse_uncarried(kind, needs, described(config.solver))
        if kind == SIMULATED:
            refuse_impossible(config.cluster, needs)
        if config.data.placement == "in_place" and not kind.on_spark:
            raise ConfigError(
                f'data.placement is "in_place", but {kind}, which has no partitions: use "hashed", or '
                f'engine.name = "tree"'
            )


def _experiment(config: Config, turns_per_epoch: int, total_turns: int, rows: int = 1) -> Experiment:
    return Experiment(
        optimizer=config.optimizer,
        schedule=config.schedule,
        num_shards=config.train.num_shards,
        turns_per_epoch=turns_per_epoch,
        total_turns=total_turns,
        rows=rows,
        seed=config.train.seed,
    )


def check_pieces(module: nn.Module, sampling: Sampling, rows_per_backward: int | None) -> None:
    """Refuse a batch-norm that would get a single row."""
    if not mixes_rows(module):
        return
    for size in sorted(sampling.piece_sizes()):
        chunk = rows_per_backward or size
        if size % chunk == 1 or chunk == 1:
            raise ModelError(
                f"the module has batch-norm, but a piece of {size} rows leaves one row by itself, of which "
                f"there is no variance: train.rows_per_step is {sampling.rows_per_step} over "
                f"{len(sampling.shard_rows)} shards"
                + (f" with train.rows_per_backward {rows_per_backward}" if rows_per_backward else "")
                + "; raise rows_per_step, or lower train.num_shards"
            )


def check_evaluation(module: nn.Module, shard_rows: Sequence[int]) -> None:
    """Refuse a batch-norm without running statistics if a shard of the test data has a single row.

    Args:
        module: the module.
        shard_rows: rows of each shard of the test data.
    """
    if mixes_rows_of_evaluations(module) and 1 in shard_rows:
        raise ModelError(
            f"the module has a batch-norm that keeps no running statistics, so an evaluation takes those of "
            f"its rows; but shard {shard_rows.index(1)} of the test data has one row, of which there is no "
            f"variance: give more test rows, lower train.num_shards, or set track_running_stats=True"
        )


def warn_of_differences(numerics: Sequence[Numerics]) -> None:
    """Warn of each worker whose arithmetic differs from the driver's.

    Args:
        numerics: of the driver, then of each worker.
    """
    driver, *workers = numerics
    for index, worker in enumerate(workers):
        different = driver.differences(worker)
        if different:
            log.warning(
                "worker %d differs from the driver (driver / worker): %s; runs elsewhere may give "
                "other bits (train.instruction_set holds all machines to one)",
                index,
                "; ".join(different),
            )


def _require_for_trial(module: nn.Module) -> None:
    require_for_trial(sum(p.nbytes for p in module.parameters() if p.requires_grad and not is_lazy(p)))


def _tried(
    config: Config,
    module: nn.Module,
    loss: Loss,
    rows: RowSource,
    dtype: torch.dtype,
    *,
    evaluates: bool,
) -> tuple[RowSchema, Found, np.ndarray[Any, Any]]:
    """Return the schema of a row, what the trial found, and some rows."""
    kind = loss_kind(config.loss)
    classifies = is_of_classes(kind)
    schema, sample = first_records(config.data, rows, kind)
    made_up = not len(sample)
    if made_up:
        sample = np.zeros(_TRIED_ROWS, schema.record)  # all of the first rows are bad; later ones may be good
    piece = math.ceil(config.train.rows_per_step / config.train.num_shards)
    use = Use(
        loss=loss,
        schema=schema,
        dtype=dtype,
        classifies=classifies,
        evaluates=evaluates,
        has_pieces=config.train.num_shards > 1 or config.train.rows_per_backward is not None,
        piece_rows=min(piece, config.train.rows_per_backward or piece),
        optimizer=config.optimizer,
        schedule=config.schedule,
        rows_mix=config.model.rows_mix,
        seed=config.train.seed,
        threads=config.train.threads,
    )
    try:
        found = try_out(module, sample, use)
    except UserCodeError:
        if not made_up:
            raise
        return schema, Found(), sample  # zeros may not suit it; the inspection will name the bad rows
    schema = replace(schema, classes=num_classes(kind, found.shapes, schema.num_labels))
    return schema, found, sample


def _warn_of_evaluation_mode(module: nn.Module) -> None:
    if not module.training:
        log.warning(
            "the module is in evaluation mode: it trains without dropout, and its batch-norm is fixed; "
            "if you do not want that, call module.train() first"
        )


def _inspected(source: RowSource, schema: RowSchema, config: Config, which: str) -> RowReport:
    """Read every row once, and refuse too many bad ones; `which` is training, test or held-out."""
    started = time.perf_counter()
    report = source.inspect(schema, config.train.num_shards)
    done = "trained on" if which == "training" else "evaluated on"
    report.check(config.data.on_bad_row, config.data.max_bad_rows, done=done)
    if report.bad:
        log.warning("%d bad %s rows skipped: %s", report.bad.total(), which, dict(report.bad))
    if not report.rows:
        raise DataError(_none_left(config.data, which))
    seconds = time.perf_counter() - started
    log.info("%s rows: %s, each checked (%.1f s)", which, f"{report.rows:,}", seconds)
    return report


def _none_left(data: DataConfig, which: str) -> str:
    """Return what to say where no row is left."""
    key, column = data.held_out_by, data.validation_column
    if key is None or which == "test":
        return f"the {which} data is empty: not one row"
    if column is not None:
        where = "nowhere true" if which == "held-out" else "true in every row"
        return f"the {which} data is empty: {key} is {column!r}, which is {where}"
    other = "larger" if which == "held-out" else "smaller"
    part = data.validation_fraction
    return f"the {which} data is empty: {key} is {part}: set a {other} part, or give more rows"


def _check_num_shards(num_shards: int, rows: int) -> None:
    if rows < num_shards:
        raise ConfigError(
            f"train.num_shards is {num_shards}, but there are {rows} rows: "
            f"set train.num_shards to {rows} or less"
        )
