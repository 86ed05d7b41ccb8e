"""The training loop: one for every engine.

    rows ── checked ── dealt into shards ── engine.advance(solver) ... evaluate ── a trained module

What goes wrong goes up as an error; the weights of the last good step are handed to the observers
first.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from sparksgd.compute import Plan, try_out
from sparksgd.config import Config, DataConfig, ModelConfig
from sparksgd.engines.protocol import Engine, MakeEngine, Recovery, Shards, StepReport
from sparksgd.errors import (
    ConfigError,
    DataError,
    ModelError,
    NotFinite,
    ReplayDiffers,
    ShardChanged,
    UpdateNotFinite,
    UserCodeError,
)
from sparksgd.flat import FlatModule, mixes_rows
from sparksgd.imports import resolve
from sparksgd.losses import CLASSIFIERS, Loss, binary_cross_entropy, loss_named
from sparksgd.models import MODELS
from sparksgd.numerics import Numerics, generator_kept, thread_count
from sparksgd.participation import Participation, Record
from sparksgd.rows import RowReport, RowSchema, read_rows
from sparksgd.sampling import Sampling
from sparksgd.seeds import seed32
from sparksgd.shard import Descriptor
from sparksgd.solvers.synchronous import SynchronousSolver
from sparksgd.start_up import StartUp
from sparksgd.step_times import StepTimes

__all__ = [
    "EvaluationReport",
    "NumericsChange",
    "Observer",
    "RowSource",
    "Training",
    "build_module",
    "check_solver",
    "train",
]

log = logging.getLogger("sparksgd")

_FIRST_ROWS = 64
_TRIED_ROWS = 4


class RowSource(Protocol):
    """Rows somewhere: a DataFrame, or files."""

    def first_rows(self, columns: list[str], count: int) -> tuple[pa.Schema, pa.Table]:
        """Return the schema of all columns, and the first rows without nulls in these."""
        ...

    def inspect(self, schema: RowSchema, num_shards: int) -> RowReport:
        """Read every row once, and report; on each shard's rows, too, where their content deals them."""
        ...

    def deal(self, schema: RowSchema, num_shards: int, expected: RowReport, deal: int = 0) -> Shards:
        """Write every good row to its shard; another number of the deal makes other shards."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The module on the test rows, after a step."""

    step: int
    epoch: int
    loss: float
    accuracy: float | None
    rows: int
    time_s: float


@dataclass(frozen=True, kw_only=True)
class NumericsChange:
    """A worker whose arithmetic changed, because another executor took its place."""

    step: int
    worker: int
    numerics: Numerics


@dataclass(kw_only=True)
class Training:
    """A run, as far as it has come."""

    config: Config
    """What was asked for."""

    module: nn.Module
    """Its parameters are the solver's."""

    model_name: str | None
    """What rebuilds the module; None where it was given in Python."""

    flat: FlatModule
    """The module as vectors."""

    plan: Plan
    """What the workers do."""

    rows: RowReport
    """The rows trained on."""

    test_rows: RowReport | None
    """The rows evaluated on."""

    total_steps: int
    """Steps to make."""

    numerics: list[Numerics]
    """Of the driver, then of each worker."""

    version: int = 0
    """Steps that made the module's parameters."""

    step_times: StepTimes = field(default_factory=StepTimes)
    """What the steps took."""

    evaluations: list[EvaluationReport] = field(default_factory=list)
    """Evaluations made."""

    engine: str
    """The engine's name."""

    recovery: Recovery = field(default_factory=Recovery)
    """What the engine had to mend."""

    participation: Participation
    """Which shards took part, and when workers answered."""

    mode: str
    """How the engine runs steps."""

    sent_bytes: int = 0
    """Bytes of vectors that workers sent to each other, all of them together."""

    numerics_changes: list[NumericsChange] = field(default_factory=list)
    """Workers that were replaced by others, of other arithmetic."""

    start_up: StartUp
    """Where the time before the first step went."""

    error: BaseException | None = None
    """What ended the run early."""

    @property
    def is_finished(self) -> bool:
        """Whether all steps are made."""
        return self.error is None and self.version >= self.total_steps

    @property
    def sent_bytes_per_worker_step(self) -> float:
        """Bytes of vectors that a worker sent to others in a step, on average."""
        worker_steps = (len(self.numerics) - 1) * len(self.step_times)
        return self.sent_bytes / worker_steps if worker_steps else 0.0

    @property
    def last_evaluation(self) -> EvaluationReport | None:
        """The newest one that the run stands by: none of weights that a NaN loss made it give up."""
        standing = [report for report in self.evaluations if report.step <= self.version]
        return standing[-1] if standing else None


