"""Every rule by its name: its keys, and the contract that all solvers of rounds keep.

A new rule joins by adding rows to ROWS.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config, SolverConfig
from sparksgd.errors import ConfigError, UpdateNotFinite
from sparksgd.solvers.protocol import Answer, Gradient, Message, Need, RoundSolver, StepOutcome, WorkerHalf
from sparksgd.solvers.rules import (
    RULES,
    Experiment,
    completed,
    described,
    make_solver,
    require_at_least,
    settings_of,
    settings_type,
)

SHARDS, EPOCH, TURNS = 3, 5, 13
"""Three shards, two epochs of five turns, and three turns of a third."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule with some keys, and what it works with."""

    rule: str
    keys: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "SGD", "lr": 0.1})
    schedule: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.rule, *(f"{key}={value}" for key, value in self.keys.items())])


MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.01}
COSINE = {"name": "CosineAnnealingLR", "T_max": TURNS}

ROWS = [
    Row(rule="synchronous", optimizer=MOMENTUM, schedule=COSINE),
    Row(rule="synchronous", keys={"clip_norm": 0.5}, optimizer=ADAM),
    Row(rule="synchronous", keys={"backup_workers": 1}, schedule={"name": "StepLR", "step_size": 4}),
    Row(rule="local_sgd", optimizer=MOMENTUM),
    Row(rule="local_sgd", keys={"turns_per_round": 1}),
    Row(
        rule="local_sgd",
        keys={"turns_per_round": 3, "outer_lr": 0.7, "outer_momentum": 0.9},
        optimizer={"name": "AdamW", "lr": 0.01},
        schedule=COSINE,
    ),
    Row(
        rule="local_sgd",
        keys={"turns_per_round": 2, "synchronous_steps": 3, "inner_state": "average"},
        optimizer=ADAM,
        schedule=COSINE,
    ),
    Row(
        rule="local_sgd",
        keys={"turns_per_round": 2, "inner_state": "keep", "clip_norm": 1.0},
        optimizer=MOMENTUM,
    ),
    Row(rule="local_sgd", keys={"synchronous_steps": 99}, optimizer=MOMENTUM),
]

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_rule = pytest.mark.parametrize("rule", RULES)


def configured(row: Row) -> Config:
    return Config.from_dict(
        {
            "solver": {"name": row.rule} | row.keys,
            "optimizer": row.optimizer,
            "schedule": row.schedule,
            "train": {"num_shards": SHARDS},
        }
    )


def module() -> FlatModule:
    torch.manual_seed(4)
    return FlatModule(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))


def made(row: Row) -> Any:
    """Return a RoundSolver, over a module that it has as `flat`."""
    config = configured(row)
    experiment = Experiment(
        optimizer=config.optimizer,
        schedule=config.schedule,
        num_shards=SHARDS,
        turns_per_epoch=EPOCH,
        total_turns=TURNS,
    )
    return make_solver(completed(config), module(), experiment)


