"""A checkpoint: all that a run's next step depends on, so that it can go on from there to the same bits.

    solver      weights, turns, and what optimisers and schedules keep
    shards      what shards keep in rounds and gossip: models of their own, and their optimisers
    run         how far it is, the deal, who took part, evaluations, arithmetic, what the trial decided
    observers   what each observer must remember, by its class
    best        the weights of the best evaluation, where early stopping keeps them, if of another step
    constants   the tensors and arrays that the module draws anew whenever it is built, see unreplaced.py

Each part has an owner, which is its name, and a version of its own.  So a later part needs no new format, and
an old checkpoint says which of its parts is too old.  Values are copied when it is taken: tensors, numbers,
texts and containers, see encoding.py.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from sparksgd.arithmetic.believed import NotBelieved, only_classes_of
from sparksgd.arithmetic.flat import Weights
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.arithmetic.settings import changed_settings, set_by_the_user
from sparksgd.engines.protocol import Engine, ShardStates
from sparksgd.errors import ConfigError, DataError, ModelError, SparkSGDError
from sparksgd.solvers.protocol import CentralSolver, SolverState
from sparksgd.training.checkpoint_rules import SolverRules, check_run
from sparksgd.training.composition import other_structure, structure
from sparksgd.training.encoding import as_plain, of_plain
from sparksgd.training.memories import memories_of, recall_all
from sparksgd.training.own_state import packages_of
from sparksgd.training.state import EvaluationReport, NumericsChange, Observer, Resumed, Training
from sparksgd.training.unreplaced import check_constants
from sparksgd.training.value_rules import whole

__all__ = [
    "Checkpoint",
    "Part",
    "RunIdentity",
    "Start",
    "check_fit",
    "go_on",
    "taken",
]

log = logging.getLogger("sparksgd")

_VERSIONS = {"solver": 1, "shards": 1, "run": 6, "observers": 1, "best": 1, "constants": 1}
_STILL_READ = {("run", 1), ("run", 2), ("run", 3), ("run", 4), ("run", 5)}
# 1 had no settings, 2 no end before the last turn, 3 no metrics of evaluations, 4 no turns of each shard,
# 5 no digest of attributes
_NOT_OURS = (
    LookupError, TypeError, ValueError, AttributeError, RuntimeError, EOFError, ImportError, ArithmeticError,
    AssertionError, pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """A named part."""

    version: int
    """Of its format."""

    values: dict[str, Any]
    """Plain values and tensors."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What must be the same, so that a run goes on from a checkpoint of another."""

    experiment: Mapping[str, Any]
    """The keys that shape the parameters, see `Config.experiment`."""

    data_digest: str
    """Of the rows trained on."""

    test_digest: str | None = None
    """Of the rows evaluated on."""

    total_turns: int
    """How many turns each shard will make."""

    turns_per_epoch: int
    """Turns of one pass over the rows."""

    ends_round: Callable[[int], bool] = lambda turns: True
    """Returns whether a round of this run, which may be longer, ends after so many turns of each shard."""

    module: str | None = None
    """Digest of what no solver's state replaces in the module, see `Unreplaced`."""

    attributes: str | None = None
    """Likewise, of its tensors and arrays that are neither parameters nor buffers, if it has some."""

    parameters: str | None = None
    """Digest of the first parameters of a module that was given in Python; None for one that is built from
    its name."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """Those of torch that the user's program has set, see `set_by_the_user`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after a step."""

    step: int
    turns: int
    parts: Mapping[str, Part]

    test_loss: float | None = None
    """Of an evaluation of this very step, if there was one."""

    @property
    def deal(self) -> int:
        """Return how often the rows had been dealt again.

        Raises:
            DataError: the part is of another version.
        """
        with self.fitting():
            deal = self.values("run")["deal"]
            whole(0, self.step)(deal, "run.deal")
            return int(deal)

    def constants(self) -> Mapping[str, Any]:
        """Return the tensors and arrays that the module had drawn, by their paths; most modules draw none.

        Raises:
            DataError: the part is none, or of another version.
        """
        if "constants" not in self.parts:
            return {}
        values = self.values("constants")
        check_constants(values)
        tensors: Mapping[str, Any] = values["tensors"]
        return tensors

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Turn what is raised in the block by values that do not fit this run into an error of ours."""
        try:
            yield
        except SparkSGDError:
            raise
        except NotBelieved as error:
            raise DataError(
                f"the checkpoint of step {self.step} is not believed: {error}. If you know whose code "
                f"this is, name its package in SPARKSGD_TRUST"
            ) from error
        except _NOT_OURS as error:
            raise DataError(
                f"the checkpoint of step {self.step} does not fit this run: {type(error).__name__}: {error}"
            ) from error

    def values(self, name: str) -> dict[str, Any]:
        """Return the values of a part, as they were given to `taken`.

        Raises:
            DataError: the part is missing, or of another version.
        """
        part = self.parts.get(name)
        is_read = part is not None and (
            part.version == _VERSIONS[name] or (name, part.version) in _STILL_READ
        )
        if part is None or not is_read:
            was = "has no" if part is None else f"has version {part.version} of the"
            raise DataError(
                f"the checkpoint of step {self.step} {was} part {name!r}, but this version of sparksgd needs "
                f"version {_VERSIONS[name]}: go on with the version that wrote it, or train anew"
            )
        found: dict[str, Any] = of_plain(part.values)
        return found


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run goes on."""

    checkpoint: Checkpoint
    """Its state."""

    resumed: Resumed
    """What is told of it."""

    anew: str
    """How a run that cannot go on from it is trained anew, in the caller's words."""