class Observer(Protocol):
    """Watches a run: writes its files, draws its progress."""

    def started(self, training: Training) -> None:
        """The first step is next."""
        ...

    def stepped(self, training: Training, report: StepReport) -> None:
        """A step was made."""
        ...

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """The weights were evaluated."""
        ...

    def ended(self, training: Training) -> None:
        """No step will follow; `training.error` says why, if it ended early."""
        ...


def build_module(config: ModelConfig, seed: int) -> nn.Module:
    """Return the module that a configuration names, its parameters drawn from the seed."""
    factory = resolve("model.name", config.name, MODELS)
    try:
        with generator_kept() as generator:
            generator.manual_seed(seed32(seed, "module"))
            module = factory(**config.arguments)
    except Exception as error:
        raise ConfigError(
            f"model.name is {config.name!r}, which does not take {dict(config.arguments)}: "
            f"{type(error).__name__}: {error}{_signature(factory)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model.name is {config.name!r}, which gave a {type(module).__name__}, not a torch module"
        )
    return module


def _signature(factory: Any) -> str:
    try:
        return f"; its arguments are {inspect.signature(factory)}"
    except (TypeError, ValueError):
        return ""


def train(
    config: Config,
    *,
    rows: RowSource,
    test: RowSource | None,
    make_engine: MakeEngine,
    module: nn.Module | None = None,
    observers: Sequence[Observer] = (),
    record: Record | None = None,
    before_gradients: Callable[[int, int], None] | None = None,
    start_up: StartUp | None = None,
    dtype: torch.dtype = torch.float32,
) -> Training:
    """Train a module.

    Args:
        config: what to train, and how.
        rows: rows to train on.
        test: rows to evaluate on; None evaluates nothing.
        make_engine: builds the engine from the plan and the dealt rows.
        module: the module, instead of the one that config.model names; its parameters become views
            of one vector and are trained in place.
        observers: who watches.
        record: of an earlier run of the same experiment, to be repeated: the same shards take part.
        before_gradients: see Plan.before_gradients.
        start_up: what the run's start took so far.
        dtype: type of the parameters; tests use float64.

    Returns:
        The finished run.

    Raises:
        SparkSGDError: see errors.py.
    """
    if config.solver.backup_workers and config.engine.name == "inline" and record is None:
        raise ConfigError(
            f'solver.backup_workers is {config.solver.backup_workers}, but engine.name is "inline", where '
            f'nobody is late: use engine.name = "tree", or replay a run'
        )
    start_up = start_up or StartUp()
    model_name = config.model.name if module is None else None
    if module is None:
        module = build_module(config.model, config.train.seed)
    loss = loss_named(config.loss.name)
    schema, channels_last = _tried_schema(config, module, loss, rows, dtype)
    check_solver(config)
    if not module.training:
        log.warning(
            "the module is in evaluation mode: it trains without dropout, its batch-norm fixed; "
            "call module.train() first if that is not meant"
        )
    if test is not None:
        schema.check_columns(*test.first_rows(schema.columns, 1), "the test data")
    report = _inspected(rows, schema, config, "training")
    test_report = _inspected(test, schema, config, "test") if test is not None else None
    if record is not None:
        record.check(config, report.data_digest)
    num_shards = config.train.num_shards
    if report.rows < num_shards:
        raise ConfigError(
            f"train.num_shards is {num_shards}, but there are {report.rows} rows: "
            f"set train.num_shards to {report.rows} or less"
        )
    steps_per_epoch = math.ceil(report.rows / config.train.rows_per_step)
    total = config.train.epochs * steps_per_epoch
    total = min(total, config.train.steps or total)
    flat = FlatModule(module, dtype)
    solver = SynchronousSolver(
        flat,
        optimizer=config.optimizer,
        schedule=config.schedule,
        solver=config.solver,
        num_shards=num_shards,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        took_part=None if record is None else record.took_part,
    )
    if solver.remark is not None:
        log.warning(solver.remark)
    with ExitStack() as stack:
        deals = stack.enter_context(closing(_Deals(rows, schema, config, report)))
        test_shards = None
        if test is not None and test_report is not None:
            test_shards = stack.enter_context(closing(_dealt(test, schema, config, test_report, "test")))
        start_up.reached("shards")
        sampling = deals.sampling()
        _check_pieces(module, sampling, config.train.rows_per_backward)
        plan = Plan(
            module=copy.deepcopy(module),
            loss=loss,
            schema=schema,
            sampling=sampling,
            worker_half=solver.worker_half(),
            threads=config.train.threads,
            rows_per_backward=config.train.rows_per_backward,
            dtype=dtype,
            channels_last=channels_last,
            before_gradients=before_gradients,
        )
        engine = stack.enter_context(closing(make_engine(plan, deals.shards, test_shards)))
        training = Training(
            config=config,
            module=module,
            model_name=model_name,
            flat=flat,
            plan=plan,
            rows=report,
            test_rows=test_report,
            total_steps=total if record is None else min(total, len(record.took_part)),
            numerics=[Numerics.here(config.train.threads), *engine.contact()],
            engine=engine.name,
            recovery=engine.recovery,
            participation=Participation(num_shards),
            mode=engine.mode,
            start_up=start_up,
        )
        _name_differences(training.numerics)
        with thread_count(config.train.threads):
            _loop(training, engine, solver, observers, deals, record, evaluates=test is not None)
        return training


