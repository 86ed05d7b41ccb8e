"""The contract that all solvers of rounds keep: turns, versions, messages, states and their bits."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from rules_with_keys import EPOCH, ROWS, SHARDS, TURNS, Row, configured, every_row
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import SolverConfig
from sparksgd.errors import UpdateNotFinite
from sparksgd.solvers.protocol import Answer, Gradient, Message, Need, RoundSolver, StepOutcome, WorkerHalf
from sparksgd.solvers.rules import RULES, Experiment, completed, family_of, make_solver, settings_of


def module(rule: str) -> FlatModule:
    """Return a module; with running statistics, unless the rule refuses them."""
    torch.manual_seed(4)
    norm = nn.LayerNorm(4) if rule == "elastic_averaging" else nn.BatchNorm1d(4)
    return FlatModule(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)))


def like(flat: FlatModule) -> FlatModule:
    """Return a module of the same kind."""
    return module("synchronous" if flat.statistics().size else "elastic_averaging")


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
    return make_solver(completed(config), module(row.rule), experiment)


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


def gradient(shard: int, turn: int, point: np.ndarray, flat: FlatModule) -> Gradient:
    """Return a gradient that depends on where it is taken; of no meaning otherwise."""
    drawn, rows = np.random.default_rng((shard, turn)), 1 + (shard + turn) % 3
    return Gradient(
        vector=(point + drawn.standard_normal(point.shape, np.float32)) * np.float32(rows),
        statistics=drawn.random(flat.statistics().size, np.float32),
        counters=np.full_like(flat.counters(), turn + 1),
        loss=1.0,
        rows=rows,
    )


class Workers:
    """The halves of all shards, and their rounds; each input is compared with itself afterwards."""

    def __init__(self, solver: RoundSolver) -> None:
        self._make, self._keeps = solver.halves.make, solver.halves.keep_state
        self._flat: FlatModule = solver.flat  # type: ignore[attr-defined]  # every rule has it
        self.halves = {shard: self._make(like(self._flat), shard) for shard in range(SHARDS)}

    def messages(self, answer: Answer) -> list[Message]:
        """Return what each shard sends in a round."""
        if not self._keeps:
            self.halves = {shard: self._make(like(self._flat), shard) for shard in range(SHARDS)}
        return [self._sent(shard, half, answer) for shard, half in self.halves.items()]

    def _sent(self, shard: int, half: WorkerHalf[Answer], answer: Answer) -> Message:
        given = bits(answer)
        half.take(answer)
        assert half.lag == 0  # rounds wait
        for index in range(answer.turns):
            fresh = gradient(shard, answer.turn + index, half.point(), self._flat)
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


def of_family(family: str) -> set[str]:
    return {name for name in RULES if family_of(SolverConfig(name=name)) == family}


def test_every_rule_of_rounds_has_a_row() -> None:
    assert {row.rule for row in ROWS} == of_family("rounds") | {"elastic_averaging"}


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


@pytest.mark.parametrize("row", [row for row in ROWS if row.rule != "elastic_averaging"], ids=str)
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
        moved = replica_of(like(steady.flat))
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


def test_a_replay_of_all_shards_needs_nothing_more_and_one_of_some_needs_a_replay() -> None:
    row = ROWS[2]
    config = completed(configured(row))
    experiment = Experiment(
        optimizer=config.optimizer, schedule=config.schedule, num_shards=SHARDS, turns_per_epoch=EPOCH,
        total_turns=TURNS,
    )  # fmt: skip
    some = [frozenset({0, 2}), frozenset({1, 2})]
    solver = make_solver(config, module(row.rule), experiment, some)
    assert solver.needs == {Need.ROUNDS, Need.REPLAY}
    assert (solver.quorum().shards, solver.quorum().enough) == ({0, 2}, 2)
    step(solver, Workers(solver))
    assert (solver.quorum().shards, solver.quorum().enough) == ({1, 2}, 2)
    everyone = make_solver(config, module(row.rule), experiment, [frozenset(range(SHARDS))] * 2)
    assert everyone.needs == {Need.ROUNDS}