def bits(value: Any) -> Any:
    """Return what two values must have in common to be the same, bit for bit."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [bits(one) for one in value]
    return value


def gradient(shard: int, turn: int, point: np.ndarray) -> Gradient:
    """Return a gradient that depends on where it is taken; of no meaning otherwise."""
    drawn, rows = np.random.default_rng((shard, turn)), 1 + (shard + turn) % 3
    return Gradient(
        vector=(point + drawn.standard_normal(point.shape, np.float32)) * np.float32(rows),
        statistics=drawn.random(8, np.float32),
        counters=np.array([turn + 1]),
        loss=1.0,
        rows=rows,
    )


class Workers:
    """The halves of all shards, and their rounds; each input is compared with itself afterwards."""

    def __init__(self, solver: RoundSolver) -> None:
        self._make, self._keeps = solver.halves.make, solver.halves.keep_state
        self.halves = {shard: self._make(module(), shard) for shard in range(SHARDS)}

    def messages(self, answer: Answer) -> list[Message]:
        """Return what each shard sends in a round."""
        if not self._keeps:
            self.halves = {shard: self._make(module(), shard) for shard in range(SHARDS)}
        return [self._sent(shard, half, answer) for shard, half in self.halves.items()]

    def _sent(self, shard: int, half: WorkerHalf[Answer], answer: Answer) -> Message:
        given = bits(answer)
        half.take(answer)
        assert half.lag == 0  # rounds wait
        for index in range(answer.turns):
            fresh = gradient(shard, answer.turn + index, half.point())
            before = bits(fresh)
            half.turn(fresh, answer.settings[index] if answer.settings else {})
            assert bits(fresh) == before, "a half changed its gradient"
        message = half.send()
        assert message is not None
        assert bits(answer) == given, "a half changed what it was given"
        return copy.deepcopy(message)


def total(messages: Sequence[Message]) -> Message:
    first, *others = copy.deepcopy(list(messages))
    for other in others:
        first += other
    return first


def step(solver: RoundSolver, workers: Workers) -> StepOutcome:
    return solver.receive(total(workers.messages(solver.answer())))


def after(row: Row, steps: int) -> tuple[Any, Workers]:
    solver = made(row)
    workers = Workers(solver)
    for _ in range(steps):
        step(solver, workers)
    return solver, workers


def steps_of(row: Row) -> int:
    """Return how many rounds a run has."""
    solver, turn, steps = made(row), 0, 0
    while turn < TURNS:
        turn, steps = turn + solver.turns_at(turn), steps + 1
    return steps


def weights(solver: Any) -> Any:
    """Return the bits of a solver's weights, which are those of its module."""
    found = bits(solver.readout())
    assert bits(solver.flat.weights(solver.version)) == found
    assert bits(solver.answer().weights) == found
    return found


# The contract of every rule


def test_every_rule_has_a_row() -> None:
    assert {row.rule for row in ROWS} == RULES.keys()


@every_row
def test_a_run_s_rounds_cover_every_epoch_and_the_run_exactly(row: Row) -> None:
    solver, turn, ends = made(row), 0, [0]
    while turn < TURNS:
        assert solver.turns_at(turn) >= 1
        turn += solver.turns_at(turn)
        ends.append(turn)
    assert {0, EPOCH, 2 * EPOCH, TURNS} <= set(ends)
    assert ends[-1] == TURNS


@every_row
def test_versions_and_turns_advance_with_each_step(row: Row) -> None:
    solver = made(row)
    workers, turns = Workers(solver), 0
    for version in range(steps_of(row)):
        answer = solver.answer()
        assert (solver.version, solver.turns) == (version, turns)
        assert (answer.weights.version, answer.turn) == (version, turns)
        assert answer.turns == solver.turns_at(turns)
        assert answer.settings == () or len(answer.settings) == answer.turns
        assert step(solver, workers).lr > 0
        turns += answer.turns
    assert solver.turns == TURNS


@every_row
def test_messages_have_the_shape_that_was_told(row: Row) -> None:
    solver = made(row)
    workers = Workers(solver)
    for _ in range(steps_of(row)):
        shape, size = solver.shape_at(solver.turns), len(solver.readout().parameters)
        messages = workers.messages(solver.answer())
        for message in messages:
            assert sorted(message.vectors) == sorted(shape.vectors)
            assert sorted(message.scalars) == sorted(shape.scalars)
            assert {(v.dtype, v.shape) for v in message.vectors.values()} == {(np.dtype("float32"), (size,))}
        solver.receive(total(messages))


@every_row
def test_halves_begin_a_round_at_the_centre_s_weights(row: Row) -> None:
    solver, workers = after(row, 1)
    answer = solver.answer()
    for half in workers.halves.values():
        half.take(answer)
        assert half.point().tobytes() == answer.weights.parameters.tobytes()