def _tried_schema(
    config: Config, module: nn.Module, loss: Loss, rows: RowSource, dtype: torch.dtype
) -> tuple[RowSchema, bool]:
    """Return what a row must be, and `Plan.channels_last`, after a gradient of the first rows."""
    data = config.data
    columns = [*data.features, data.label, *([data.id] if data.id else [])]
    arrow_schema, first = rows.first_rows(columns, _FIRST_ROWS)
    classifies = loss in CLASSIFIERS
    complete = first.to_pylist()
    if not complete and set(columns) <= set(arrow_schema.names):
        raise DataError(
            f"there is no row to train on: the data is empty, or every row has a null in {', '.join(columns)}"
        )
    schema = RowSchema.of(
        arrow_schema,
        _typical(complete, data.features) if complete else {},
        features=data.features,
        label=data.label,
        id=data.id,
        whole_labels=classifies,
    )
    sample = read_rows(first.select(schema.columns).combine_chunks().to_batches()[0], schema).records
    made_up = not len(sample)
    if made_up:
        sample = np.zeros(_TRIED_ROWS, schema.record)  # all of the first rows are bad: others may not be
    if classifies:
        schema.label_array(sample)[:] = 0  # a label out of range is the row's fault, told later
    try:
        output, channels_last = try_out(module, loss, schema, sample[:_TRIED_ROWS], dtype)
    except UserCodeError:
        if not made_up:
            raise
        return schema, False  # it may take no zeros, and the inspection names the bad rows
    if classifies:
        schema = replace(schema, classes=2 if loss is binary_cross_entropy else output[1])
    return schema, channels_last


def _typical(rows: Sequence[dict[str, Any]], features: Sequence[str]) -> dict[str, Any]:
    """Return the first row whose features are as long as most rows': one bad row shapes no schema."""

    def lengths(row: dict[str, Any]) -> tuple[int, ...]:
        return tuple(len(row[name]) if isinstance(row.get(name), Sized) else 0 for name in features)

    (common, _), *_ = Counter(map(lengths, rows)).most_common(1)
    return next(row for row in rows if lengths(row) == common)


def check_solver(config: Config) -> None:
    """Refuse an optimiser or a schedule that cannot be made, before anything waits for it."""
    SynchronousSolver(
        FlatModule(nn.ParameterList([nn.Parameter(torch.zeros(2, 2))])),
        optimizer=config.optimizer,
        schedule=config.schedule,
        solver=config.solver,
        num_shards=config.train.num_shards,
        steps_per_epoch=1,
        total_steps=0,
    )


def _inspected(source: RowSource, schema: RowSchema, config: Config, which: str) -> RowReport:
    started = time.perf_counter()
    report = source.inspect(schema, config.train.num_shards)
    done = "trained" if which == "training" else "evaluated"
    report.check(config.data.on_bad_row, config.data.max_bad_rows, done=done)
    if report.bad:
        log.warning("%d bad %s rows skipped: %s", report.bad.total(), which, dict(report.bad))
    if not report.rows:
        raise DataError(f"the {which} data is empty: not one row")
    seconds = time.perf_counter() - started
    log.info("%s rows: %s, each checked (%.1f s)", which, f"{report.rows:,}", seconds)
    return report


