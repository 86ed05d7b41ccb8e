"""The contract that all rules of arrivals keep, and the first steps of each, which a person works out."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from arrivals_in_turn import SHARDS, Driven, driven, quadratic
from torch import nn

from sparksgd.arithmetic import reused
from sparksgd.arithmetic.changes import Changes
from sparksgd.config import Config, SolverConfig
from sparksgd.errors import ConfigError, ModelError, UpdateNotFinite
from sparksgd.solvers.protocol import Gradient, Need
from sparksgd.solvers.rules import RULES, completed, family_of

MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.01}

ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "async": ("async_sgd", {}, MOMENTUM),
    "async with Adam": ("async_sgd", {"clip_norm": 0.5}, ADAM),
    "Downpour": ("async_sgd", {"push_every": 2, "pull_every": 4}, {"name": "Adagrad", "lr": 0.1}),
    "softsync": ("softsync", {"gradients_per_step": 2}, MOMENTUM),
    "softsync, average": ("softsync", {"gradients_per_step": 2, "staleness": "average"}, MOMENTUM),
    "softsync, held": ("softsync", {"gradients_per_step": 3, "release": "step"}, MOMENTUM),
    "stale-synchronous": ("stale_synchronous", {"bound": 1}, MOMENTUM),
    "delay-compensated": ("delay_compensated", {}, MOMENTUM),
    "delay-compensated, adaptive": ("delay_compensated", {"compensation": 2.0, "adaptive": True}, MOMENTUM),
    "gap-aware": ("gap_aware", {}, MOMENTUM),
    "gap-aware, plain": ("gap_aware", {}, {"name": "SGD", "lr": 0.1}),
    "delayed Nesterov": (
        "delayed_nesterov",
        {"turns_per_push": 2, "outer_lr": 0.7, "delay": 2},
        {"name": "Adam", "lr": 0.05},
    ),
    "elastic": ("elastic_averaging", {"turns_per_exchange": 2}, MOMENTUM),
    "elastic, rho": ("elastic_averaging", {"turns_per_exchange": 1, "rho": 2.0}, ADAM),
    "elastic, in order": ("elastic_averaging", {"turns_per_exchange": 1, "order": "shard"}, MOMENTUM),
    "elastic, lookahead": ("elastic_averaging", {"turns_per_exchange": 3, "lookahead": True}, MOMENTUM),
}
every_row = pytest.mark.parametrize("name", ROWS)


def made(name: str, **more: Any) -> Driven:
    rule, keys, optimizer = ROWS[name]
    return driven(rule, keys, optimizer, **more)


@every_row
def test_every_message_has_the_vectors_that_its_rule_says(name: str) -> None:
    run = made(name)
    half, answer = run.halves[0], run.answers[0]
    message = None
    for turn in range(4):
        half.turn(quadratic(0, turn, half.point()), answer.settings[0])
        message = message or half.send()
    assert message is not None
    assert tuple(message.vectors) == run.solver.halves.names


def sent_at_random(driven: Driven, messages: int, seed: int = 3) -> None:
    """Let shards send in an order that a generator draws, of those that may."""
    chance = np.random.default_rng(seed)
    for _ in range(messages):
        driven.send(int(chance.choice(driven.free)))


def test_every_rule_of_arrivals_has_a_row() -> None:
    of_arrivals = {name for name in RULES if family_of(SolverConfig(name=name)) == "arrivals"}
    assert {rule for rule, _, _ in ROWS.values()} == of_arrivals


@every_row
def test_versions_rows_and_turns_are_those_of_the_steps(name: str) -> None:
    run = made(name)
    sent_at_random(run, 30)
    solver = run.solver
    assert solver.needs == {Need.ARRIVALS}
    assert solver.version == len(run.steps) > 5
    rows = sum(step.rows for step in run.steps)
    assert solver.turns == rows // SHARDS  # a row a turn; four turns an epoch of 4 S rows
    for step in run.steps:
        assert len(step.shards) == len(step.staleness)
        assert step.weight == step.rows
        assert min(step.staleness) >= 0
        assert math.isfinite(step.loss)
    assert run.free


@every_row
def test_equal_orders_give_equal_bits_and_others_give_others(name: str) -> None:
    ended = []
    for seed in (3, 3, 4):
        run = made(name)
        sent_at_random(run, 24, seed)
        ended.append(run.solver.readout().parameters.tobytes())
    assert ended[0] == ended[1]
    if ROWS[name][1].get("order") != "shard" and ROWS[name][1].get("release") != "step":
        assert ended[0] != ended[2]


@every_row
def test_a_solver_goes_on_from_the_state_of_another(name: str) -> None:
    schedule = {"name": "CosineAnnealingLR", "T_max": 12}
    run, other = made(name, schedule=schedule), made(name, schedule=schedule)
    while len(run.steps) < 4:
        run.send(run.free[0])
    other.solver.load_state(run.solver.state())
    run.solver.load_state(copy.deepcopy(run.solver.state()))  # what it holds of shards is given up
    assert other.solver.turns == run.solver.turns
    for each in (run, other):
        each.turns.clear()
        each.begin(*range(SHARDS))
        sent_at_random(each, 9)
    assert run.solver.readout().parameters.tobytes() == other.solver.readout().parameters.tobytes()
    assert run.solver.version == other.solver.version


@every_row
def test_a_step_takes_no_new_memory_for_its_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused, "_LEAST_BYTES", 1)  # as if its vectors were large
    run = made(name)
    places = set()
    for _ in range(40):
        run.send(run.free[0])
        places.add(run.solver.readout().parameters.ctypes.data)
    assert len(places) <= 4 + 2 * SHARDS  # each shard may still have an older one


@every_row
def test_the_best_place_is_approached(name: str) -> None:
    rule, keys, _ = ROWS[name]
    optimizer = {"name": "SGD", "lr": 0.05} | ({"momentum": 0.5} if keys.get("lookahead") else {})
    run = driven(rule, keys, optimizer)
    before = float(np.square(np.array([3.0, 2.0])).sum())  # the targets' mean is the best place
    sent_at_random(run, 240)
    assert float(np.square(np.array(run.theta) - [3.0, 2.0]).sum()) < before / 2


@every_row
def test_old_messages_are_ignored_and_counted_and_their_shards_go_on(name: str) -> None:
    rule, keys, optimizer = ROWS[name]
    if keys.get("order") == "shard":
        with pytest.raises(ConfigError, match="are served in turn, so the staleness of each is the same"):
            driven(rule, keys | {"max_staleness": 1}, optimizer)
        return
    run = driven(rule, keys | {"max_staleness": 1}, optimizer)
    sent_at_random(run, 40)
    assert all(max(step.staleness) <= 1 for step in run.steps)
    if name not in ("softsync, held", "stale-synchronous"):
        assert run.ignored > 0
    assert len(run.steps) > 0


def exploding(shard: int, turn: int, point: np.ndarray) -> Gradient:
    gradient = quadratic(shard, turn, point)
    gradient.vector[:] = 1e38
    return gradient


@pytest.mark.parametrize("name", ["async", "softsync", "stale-synchronous", "delay-compensated", "elastic"])
def test_a_step_to_infinity_is_refused_and_the_weights_are_as_before(name: str) -> None:
    rule, keys, _ = ROWS[name]
    run = driven(rule, keys, {"name": "SGD", "lr": 1e4}, gradient=exploding)
    before = run.theta
    with pytest.raises(UpdateNotFinite, match=r"optimizer\.lr"):
        sent_at_random(run, 4)
    assert run.theta == before
    assert run.solver.version == 0


@every_row
def test_what_forward_changes_of_parameters_is_refused(name: str) -> None:
    def changing(shard: int, turn: int, point: np.ndarray) -> Gradient:
        found = vars(quadratic(shard, turn, point)) | {"changes": Changes(parts={})}
        return Gradient(**found)

    run = made(name, gradient=changing)
    if name == "delayed Nesterov":  # there it belongs to the shard's own model
        sent_at_random(run, 12)
        return
    with pytest.raises(ModelError, match="from different weights at the same time"):
        sent_at_random(run, 12)


# The first steps


def test_asynchronous_sgd_steps_at_every_arrival() -> None:
    run = driven("async_sgd")
    run.send(0)  # (0, 0) + (1, 4) / 4
    assert run.theta == [0.25, 1.0]
    run.send(1)  # its gradient is of (0, 0), too: + (2, 3) / 4
    assert run.theta == [0.75, 1.75]
    run.send(0)  # read (.25, 1): + (.75, 3) / 4
    assert run.theta == [0.9375, 2.5]
    assert [step.staleness for step in run.steps] == [(0,), (1,), (1,)]


def test_downpour_sends_the_sum_of_its_own_steps() -> None:
    run = driven("async_sgd", {"push_every": 2, "pull_every": 2})
    run.send(0)  # own steps (.25, 1) and (.75, 3) / 4
    assert run.theta == [0.4375, 1.75]
    assert run.halves[0].point().tolist() == [0.4375, 1.75]


def test_downpour_takes_the_centre_s_weights_only_when_they_are_due() -> None:
    run = driven("async_sgd", {"push_every": 1, "pull_every": 2})
    run.send(0, 1)
    assert run.theta == [0.75, 1.75]
    assert run.halves[0].point().tolist() == [0.25, 1.0]  # its own model goes on
    run.send(0)
    assert run.theta == [0.9375, 2.5]
    assert run.halves[0].point().tolist() == run.theta


def test_softsync_divides_each_gradient_by_its_own_staleness() -> None:
    run = driven("softsync", {"gradients_per_step": 2})
    run.send(0, 1)  # mean of (1, 4), (2, 3)
    assert run.theta == [0.375, 0.875]
    run.send(0, 1)  # shard 0 went on from (0, 0) at once, shard 1 from the step's
    first, second = np.array([1, 4]), np.array([2 - 0.375, 3 - 0.875])
    assert run.theta == (np.array([0.375, 0.875]) + (first + second) / 8).tolist()
    run.send(2, 2)  # of staleness 2, and 0
    assert run.steps[2].staleness == (2, 0)
    assert run.steps[2].shards == (2, 2)


def test_softsync_may_divide_all_gradients_by_the_mean_staleness() -> None:
    run = driven("softsync", {"gradients_per_step": 1, "staleness": "average"})
    run.send(0)
    assert run.theta == pytest.approx([0.25 / 3, 1 / 3])


def test_shards_that_wait_for_a_step_that_cannot_come_go_on() -> None:
    run = driven("softsync", {"gradients_per_step": 3, "release": "step"})
    run.send(0, 1)
    assert run.free == [2]
    run.lose(2)
    assert run.free == [0, 1]
    run.send(0)
    assert len(run.steps) == 1


def test_stale_synchronous_sgd_holds_back_who_is_too_far_ahead() -> None:
    run = driven("stale_synchronous", {"bound": 1})
    run.send(0, 0)
    assert run.free == [1, 2]
    run.send(1)
    assert run.free == [1, 2]  # shard 2 is still at 0
    run.send(2)
    assert run.free == [0, 1, 2]


def test_a_lost_shard_holds_nobody_back_and_begins_where_the_slowest_is() -> None:
    run = driven("stale_synchronous", {"bound": 0})
    run.send(0, 1)
    assert run.free == [2]
    run.lose(2)
    assert run.free == [0, 1]
    run.send(0)
    run.begin(2)
    assert run.free == [1, 2]


def test_delay_compensation_moves_a_stale_gradient() -> None:
    run = driven("delay_compensated", {"compensation": 0.5})
    run.send(0)
    assert run.theta == [0.25, 1.0]
    run.send(1)  # g = -(2, 3); + g g (.25, 1) / 2
    gradient = np.array([-2, -3]) + 0.5 * np.array([4, 9]) * np.array([0.25, 1.0])
    assert run.theta == (np.array([0.25, 1.0]) - gradient / 4).tolist()


def test_adaptive_compensation_is_divided_by_the_root_mean_square() -> None:
    run = driven("delay_compensated", {"compensation": 2.0, "adaptive": True})
    run.send(0, 1)
    squares = 0.95 * (0.05 * np.array([1, 16])) + 0.05 * np.array([4, 9])
    rate = 2 / np.sqrt(squares + 1e-7)
    gradient = np.array([-2, -3]) + rate * np.array([4, 9]) * np.array([0.25, 1.0])
    assert run.theta == pytest.approx((np.array([0.25, 1.0]) - gradient / 4).tolist(), rel=1e-6)


def test_gap_aware_sgd_divides_by_how_far_the_weights_have_moved() -> None:
    run = driven("gap_aware")
    run.send(0)
    assert run.theta == [0.25, 1.0]
    run.send(1)  # after one step the usual step is 1/4 of the gradient (1, 4): the gap is 1 for each
    assert run.theta == pytest.approx([0.25 + 2 / 4 / 2, 1.0 + 3 / 4 / 2], rel=1e-6)


def test_delayed_nesterov_applies_its_momentum_at_every_nth_arrival() -> None:
    keys = {"turns_per_push": 1, "outer_lr": 0.5, "outer_momentum": 0.5, "delay": 2}
    run = driven("delayed_nesterov", keys)
    run.send(0)  # d = -(.25, 1); half of half of it
    assert run.theta == [0.0625, 0.25]
    run.send(1)  # d = -(.5, .75); m = (.25 + .5, 1 + .75) / 2, of which a quarter
    assert run.theta == [0.0625 + 0.125 + 0.09375, 0.25 + 0.1875 + 0.21875]


def test_elastic_averaging_draws_both_sides_together() -> None:
    run = driven("elastic_averaging", {"turns_per_exchange": 1, "beta": 1.5})  # alpha = 1/2
    run.send(0)  # x = (.25, 1), the centre (0, 0): they meet half way
    assert run.theta == [0.125, 0.5]
    assert run.halves[0].point().tolist() == [0.125, 0.5]
    run.send(1)
    assert run.theta == [0.125 + (0.5 - 0.125) / 2, 0.5 + (0.75 - 0.5) / 2]


def test_an_overlapped_exchange_draws_by_the_model_that_was_sent() -> None:
    run = driven("elastic_averaging", {"turns_per_exchange": 1, "beta": 1.5, "overlap": True})  # alpha = 1/2
    half, solver = run.halves[0], run.solver
    answer = run.answers.pop(0)
    x, theta, models = np.zeros(2), np.zeros(2), []
    for turn in range(4):  # algorithm 1 of Zhang et al. 2015, with one shard that exchanges
        half.turn(quadratic(0, turn, half.point()), answer.settings[0])
        if turn:
            half.take(answer)
        message = half.send()
        answer = solver.arrived(0, message, answer.weights.version).answers[0]
        models.append(half.point().tolist())
        before, e = x, 0.5 * (x - theta)
        x, theta = x - 0.25 * (before - [1, 4]) - (e if turn else 0), theta + (e if turn else 0)
        assert models[-1] == x.tolist()
        assert run.theta == (theta + 0.5 * (x - theta)).tolist()


def test_the_rate_that_comes_with_an_exchange_is_that_of_the_turns_after_it() -> None:
    schedule = {"name": "StepLR", "step_size": 1, "gamma": 0.5}
    run = driven("elastic_averaging", {"turns_per_exchange": 2}, schedule=schedule)
    run.send(0)  # two of the three rows of a turn
    assert run.answers[0].settings[0].get("lr", 0.25) == 0.25  # nothing has moved yet
    run.send(1)
    assert run.answers[1].settings[0] == {"lr": 0.125}
    assert run.answers[1].weights.version == run.solver.version  # its own exchange makes nothing stale
    assert [step.staleness for step in run.steps] == [(0,), (1,)]


def test_alpha_may_follow_the_rate() -> None:
    run = driven("elastic_averaging", {"turns_per_exchange": 1, "rho": 2.0})  # alpha = 1/4 * 2
    run.send(0)
    assert run.theta == [0.125, 0.5]


def test_a_lookahead_takes_gradients_where_the_momentum_leads() -> None:
    optimizer = {"name": "SGD", "lr": 0.25, "momentum": 0.5}
    run = driven("elastic_averaging", {"turns_per_exchange": 3, "lookahead": True, "beta": 0.0}, optimizer)
    run.send(0)
    x, v = 0.0, 0.0
    for _ in range(3):  # algorithm 2 of Zhang et al. 2015, in the first parameter
        v = 0.5 * v - 0.25 * (x + 0.5 * v - 1)
        x += v
    assert run.halves[0].state()["model"][0] == pytest.approx(x)


def test_in_the_order_of_the_shards_nobody_overtakes() -> None:
    run = driven("elastic_averaging", {"turns_per_exchange": 1, "order": "shard"})
    run.send(2, 1)
    assert run.steps == []
    run.send(0)
    assert [step.shards for step in run.steps] == [(0,), (1,), (2,)]
    run.lose(0)
    run.send(2, 1)
    assert [step.shards for step in run.steps[3:]] == [(1,), (2,)]


# Refused


@pytest.mark.parametrize(
    ("rule", "keys", "optimizer", "words"),
    [
        ("async_sgd", {"push_every": 2, "pull_every": 3}, {}, "must be a multiple of solver.push_every"),
        ("async_sgd", {"push_every": 0}, {}, "solver.push_every is 0, but must be at least 1"),
        ("async_sgd", {"max_staleness": -1}, {}, "solver.max_staleness is -1"),
        ("softsync", {"gradients_per_step": 0}, {}, "solver.gradients_per_step is 0"),
        ("softsync", {"gradients_per_step": 9, "release": "step"}, {}, "would all wait for a step"),
        ("softsync", {}, ADAM, "whose steps do not depend on their scale"),
        ("softsync", {"staleness": "sometimes"}, {}, "solver.staleness is 'sometimes'"),
        ("stale_synchronous", {"bound": -1}, {}, "solver.bound is -1"),
        ("delay_compensated", {"compensation": -0.1}, {}, "solver.compensation is -0.1"),
        ("gap_aware", {}, ADAM, "which measures steps of SGD"),
        ("gap_aware", {}, MOMENTUM | {"weight_decay": 0.1}, "optimizer.weight_decay is 0.1"),
        ("elastic_averaging", {"beta": 9.0}, {}, "alpha would be above 1"),
        ("elastic_averaging", {"lookahead": True}, ADAM, "needs optimizer.name = \"SGD\" with momentum"),
        ("elastic_averaging", {"overlap": True, "order": "shard"}, {}, "cannot compute meanwhile"),
        ("elastic_averaging", {"turns_per_exchanges": 2}, {}, "did you mean turns_per_exchange?"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused(
    rule: str, keys: dict[str, Any], optimizer: dict[str, Any], words: str
) -> None:
    tables = {
        "solver": {"name": rule} | keys,
        "optimizer": optimizer or {"name": "SGD", "lr": 0.1},
        "train": {"num_shards": SHARDS},
    }
    with pytest.raises(ConfigError) as refused:
        completed(Config.from_dict(tables))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "keys"), [("elastic_averaging", {}), ("delayed_nesterov", {}), ("async_sgd", {"pull_every": 2})]
)
def test_running_statistics_are_refused_where_nobody_could_measure_them(rule: str, keys: Any) -> None:
    with pytest.raises(ModelError, match="GroupNorm"):
        driven(rule, keys, module=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_a_schedule_moves_with_the_rows_that_steps_used() -> None:
    run = driven("async_sgd", schedule={"name": "StepLR", "step_size": 2, "gamma": 0.5})
    run.send(*[0, 1, 2] * 3)
    assert [step.outcome.lr for step in run.steps] == [0.25] * 6 + [0.125] * 3


def test_a_half_that_waits_for_its_answer_goes_on_as_another_one() -> None:
    run = driven("elastic_averaging", {"turns_per_exchange": 1}, MOMENTUM)
    half, other = run.halves[0], run.solver.halves.make(run.solver.flat, 0)
    answer = run.answers[0]
    half.turn(quadratic(0, 0, half.point()), answer.settings[0])
    message = half.send()
    other.load_state({name: array.copy() for name, array in half.state().items()})
    (answer,) = run.solver.arrived(0, message, answer.weights.version).answers.values()
    for each in (half, other):
        each.take(answer)
    assert half.point().tolist() == other.point().tolist()