@every_row
def test_an_answer_and_a_readout_are_one_object_until_the_next_step(row: Row) -> None:
    solver = made(row)
    workers, seen = Workers(solver), []
    for _ in range(3):
        answer, readout = solver.answer(), solver.readout()
        solver.state()
        solver.quorum()
        assert solver.answer() is answer
        assert solver.readout() is readout
        assert bits(answer.weights) == bits(readout)
        seen += [answer, readout]
        step(solver, workers)
        assert solver.answer() is not answer
        assert solver.readout() is not readout
    versions = [one.weights.version if isinstance(one, Answer) else one.version for one in seen]
    assert versions == [0, 0, 1, 1, 2, 2]  # copies: later steps changed none of them


@every_row
def test_a_state_that_was_sent_goes_on_to_the_same_bits_at_any_step(row: Row) -> None:
    steady = made(row)
    workers, replica_of = Workers(steady), pickle.loads(pickle.dumps(steady.make_replica()))
    for _ in range(steps_of(row)):
        moved = replica_of(module())
        assert (moved.version, moved.turns) == (0, 0)
        moved.load_state(pickle.loads(pickle.dumps(steady.state())))
        assert (moved.version, moved.turns) == (steady.version, steady.turns)
        assert bits(moved.state()) == bits(steady.state())
        assert bits(moved.answer()) == bits(steady.answer())
        other = Workers(moved)
        for shard, half in workers.halves.items():
            other.halves[shard].load_state(pickle.loads(pickle.dumps(half.state())))
        one, another = workers.messages(steady.answer()), other.messages(moved.answer())
        assert bits(one) == bits(another)
        assert steady.receive(total(one)) == moved.receive(total(another))
        assert bits(moved.state()) == bits(steady.state())


@every_row
def test_who_sent_a_state_and_who_loaded_it_change_nothing_of_each_other_s(row: Row) -> None:
    solver, workers = after(row, steps_of(row) - 1)
    state = pickle.loads(pickle.dumps(solver.state()))
    before = bits(state)
    moved = made(row)
    moved.load_state(state)
    other = Workers(moved)
    for shard, half in workers.halves.items():
        other.halves[shard].load_state(half.state())
    kept = bits(moved.state())
    step(moved, other)
    assert bits(state) == before
    moved.load_state(state)
    for vector in state.vectors.values():
        vector.fill(np.nan)  # as the other one's next step may
    assert bits(moved.state()) == kept


@every_row
def test_stepping_back_gives_the_weights_of_the_step_before_once(row: Row) -> None:
    solver, workers = after(row, 1)
    before, turns = weights(solver), solver.turns
    step(solver, workers)
    assert weights(solver)["parameters"] != before["parameters"]
    for _ in range(2):  # there is no step further back
        solver.step_back()
        assert (weights(solver), solver.version, solver.turns) == (before, 1, turns)
        assert solver.answer().turn == turns


@every_row
def test_stepping_back_before_the_first_step_changes_nothing(row: Row) -> None:
    solver = made(row)
    before = weights(solver)
    solver.step_back()
    assert (weights(solver), solver.version, solver.turns) == (before, 0, 0)


@every_row
def test_who_was_given_the_next_state_can_step_back(row: Row) -> None:
    solver, workers = after(row, 1)
    behind = made(row)
    behind.load_state(pickle.loads(pickle.dumps(solver.state())))
    before = weights(behind)
    step(solver, workers)
    behind.load_state(pickle.loads(pickle.dumps(solver.state())))
    assert weights(behind) == weights(solver)
    behind.step_back()
    assert (weights(behind), behind.version) == (before, 1)


@every_row
def test_a_sum_is_not_changed_by_the_step_that_it_makes(row: Row) -> None:
    solver = made(row)
    workers = Workers(solver)
    for _ in range(steps_of(row)):
        arrived = total(workers.messages(solver.answer()))
        before = bits(arrived)
        solver.receive(arrived)
        assert bits(arrived) == before
        for vector in arrived.vectors.values():  # and it is nobody's any more
            vector.fill(np.nan)
        assert np.isfinite(solver.readout().parameters).all()
        assert all(np.isfinite(vector).all() for vector in solver.answer().vectors.values())


