"""The training loop: one for every engine.

    rows ── checked ── dealt into shards ── engine.advance(solver) ... evaluate ── a trained module

A failure is raised as an error; before that, the observers get the weights of the last good step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import TypedDict, cast

import torch
from torch import nn

from sparksgd.arithmetic.copies import copied
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.numerics import Numerics, thread_count
from sparksgd.arithmetic.scripted import optimiser_off
from sparksgd.arithmetic.settings import Settings, driver_settings, set_by_the_user
from sparksgd.config import Config
from sparksgd.data.source import RowSource
from sparksgd.engines.compute import Plan
from sparksgd.engines.freed_memory import freed_memory_kept_in_block
from sparksgd.engines.kinds import ALLREDUCE
from sparksgd.engines.modes import begin_training
from sparksgd.engines.protocol import Engine, MakeEngine, StepReport
from sparksgd.engines.trial.outside import watch_steps
from sparksgd.errors import NotFinite, UpdateNotFinite
from sparksgd.imports import out_of_memory_told
from sparksgd.imports.same_code import refuse_changed_files
from sparksgd.imports.sources import code_digests
from sparksgd.models.losses import Loss, make_loss
from sparksgd.models.metrics import metric_values
from sparksgd.models.own_metrics import own_metric, own_metrics
from sparksgd.solvers.protocol import CentralSolver, Need, RoundSolver, total_weight
from sparksgd.solvers.rules import completed, make_solver
from sparksgd.training.checkpoint import RunIdentity, Start, check_fit, go_on
from sparksgd.training.checkpoint_rules import SolverRules
from sparksgd.training.checkpointing import Checkpointing, CheckpointStore
from sparksgd.training.deals import Deals, dealt
from sparksgd.training.early_stopping import judge, judged_metrics, keep_best, restore_best
from sparksgd.training.modules import build_module
from sparksgd.training.participation import Participation
from sparksgd.training.preflight import (
    Checked,
    check,
    check_evaluation,
    check_pieces,
    sizes_of,
    warn_of_differences,
)
from sparksgd.training.replay import Replay, check_end, check_steps, refuse_short_trace
from sparksgd.training.shard_states import rule_of_shards
from sparksgd.training.start_up import StartUp, warn_of_start
from sparksgd.training.state import (
    NO_PROBE,
    EvaluationReport,
    NumericsChange,
    Observer,
    Probe,
    Training,
)
from sparksgd.training.unreplaced import Unreplaced, take_up, unreplaced_of

__all__ = ["Given", "steps_until", "train"]

log = logging.getLogger("sparksgd")


class Given(TypedDict, total=False):
    """What a run may be given beside its configuration and rows, on its way to `train`, which explains it."""

    module: nn.Module | None
    loss: Loss | None
    observers: Sequence[Observer]
    replay: Replay | None
    start_up: StartUp | None
    checkpoints: CheckpointStore | None
    probe: Probe


@out_of_memory_told("the driver's Python")
@optimiser_off()
@torch.inference_mode(False)
@torch.enable_grad()
def train(
    config: Config,
    *,
    rows: RowSource,
    test: RowSource | None,
    make_engine: MakeEngine,
    module: nn.Module | None = None,
    loss: Loss | None = None,
    observers: Sequence[Observer] = (),
    replay: Replay | None = None,
    start_up: StartUp | None = None,
    checkpoints: CheckpointStore | None = None,
    probe: Probe = NO_PROBE,
) -> Training:
    """Train a module.

    Args:
        config: what to train, and how.
        rows: rows to train on.
        test: rows to evaluate on; None: no evaluation.
        make_engine: builds the engine from the plan and the dealt rows.
        module: the module, instead of the one that config.model names.  It is trained in place: its
            parameters become views of one vector.
        loss: the loss, where the name of config.loss does not lead to it.
        observers: who watches.
        replay: an earlier run of the same experiment, to be repeated: the same shards take part.
        start_up: what the run's start took so far.
        checkpoints: where checkpoints go, and the one that the run goes on from; None: there are none.
        probe: for tests and benchmarks.

    Returns:
        The finished run.

    Raises:
        SparkSGDError: see errors.py.
    """
    config = completed(config)
    start_up = start_up or StartUp()
    model_name = config.model.name if module is None else None
    if replay is not None:
        replay.check_code()
    code = code_digests({"model.name": model_name, "loss.name": config.loss.name})
    if module is None:
        module = build_module(config.model, config.train.seed)
    begin_training(module)
    loss = loss or make_loss(config.loss, config.train.seed)
    own = own_metrics(judged_metrics(config))
    refuse_changed_files(
        [type(part) for part in module.modules()],
        [model_name, config.loss.name, config.optimizer.name, config.schedule.name, config.solver.name, *own],
    )
    make_engine.check_code(module, loss, *map(own_metric, own))
    checked = check(
        config, module, rows, test, loss=loss,
        kinds=make_engine.kinds, replay=replay, dtype=probe.dtype, is_named=model_name is not None,
    )  # fmt: skip
    flat = FlatModule(module, probe.dtype)
    solver = _solver(config, flat, checked, replay)
    make_engine.check_code(solver.halves, replica=_replica(solver, make_engine))
    resumes = all(kind.resumes for kind in make_engine.kinds)
    if checkpoints is not None and not resumes:
        log.warning(
            "this run has no checkpoints, and cannot go on if it is killed: they do not hold virtual time"
        )
        checkpoints = None
    evaluates = checked.test_rows is not None
    sizes = sizes_of(
        config, flat, solver, checked.schema, checked.optimiser_bytes, evaluates=evaluates,
        has_checkpoints=checkpoints is not None,
    )  # fmt: skip
    make_engine.check_memory(sizes, config.train.num_shards)
    total_turns = _total_turns(checked, solver, replay)
    settings = driver_settings(config.train.threads)
    start = unreplaced = None
    if checkpoints is not None:
        unreplaced = unreplaced_of(flat, checked.drawn, checked.harmless)
        identity = _identity(
            config, checked, total_turns, settings, flat, solver, unreplaced, is_given=model_name is None
        )
        start = checkpoints.begin(identity)
        if start is not None and model_name is not None:
            unreplaced = _taken_up(start, flat, checked, unreplaced)
    with ExitStack() as stack:
        first_deal = 0 if start is None else start.checkpoint.deal
        deals = stack.enter_context(Deals(rows, checked.schema, config, checked.rows, first_deal))
        test_shards = None
        if test is not None and checked.test_rows is not None:
            evaluated = config.data.evaluated_rows
            test_shards = dealt(test, checked.schema, config, checked.test_rows, evaluated)
            stack.enter_context(closing(test_shards))
            check_evaluation(module, [shard.rows for shard in test_shards.table])
        start_up.reached("shards")
        plan = _plan(config, module, checked, deals, solver, settings, probe)
        engine = stack.enter_context(closing(make_engine(plan, deals.shards, test_shards)))
        engine.open()
        training = Training(
            config=config,
            module=module,
            model_name=model_name,
            flat=flat,
            plan=plan,
            rows=checked.rows,
            test_rows=checked.test_rows,
            total_turns=total_turns,
            needs=solver.needs,
            numerics=[Numerics.here(config.train.threads), *engine.contact()],
            engine=engine.name,
            recovery=engine.recovery,
            participation=Participation(config.train.num_shards),
            mode=engine.mode,
            start_up=start_up,
            sample=checked.sample,
            outputs=checked.outputs,
            drawn=checked.drawn,
            code=code,
            unreplaced=unreplaced,
        )
        warn_of_differences(training.numerics)
        keeper = None
        if checkpoints is not None:
            rules = SolverRules(flat, solver, rule_of_shards(config, flat, solver))
            fits = partial(check_fit, training=training, rules=rules, anew="train anew")
            turns_per_epoch, states = checked.experiment.turns_per_epoch, engine.shard_states
            keeper = Checkpointing(config.checkpoint, checkpoints, turns_per_epoch, fits, states)
            stack.callback(keeper.close)
        with thread_count(config.train.threads), freed_memory_kept_in_block():
            if start is not None:
                go_on(training, solver, observers, start, rules, engine)
                start = None  # it holds copies of all weights

            try:
                _loop(training, engine, solver, observers, deals, replay, keeper, evaluates=test is not None)
            except BaseException:
                if checkpoints is not None and model_name is None:
                    checkpoints.stopped(flat.parameters_sha256())
                raise
            if checkpoints is not None and model_name is None:
                checkpoints.stopped(None if training.is_finished else flat.parameters_sha256())
        return training


def _replica(solver: CentralSolver, make_engine: MakeEngine) -> object:
    """Return what makes a solver in each worker, if an engine has workers with solvers."""
    return cast(RoundSolver, solver).make_replica() if ALLREDUCE in make_engine.kinds else None


def _identity(
    config: Config,
    checked: Checked,
    total_turns: int,
    settings: Settings,
    flat: FlatModule,
    solver: CentralSolver,
    unreplaced: Unreplaced,
    *,
    is_given: bool,
) -> RunIdentity:
    """Return what a run is; of a module that was given in Python the first parameters count, too."""
    return RunIdentity(
        module=unreplaced.digest,
        attributes=unreplaced.attributes,
        parameters=flat.parameters_sha256() if is_given else None,
        experiment=config.experiment(),
        data_digest=checked.rows.data_digest,
        test_digest=None if checked.test_rows is None else checked.test_rows.data_digest,
        total_turns=total_turns,
        turns_per_epoch=checked.experiment.turns_per_epoch,
        ends_round=partial(_ends_round, solver, checked.experiment.turns_per_epoch),
        settings=set_by_the_user(settings),
    )


def _ends_round(solver: CentralSolver, turns_per_epoch: int, turns: int) -> bool:
    """Return whether a round ends after so many turns of each shard."""
    if Need.ARRIVALS in solver.needs:
        return turns % turns_per_epoch == 0
    made = 0
    while made < turns:
        made += cast(RoundSolver, solver).turns_at(made)
    return made == turns


def _taken_up(start: Start, flat: FlatModule, checked: Checked, built: Unreplaced) -> Unreplaced:
    """Let a module that was built anew have the constants of a checkpoint; return what it has now."""
    with start.checkpoint.fitting():
        constants = start.checkpoint.constants()
        if not constants:
            return built
        take_up(flat, constants)
    return unreplaced_of(flat, checked.drawn | constants.keys(), checked.harmless)


def _solver(config: Config, flat: FlatModule, checked: Checked, replay: Replay | None) -> CentralSolver:
    took_part = None if replay is None else replay.took_part
    solver = make_solver(config, flat, checked.experiment, took_part)
    watch_steps(getattr(solver, "optimizers", ()))  # a rule may have none
    for remark in solver.remarks:
        log.warning(remark)
    return solver


def _plan(
    config: Config,
    module: nn.Module,
    checked: Checked,
    deals: Deals,
    solver: CentralSolver,
    settings: Settings,
    probe: Probe,
) -> Plan:
    sampling = deals.sampling()
    check_pieces(module, sampling, config.train.rows_per_backward)
    copy, loss = copied((module, checked.loss), {"": module, "loss": checked.loss})
    return Plan(
        module=copy,
        loss=loss,
        schema=checked.schema,
        sampling=sampling,
        deal=deals.number,
        halves=solver.halves,
        threads=config.train.threads,
        rows_per_backward=config.train.rows_per_backward,
        dtype=probe.dtype,
        channels_last=checked.channels_last,
        settings=settings,
        metrics=judged_metrics(config),
        harmless=checked.harmless,
        float16=checked.float16,
        before_gradients=probe.before_gradients,
    )


def _total_turns(checked: Checked, solver: CentralSolver, replay: Replay | None) -> int:
    """Return how many turns are made: those that were asked for, or those of the replayed steps."""
    total, turn = checked.experiment.total_turns, 0
    if replay is None:
        return total
    if replay.arrivals is not None:
        return total
    for _ in replay.took_part:
        turn = min(total, turn + cast(RoundSolver, solver).turns_at(turn))
    return turn


def _loop(
    training: Training,
    engine: Engine,
    solver: CentralSolver,
    observers: Sequence[Observer],
    deals: Deals,
    replay: Replay | None,
    keeper: Checkpointing | None,
    *,
    evaluates: bool,
) -> None:
    turns_per_epoch, total = training.plan.sampling.turns_per_epoch, training.total_turns
    every = training.config.train.eval_every or turns_per_epoch
    rate: float | None = None
    first = solver.version
    told: int | None = solver.version  # all observers know of it; None: some do not know of an evaluation yet

    def settle() -> None:
        """Do what is due after these turns; a run that goes on does what was left undone before it ended."""
        nonlocal told
        finished, begun = solver.turns >= total, training.settled_turns
        is_on_grid = solver.turns // every > begun // every
        ends = training.is_over and not training.is_out_of_time
        if evaluates and (is_on_grid or ends) and not training.is_evaluated:
            evaluation = _evaluated(training, engine, solver)
            told = None
            training.evaluations.append(evaluation)
            training.is_off_grid = not is_on_grid
            solver.evaluated(evaluation.loss, evaluation.accuracy)
            keep_best(training, solver, replay)
            for observer in observers:
                observer.evaluated(training, evaluation)
            told = solver.version
            if replay is None:
                judge(training)
        if finished or solver.turns % turns_per_epoch == 0:
            deals.end_epoch(training, engine, replay)
        training.settled_turns = solver.turns
        limit_s = training.config.train.max_wall_s
        if replay is None and limit_s is not None and training.start_up.elapsed_s() >= limit_s:
            if not training.is_over:
                warn_of_start(training.start_up, limit_s, solver.version - first)
            training.end_by_time()
        if keeper is not None and not training.is_over:
            keeper.offer(training, solver, observers)

    for observer in observers:
        observer.started(training)
    try:
        if replay is None:
            judge(training)  # a run that was ended so before makes no step
        if solver.turns > training.settled_turns:
            settle()
        while not training.is_over:
            due = (solver.turns // every + 1) * every if evaluates else total
            until = min(total, due, (keeper and keeper.next_turn(solver.turns)) or total)
            segment = engine.advance(solver, steps_until(solver, until, engine.segment_steps))
            training.start_up.reached("first_step")
            training.version, training.turns = solver.version, solver.turns
            training.sent_bytes += segment.sent_bytes
            if replay is not None:
                check_steps(segment.steps, replay)
                if not segment.steps:  # its trace ends here
                    refuse_short_trace(solver.version, replay)
                    training.total_turns = solver.turns
            for report in segment.steps:
                _note_replacements(training, report)
                training.step_times.add(report)
                training.virtual_s, rate = report.virtual_s, report.lr
                if report.virtual is not None:
                    training.sent_bytes += report.virtual.sent_bytes
                training.participation.add(report)
                for observer in observers:
                    observer.stepped(training, report)
            told = solver.version
            settle()
        if training.best_weights is not None:
            if keeper is not None:
                keeper.end(training, solver, observers)
                keeper = None  # what follows is of an earlier step
            restore_best(training)
        if replay is not None:
            check_end(training, replay)
    except BaseException as error:
        training.error = error
        if isinstance(error, NotFinite):
            if not isinstance(error, UpdateNotFinite):
                if rate is not None:
                    _tell_rate(error, rate)
                solver.step_back()
                if Need.ARRIVALS in solver.needs:
                    log.warning(
                        "the weights of step %d are kept, but a loss was not finite at weights that were "
                        "some steps older: they may be of no use. Lower optimizer.lr",
                        solver.version,
                    )
            if training.best_weights is not None:  # the last ones are on the way to NaN
                keeper = None
                restore_best(training)
        raise
    finally:
        training.version, training.turns = solver.version, solver.turns
        with ExitStack() as all_of_them:  # even if one of them fails
            for observer in reversed(observers):
                all_of_them.callback(observer.ended, training)
            if keeper is not None and solver.is_whole and solver.version == told:
                all_of_them.callback(keeper.end, training, solver, observers)


def _tell_rate(error: NotFinite, rate: float) -> None:
    """Add the learning rate that led to such weights to an error."""
    error.args = (f"{error}\n  the step before it had the learning rate {rate:g}: try a lower optimizer.lr",)


def steps_until(solver: CentralSolver, turn: int, most: int) -> int:
    """Return how many steps bring every shard to this many turns: at least 1, at most `most`."""
    if most == 1:
        return 1
    steps, made = 0, solver.turns
    while steps < most and (made < turn or not steps):
        made += cast(RoundSolver, solver).turns_at(made)
        steps += 1
    return steps


def _note_replacements(training: Training, report: StepReport) -> None:
    """Warn of a worker that was replaced by one of other arithmetic, and record it."""
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


def _evaluated(training: Training, engine: Engine, solver: CentralSolver) -> EvaluationReport:
    started = time.perf_counter()
    sums = engine.evaluate(solver)
    weight = total_weight(sums)
    report = EvaluationReport(
        step=solver.version,
        turn=solver.turns,
        epoch=training.plan.sampling.epoch_of(solver.turns - 1) + 1,
        loss=sums.loss / weight,
        accuracy=None if sums.correct is None else sums.correct / weight,
        rows=sums.rows,
        time_s=time.perf_counter() - started,
        metrics=metric_values(training.plan.metrics, sums.sums, weight),
    )
    if not math.isfinite(report.loss):
        log.warning("the test loss after step %d is %s: the module is unusable", report.step, report.loss)
    return report