class _Deals:
    """The shards of the rows to train on: dealt once, and anew where some of them starve.

    Args:
        source: the rows.
        schema: what a row must be.
        config: what to train, and how.
        report: on all rows.
    """

    def __init__(self, source: RowSource, schema: RowSchema, config: Config, report: RowReport) -> None:
        self._source, self._schema, self._config, self._report = source, schema, config, report
        self.number = 0
        self.shards = _dealt(source, schema, config, report, "training")

    def sampling(self) -> Sampling:
        """Return which of their rows take part when."""
        return Sampling(
            shard_rows=tuple(shard.rows for shard in self.shards.table),
            rows_per_step=self._config.train.rows_per_step,
            seed=self._config.train.seed,
        )

    def anew(self, training: Training, engine: Engine) -> None:
        """Deal the rows by another hash, and let the engine go on with them."""
        before, number = self.shards, self.number + 1

        def deal() -> tuple[Plan, Shards]:
            report = replace(self._report, shard_digests={})  # those are of the first deal
            self.shards = _dealt(self._source, self._schema, self._config, report, "training", number)
            sampling = self.sampling()
            _check_pieces(training.module, sampling, self._config.train.rows_per_backward)
            training.plan = replace(training.plan, sampling=sampling, deal=number)
            return training.plan, self.shards

        try:
            engine.deal_anew(deal)
        except ModelError as error:
            self.shards, refused = before, self.shards
            refused.close()
            log.warning("the rows stay in their shards: %s", error)
            return
        self.number = number
        before.close()

    def close(self) -> None:
        """Remove the files."""
        self.shards.close()


def _next_deal(
    deals: _Deals, record: Record | None, training: Training, engine: Engine, solver: SynchronousSolver
) -> None:
    """At an epoch's end, deal the rows anew if a shard hardly took part; in a replay, if they were."""
    starved = training.participation.starved()
    training.participation.begin_epoch()
    goes_on = solver.step < training.total_steps
    if starved and record is None:
        log.warning(
            "starved: %s; their rows hardly trained%s",
            ", ".join(f"shard {shard} took part in {share:.0%} of steps" for shard, share in starved.items()),
            ", and all rows are dealt anew for the next epoch" if goes_on else "",
        )
    if goes_on and (starved if record is None else record.deals[solver.step] != deals.number):
        deals.anew(training, engine)


def _compare(training: Training, record: Record) -> None:
    """Say whether a replay ended where the run did."""
    if record.parameters_sha256 is None or training.version != len(record.took_part):
        log.info("replayed %d steps; the record has no digest of that many", training.version)
        return
    ended = training.flat.parameters_sha256()
    if ended != record.parameters_sha256:
        raise ReplayDiffers(
            f"the replay ended at parameters {ended}, but the run at {record.parameters_sha256}: the same "
            f"rows and shards, so torch computes differently here (see numerics in both summary.json; "
            f"train.instruction_set holds machines to one)"
        )
    log.info("replayed: the same %d steps, the same parameters", training.version)


def _dealt(
    source: RowSource,
    schema: RowSchema,
    config: Config,
    expected: RowReport,
    which: str,
    deal: int = 0,
) -> Shards:
    """Deal rows into shards, and name what is odd about them."""
    started = time.perf_counter()
    num_shards = config.train.num_shards
    shards = source.deal(schema, num_shards, expected, deal)
    try:
        log.info(
            "%s rows: dealt %sinto %d shards (%.1f s)",
            which,
            "anew " if deal else "",
            num_shards,
            time.perf_counter() - started,
        )
        _check_deal(shards.table, expected, config.data, which)
    except BaseException:
        shards.close()
        raise
    return shards


def _check_deal(table: Sequence[Descriptor], expected: RowReport, data: DataConfig, which: str) -> None:
    dealt = RowReport()
    for shard in table:
        dealt += RowReport(rows=shard.rows, digest=shard.row_digest)
    if (dealt.rows, dealt.digest) != (expected.rows, expected.digest):
        changed = [
            str(shard.shard)
            for shard in table
            if shard.row_digest != expected.shard_digests.get(shard.shard, (0, 0))
        ]
        where = f"; shards {', '.join(changed)} hold other rows" if expected.shard_digests else ""
        raise ShardChanged(
            f"the {which} data changed while it was read: {expected.rows:,} rows (digest "
            f"{expected.data_digest}) were checked, but {dealt.rows:,} (digest {dealt.data_digest}) "
            f"were dealt{where}. Something rewrites the table, or a column is random on every reading: "
            f"write it to Parquet first, and train on that"
        )
    share = expected.rows / len(table)
    for shard in table:
        if shard.rows > 2 * share:
            log.warning(
                "%s shard %d holds %s rows, %.1f times its share, because %s; the worker that owns it is "
                "slower than the others",
                which,
                shard.shard,
                f"{shard.rows:,}",
                shard.rows / share,
                _why_heavy(shard, share, data, which),
            )
    empty = [shard.shard for shard in table if not shard.rows]
    if empty:
        log.warning("%s shards %s are empty: they take part in no step", which, empty)