@every_row
def test_a_step_that_is_not_finite_is_not_made(row: Row) -> None:
    solver, workers = after(row, 1)
    before, turns = weights(solver), solver.turns
    arrived = total(workers.messages(solver.answer()))
    for vector in arrived.vectors.values():
        vector[:] = np.inf
    with pytest.raises(UpdateNotFinite):
        solver.receive(arrived)
    assert (weights(solver), solver.version, solver.turns) == (before, 1, turns)
    solver.step_back()  # those weights were good: nothing to take back
    assert (weights(solver), solver.version) == (before, 1)


@every_row
def test_halves_pickle_and_make_the_same_bits(row: Row) -> None:
    solver = made(row)
    there = Workers(solver)
    sent = made(row)
    sent.halves = pickle.loads(pickle.dumps(solver.halves))
    assert dataclasses.replace(sent.halves, make=solver.halves.make) == solver.halves
    here = Workers(sent)
    for _ in range(2):
        answer = solver.answer()
        messages = there.messages(answer)
        assert bits(here.messages(pickle.loads(pickle.dumps(answer)))) == bits(messages)
        solver.receive(total(messages))


@every_row
def test_the_same_inputs_give_the_same_bits_whatever_numbers_are_drawn_elsewhere(row: Row) -> None:
    one, _ = after(row, 3)
    torch.manual_seed(99)
    torch.rand(7)
    np.random.seed(5)  # the global numbers that a rule must not read
    other, _ = after(row, 3)
    assert weights(one) == weights(other)


@every_row
def test_what_a_rule_needs_is_known_from_its_keys(row: Row) -> None:
    solver = made(row)
    assert solver.needs == settings_of(configured(row).solver).needs()
    assert Need.ROUNDS in solver.needs
    assert solver.halves.keep_state == (Need.SHARD_STATE in solver.needs)
    quorum = solver.quorum()
    assert quorum.shards == frozenset(range(SHARDS))
    assert (quorum.enough < SHARDS) == (Need.QUORUM in solver.needs)


# Keys