def taken(
    training: Training, solver: CentralSolver, observers: Sequence[Observer], shards: ShardStates
) -> Checkpoint:
    """Return the state of a run between two steps; everything is copied.

    Args:
        training: the run.
        solver: its central half.
        observers: what they must remember is in it, too.
        shards: what shards keep, see `Engine.shard_states`.

    Raises:
        ConfigError: what an optimiser or an observer keeps cannot be copied.
        OSError: an observer could not bring its files up to this step.
    """
    values: dict[str, dict[str, Any]] = {
        "solver": _of_solver(solver.state()),
        "run": _of_run(training),
        "observers": memories_of(observers),
    }
    if shards:
        values["shards"] = {"states": shards}
    if training.best_weights is not None and training.best_weights.version != solver.version:
        values["best"] = {"weights": _of_weights(training.best_weights)}
    plain = {name: as_plain(of) for name, of in values.items()}
    if (unreplaced := training.unreplaced) is not None and unreplaced.constants:
        plain["constants"] = unreplaced.constants
    return Checkpoint(
        step=solver.version,
        turns=solver.turns,
        parts={name: Part(version=_VERSIONS[name], values=of) for name, of in plain.items()},
        test_loss=training.evaluations[-1].loss if training.is_evaluated else None,
    )


def go_on(
    training: Training,
    solver: CentralSolver,
    observers: Sequence[Observer],
    start: Start,
    rules: SolverRules,
    engine: Engine,
) -> None:
    """Let a run that has made no step go on from a checkpoint.

    Args:
        training: gets its state.
        solver: gets its state.
        observers: get what they had to remember, before they are told that the run starts.
        start: the checkpoint, of a run of the same experiment.
        rules: of the solver.
        engine: gets what shards keep.

    Raises:
        ModelError: it is of another module.
        DataError: it is not whole, or of another version.
    """
    checkpoint = start.checkpoint
    check_fit(checkpoint, training, rules, start.anew)
    with checkpoint.fitting():
        _load(training, solver, checkpoint, start.anew)
        states = checkpoint.values("shards")["states"] if rules.keeps_shards(checkpoint.step) else {}
        with only_classes_of(packages_of(training.config)):
            engine.go_on(solver, training.participation.next_turns(), states)
        training.resumed.append(start.resumed)
        _note_other_numerics(training, checkpoint.values("run")["numerics"])
        recall_all(observers, checkpoint.values("observers"))


def check_fit(checkpoint: Checkpoint, training: Training, rules: SolverRules, anew: str) -> None:
    """Refuse a checkpoint that a run of this experiment could not go on from; nothing is changed.

    Args:
        checkpoint: as it was read.
        training: a run, wherever it is.
        rules: of its solver.
        anew: how a run that cannot go on from it is trained anew.

    Raises:
        ModelError: it is of another module.
        DataError: it is not whole, or of another version.
    """
    with checkpoint.fitting():
        run, state = checkpoint.values("run"), checkpoint.values("solver")
        check_run(run, checkpoint.parts["run"].version, training, checkpoint.step, checkpoint.turns)
        _check_module(training, run, state, checkpoint.step, anew)
        _check_unreplaced(training, run, checkpoint.step, anew)
        rules.check(state, checkpoint.step, checkpoint.turns)
        if rules.keeps_shards(checkpoint.step):
            rules.check_shards(checkpoint.values("shards"))
        _check_circumstances(training, run, anew)
        _check_best(checkpoint, run, rules)
        checkpoint.values("observers")
        checkpoint.constants()