def _why_heavy(shard: Descriptor, share: float, data: DataConfig, which: str) -> str:
    """Return what made a shard hold more than twice its share."""
    if data.placement == "in_place" and which == "training":
        return "its partitions are larger than others (repartition the data, or deal it hashed)"
    if shard.rows - shard.repeats > 2 * share:
        return "so few rows do not spread evenly (fewer shards would be more even)"
    if data.id is not None:
        return (
            f"{shard.repeats:,} of them repeat the {data.id!r} of another and the same id always meets in "
            f"one shard"
        )
    return (
        f"{shard.repeats:,} of them repeat the features of another and the same features always meet in one "
        f"shard (an id column, data.id, would spread them)"
    )


def _check_pieces(module: nn.Module, sampling: Sampling, rows_per_backward: int | None) -> None:
    """Refuse a batch-norm that would meet a row by itself."""
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


def _name_differences(numerics: Sequence[Numerics]) -> None:
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


def _note_replacements(training: Training, report: StepReport) -> None:
    """Name, and keep, a worker that another of other arithmetic took the place of."""
    for worker in report.workers:
        different = training.numerics[1 + worker.worker].differences(worker.numerics)
        if different:
            training.numerics[1 + worker.worker] = worker.numerics
            training.numerics_changes.append(
                NumericsChange(step=report.step, worker=worker.worker, numerics=worker.numerics)
            )
            log.warning(
                "worker %d was replaced before step %d by one that differs (before / now): %s; other runs "
                "may give other bits (train.instruction_set holds all machines to one)",
                worker.worker,
                report.step,
                "; ".join(different),
            )


def _loop(
    training: Training,
    engine: Engine,
    solver: SynchronousSolver,
    observers: Sequence[Observer],
    deals: _Deals,
    record: Record | None,
    *,
    evaluates: bool,
) -> None:
    steps_per_epoch = training.plan.sampling.steps_per_epoch
    every = training.config.train.eval_every or steps_per_epoch
    for observer in observers:
        observer.started(training)
    try:
        while solver.step < training.total_steps:
            steps = min(training.total_steps - solver.step, engine.segment_steps)
            if evaluates:
                steps = min(steps, every - solver.step % every)
            segment = engine.advance(solver, steps)
            training.start_up.reached("first_step")
            training.version = solver.step
            training.sent_bytes += segment.sent_bytes
            for report in segment.steps:
                _note_replacements(training, report)
                training.step_times.add(report)
                training.participation.add(report)
                for observer in observers:
                    observer.stepped(training, report)
            finished = solver.step == training.total_steps
            if evaluates and (finished or solver.step % every == 0):
                evaluation = _evaluated(training, engine, solver)
                for observer in observers:
                    observer.evaluated(training, evaluation)
            if finished or solver.step % steps_per_epoch == 0:
                _next_deal(deals, record, training, engine, solver)
        if record is not None:
            _compare(training, record)
    except BaseException as error:
        training.error = error
        if isinstance(error, NotFinite) and not isinstance(error, UpdateNotFinite):
            solver.step_back()
        raise
    finally:
        training.version = solver.step
        with ExitStack() as all_of_them:  # also where one cannot
            for observer in reversed(observers):
                all_of_them.callback(observer.ended, training)


def _evaluated(training: Training, engine: Engine, solver: SynchronousSolver) -> EvaluationReport:
    started = time.perf_counter()
    sums = engine.evaluate(solver)
    report = EvaluationReport(
        step=solver.step,
        epoch=training.plan.sampling.epoch_of(solver.step - 1) + 1,
        loss=sums.loss / sums.rows,
        accuracy=None if sums.correct is None else sums.correct / sums.rows,
        rows=sums.rows,
        time_s=time.perf_counter() - started,
    )
    if not math.isfinite(report.loss):
        log.warning("the test loss after step %d is %s: the module is of no use", report.step, report.loss)
    training.evaluations.append(report)
    return report