@every_rule
def test_a_rule_s_keys_are_a_frozen_dataclass_with_a_docstring_under_each(rule: str) -> None:
    kind = settings_type(rule)
    assert kind.__dataclass_params__.frozen
    assert all(one.kw_only for one in dataclasses.fields(kind))
    assert kind() == kind()  # each key has a default
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    documented = {
        above.target.id
        for above, below in zip(body.body, body.body[1:], strict=False)
        if isinstance(above, ast.AnnAssign)
        and isinstance(above.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
    assert documented == {one.name for one in dataclasses.fields(kind)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().clip_norm = 1.0
    with pytest.raises(ConfigError, match=rf"unknown key solver\.{dataclasses.fields(kind)[0].name}_"):
        settings_of(SolverConfig(name=rule, arguments={f"{dataclasses.fields(kind)[0].name}_": 1}))


@every_row
def test_a_completed_configuration_has_every_key_and_is_left_as_it_is(row: Row) -> None:
    config = configured(row)
    full = completed(config)
    assert completed(full) == full
    assert completed(Config.from_dict(full.to_dict())) == full
    assert settings_of(full.solver) == settings_of(config.solver)
    defaults = {one.name: one.default for one in dataclasses.fields(settings_type(row.rule))}
    expected = {key: value for key, value in (defaults | row.keys).items() if value is not None}
    assert full.solver == SolverConfig(name=row.rule, arguments=expected)
    assert dataclasses.replace(full, solver=config.solver) == config  # nothing else is changed


@pytest.mark.parametrize(
    "tables",
    [{}, {"solver": {}}, {"solver": {"backup_workers": 0}}, {"solver": {"name": "synchronous"}}],
    ids=str,
)
def test_a_configuration_without_a_rule_is_synchronous_sgd(tables: dict[str, Any]) -> None:
    # so the version before wrote it, and a finished run of then is still the same experiment
    now = {"solver": {"name": "synchronous", "backup_workers": 0}}
    then, today = (completed(Config.from_dict(one)).experiment() for one in (tables, now))
    assert then == today
    assert (then["solver.name"], then["solver.backup_workers"]) == ("synchronous", 0)
    assert "solver.clip_norm" not in then


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({"name": "localsgd"}, "solver.name is 'localsgd', which is no rule (did you mean local_sgd?)"),
        ({"name": "synchronus"}, "which is no rule (did you mean synchronous?)"),
        ({"name": "x"}, "solver.name is 'x', which is no rule (valid: local_sgd, synchronous)"),
        ({"backup_worker": 1}, "unknown key solver.backup_worker (did you mean backup_workers?)"),
        ({"outer_lr": 1.0}, "unknown key solver.outer_lr (valid: backup_workers, clip_norm)"),
        ({"name": "local_sgd", "outer_rl": 1}, "unknown key solver.outer_rl (did you mean outer_lr?)"),
        ({"backup_workers": 1.5}, "solver.backup_workers is 1.5, but must be a whole number"),
        ({"clip_norm": "long"}, "solver.clip_norm is 'long', but must be a number or none"),
        ({"backup_workers": -1}, "solver.backup_workers is -1, but must be at least 0"),
        ({"clip_norm": 0.0}, "solver.clip_norm is 0.0, but must be above 0"),
        ({"backup_workers": 8}, "solver.backup_workers is 8, but train.num_shards is 8"),
    ],
    ids=str,
)
def test_unknown_rules_and_keys_are_refused_with_the_nearest_name(solver: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        completed(Config.from_dict({"solver": solver}))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({}, 'solver.name = "synchronous"'),
        ({"backup_workers": 0, "name": "synchronous"}, 'solver.name = "synchronous"'),
        (
            {"backup_workers": 2, "clip_norm": 1},
            'solver.name = "synchronous" with solver.clip_norm = 1.0 and solver.backup_workers = 2',
        ),
        ({"name": "local_sgd"}, 'solver.name = "local_sgd"'),
        (
            {"name": "local_sgd", "inner_state": "keep"},
            'solver.name = "local_sgd" with solver.inner_state = keep',
        ),
    ],
    ids=str,
)
def test_a_rule_is_described_by_the_keys_that_are_not_its_defaults(
    solver: dict[str, Any], words: str
) -> None:
    assert described(Config.from_dict({"solver": solver}).solver) == words


def test_a_replay_of_all_shards_needs_nothing_more_and_one_of_some_needs_a_replay() -> None:
    row = ROWS[2]
    config = completed(configured(row))
    experiment = Experiment(
        optimizer=config.optimizer, schedule=config.schedule, num_shards=SHARDS, turns_per_epoch=EPOCH,
        total_turns=TURNS,
    )  # fmt: skip
    some = [frozenset({0, 2}), frozenset({1, 2})]
    solver = make_solver(config, module(), experiment, some)
    assert solver.needs == {Need.ROUNDS, Need.REPLAY}
    assert (solver.quorum().shards, solver.quorum().enough) == ({0, 2}, 2)
    step(solver, Workers(solver))
    assert (solver.quorum().shards, solver.quorum().enough) == ({1, 2}, 2)
    everyone = make_solver(config, module(), experiment, [frozenset(range(SHARDS))] * 2)
    assert everyone.needs == {Need.ROUNDS}


@pytest.mark.parametrize(
    ("value", "least", "above", "words"),
    [
        (None, 1, False, None),
        (1, 1, False, None),
        (0, 1, False, "some.key is 0, but must be at least 1"),
        (0.5, 0, True, None),
        (0.0, 0, True, "some.key is 0.0, but must be above 0"),
        (float("nan"), 0, False, "some.key is nan, but must be at least 0"),
        (float("nan"), 0, True, "some.key is nan, but must be above 0"),
    ],
)
def test_a_value_below_the_least_one_is_refused(
    value: float | None, least: float, above: bool, words: str | None
) -> None:
    if words is None:
        require_at_least("some.key", value, least, above=above)
        return
    with pytest.raises(ConfigError) as refused:
        require_at_least("some.key", value, least, above=above)
    assert str(refused.value) == words