def _check_module(
    training: Training, run: Mapping[str, Any], state: Mapping[str, Any], step: int, anew: str
) -> None:
    different = other_structure(training.module, run["structure"])
    size = training.flat.parameters.numel()
    saved = np.size(state.get("weights", {}).get("parameters", ()))
    if different is None and saved != size:
        different = f"it had {saved:,} trainable parameters, but has {size:,}"
    if different is not None:
        raise ModelError(
            f"the checkpoint of step {step} is of another module: {different}. Pass the module "
            f"that it is of, or {anew}"
        )


def _check_unreplaced(training: Training, run: Mapping[str, Any], step: int, anew: str) -> None:
    """Refuse a module with other numbers, texts, or tensors that are not trained."""
    now = training.unreplaced
    assert now is not None, "there are checkpoints"
    is_unknown = run["unreplaced"] is None and training.model_name is not None  # to the version before
    is_same = run.get("attributes", now.attributes) == now.attributes
    if not is_same or (run["unreplaced"] != now.digest and not is_unknown):
        as_then = "Pass the module as it was built then"
        if training.model_name is not None:
            as_then = (
                f"Let {training.model_name} build the same again, whatever it reads or draws (a file, an "
                f"environment variable, random numbers without a seed)"
            )
        raise ModelError(
            f"the checkpoint of step {step} is of another module: a number or a text that it "
            f"keeps is another now, such as the rate of a dropout, or a tensor that is not trained. "
            f"{as_then}, or {anew}"
        )


def _load(training: Training, solver: CentralSolver, checkpoint: Checkpoint, anew: str) -> None:
    run, state = checkpoint.values("run"), checkpoint.values("solver")
    training.version, training.turns = checkpoint.step, checkpoint.turns
    with only_classes_of(packages_of(training.config)):
        solver.load_state(_solver_state(state))
    _load_run(training, run, anew)
    _load_best(training, checkpoint, solver, run.get("best_step"))


def _of_weights(weights: Weights) -> dict[str, Any]:
    return {field.name: getattr(weights, field.name) for field in fields(weights)}


def _of_solver(state: SolverState) -> dict[str, Any]:
    return {
        "weights": _of_weights(state.weights),
        "turns": state.turns,
        "vectors": dict(state.vectors),
        "rest": dict(state.rest),
    }


def _solver_state(values: Mapping[str, Any]) -> SolverState:
    return SolverState(
        weights=Weights(**values["weights"]),
        turns=values["turns"],
        vectors=values["vectors"],
        rest=values["rest"],
    )


def _of_run(training: Training) -> dict[str, Any]:
    return {
        "structure": structure(training.module),
        "deal": training.plan.deal,
        "participation": training.participation.memory(),
        "evaluations": [asdict(report) for report in training.evaluations],
        "numerics": [asdict(numerics) for numerics in training.numerics],
        "numerics_changes": [asdict(change) for change in training.numerics_changes],
        "recovery": asdict(training.recovery),
        "sent_bytes": training.sent_bytes,
        "settled_turns": training.settled_turns,
        "resumed": [asdict(resumed) for resumed in training.resumed],
        "decided": _decided(training),
        "unreplaced": None if training.unreplaced is None else training.unreplaced.digest,
        "attributes": None if training.unreplaced is None else training.unreplaced.attributes,
        "test_digest": _test_digest(training),
        "settings": set_by_the_user(training.plan.settings),
        "total_turns": training.total_turns,
        "stopped_by": None if training.is_out_of_time else training.stopped_by,
        "is_off_grid": training.is_off_grid,
        "best_step": None if training.best_weights is None else training.best_weights.version,
    }


def _test_digest(training: Training) -> str | None:
    return None if training.test_rows is None else training.test_rows.data_digest


def _decided(training: Training) -> dict[str, bool]:
    """Return what the trial decided about how gradients are computed, which shapes their bits."""
    plan = training.plan
    return {"channels_last": plan.channels_last, "float16": plan.float16}


def _check_circumstances(training: Training, run: Mapping[str, Any], anew: str) -> None:
    """Refuse other settings, and other test rows where these shape the parameters."""
    if run["decided"] != _decided(training):
        raise ModelError(
            f"the trial decided {_decided(training)} for this module, but {run['decided']} when the run "
            f"began: its values before the training are others; build it as it was built then, or {anew}"
        )
    now = set_by_the_user(training.plan.settings)
    if different := changed_settings(run.get("settings", now), now):
        raise ModelError(
            f"the run began under other settings: {'; '.join(different)}. Its other steps would be computed "
            f"otherwise: set them as they were, or {anew}"
        )
    if run["test_digest"] != _test_digest(training) and training.config.is_judged:
        raise DataError(
            f"the rows to evaluate on are not those of the run to go on with, which shaped its parameters: "
            f"their digest is {_test_digest(training)}, but was {run['test_digest']}. Give it those "
            f"rows, or {anew}"
        )


def _check_best(checkpoint: Checkpoint, run: Mapping[str, Any], rules: SolverRules) -> None:
    step = run.get("best_step")
    if step is None:
        return
    if step not in [report["step"] for report in run["evaluations"]]:
        raise DataError(f"run.best_step is {step}, but the run has no evaluation of that step")
    if step != checkpoint.step:
        rules.check_weights(checkpoint.values("best").get("weights"), step, "best.weights")


def _load_run(training: Training, run: Mapping[str, Any], anew: str) -> None:
    training.participation.recall(run["participation"])
    if run["test_digest"] == _test_digest(training):
        training.evaluations[:] = [EvaluationReport(**report) for report in run["evaluations"]]
    training.numerics_changes[:] = [
        NumericsChange(step=change["step"], worker=change["worker"], numerics=Numerics(**change["numerics"]))
        for change in run["numerics_changes"]
    ]
    for name, count in run["recovery"].items():
        setattr(training.recovery, name, getattr(training.recovery, name) + count)
    training.sent_bytes, training.settled_turns = int(run["sent_bytes"]), int(run["settled_turns"])
    if run["test_digest"] != _test_digest(training) and training.settled_turns:
        log.warning("the test rows are others than those of the run so far: its evaluations are left out")
        training.settled_turns -= 1  # if there was one of this step, it is made again
    training.resumed[:] = [Resumed(**resumed) for resumed in run["resumed"]]
    if run.get("total_turns") == training.total_turns:
        training.stopped_by = run["stopped_by"]
    training.is_off_grid = run.get("is_off_grid", False)
    _refuse_an_odd_evaluation(training, anew)


def _refuse_an_odd_evaluation(training: Training, anew: str) -> None:
    """Refuse to go on after an evaluation that a run which was never stopped would not have made.

    The last turn of a run is evaluated, wherever it is.  If evaluations shape the parameters, other ones
    would follow from there.
    """
    if training.config.is_judged and training.is_off_grid and not training.is_over:
        every = training.config.train.eval_every or training.plan.sampling.turns_per_epoch
        raise ConfigError(
            f"the run ended after turn {training.turns}, and evaluated its end. But evaluations shape its "
            f"parameters, and are made every {every} turns: it cannot go on to the bits of a run that did "
            f"not end there. Ask for as many turns as then, or {anew}"
        )


def _load_best(training: Training, checkpoint: Checkpoint, solver: CentralSolver, step: int | None) -> None:
    """Take up the weights of the best evaluation so far, that of a step; None: there was none."""
    if step is None:
        return
    if step == checkpoint.step:
        training.best_weights = solver.readout()
    else:
        training.best_weights = Weights(**checkpoint.values("best")["weights"])


def _note_other_numerics(training: Training, saved: Sequence[Mapping[str, Any]]) -> None:
    """Warn of arithmetic that the run did not have before, and record it."""
    driver, *workers = (Numerics(**numerics) for numerics in saved)
    for worker, now in enumerate(training.numerics, -1):
        before = [driver] if worker < 0 else workers
        if now in before:
            continue
        who = "the driver" if worker < 0 else f"worker {worker}"
        change = NumericsChange(step=training.version, worker=None if worker < 0 else worker, numerics=now)
        training.numerics_changes.append(change)
        log.warning(
            "the run goes on with other arithmetic: %s differs (before / now): %s; the bits may be "
            "others than those of a run that was never stopped (train.instruction_set holds all machines "
            "to one)",
            who,
            "; ".join(before[0].differences(now)),
        )
