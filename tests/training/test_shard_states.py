"""What shards keep in a checkpoint: it travels to the same bits, and what was forged is named by its path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule
from sparksgd.config import Config
from sparksgd.engines.protocol import ShardStates
from sparksgd.errors import DataError
from sparksgd.solvers.flat_optimizer import ELEMENTWISE
from sparksgd.solvers.protocol import Gradient, HalfState
from sparksgd.solvers.rules import Experiment, make_solver
from sparksgd.training.encoding import as_plain, of_plain
from sparksgd.training.shard_states import rule_of_shards

SOLVERS: dict[str, dict[str, Any]] = {
    "local SGD": {"name": "local_sgd", "inner_state": "keep"},
    "elastic": {"name": "elastic_averaging", "order": "together"},
    "push": {"name": "gradient_push"},
    "ring": {"name": "decentralised"},
}
ARGUMENTS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "RMSprop": {"momentum": 0.5, "centered": True}}


class Two(nn.Module):
    """Two parameters, the second of which some gradients leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))


def of(solver: str, optimizer: str = "SGD") -> tuple[Config, FlatModule, Any]:
    """Return a configuration of two shards, a module, and its solver."""
    config = Config.from_dict(
        {
            "data": {"train": "rows"},
            "model": {"name": "lenet"},
            "optimizer": {"name": optimizer} | ARGUMENTS.get(optimizer, {"lr": 0.1}),
            "solver": SOLVERS[solver],
            "train": {"num_shards": 2},
        }
    )
    flat = FlatModule(Two())
    experiment = Experiment(
        optimizer=config.optimizer, schedule=config.schedule, num_shards=2, turns_per_epoch=9, total_turns=9
    )
    return config, flat, make_solver(config, flat, experiment)


def begun(flat: FlatModule, solver: Any, shard: int) -> Any:
    half = solver.halves.make(flat, shard)
    (half.begin(solver.answer().weights) if hasattr(half, "begin") else half.take(solver.answer()))
    return half


def turned(half: Any, shard: int, turn: int, settings: Any) -> None:
    """Let a half make a turn alone."""
    draw = np.random.default_rng((shard, turn))
    gradient = Gradient(
        vector=draw.normal(size=7).astype("f4"),
        statistics=np.empty(0, "f4"),
        counters=np.empty(0, "i8"),
        loss=1.0,
        rows=2,
        touched=None if turn % 3 else np.array([True, False]),
        shard=shard,
        turn=turn,
    )
    half.turn(gradient, settings)
    if hasattr(half, "begin"):
        half.send()
        half.take({})


def states_of(flat: FlatModule, solver: Any, turns: int) -> tuple[list[Any], dict[int, HalfState]]:
    halves = [begun(flat, solver, shard) for shard in range(2)]
    for shard, half in enumerate(halves):
        for turn in range(turns):
            turned(half, shard, turn, solver.answer().settings[0])
    return halves, {shard: half.state() for shard, half in enumerate(halves)}


def bits_of(state: HalfState) -> dict[str, Any]:
    return {name: np.asarray(value).tobytes() for name, value in state.items()}


@pytest.mark.parametrize("turns", [0, 1, 5])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("optimizer", [kind.__name__ for kind in ELEMENTWISE])
def test_a_state_travels_and_the_next_turn_has_the_same_bits(optimizer: str, solver: str, turns: int) -> None:
    config, flat, made = of(solver, optimizer)
    halves, states = states_of(flat, made, turns)
    travelled: ShardStates = of_plain(as_plain(states))
    rule_of_shards(config, flat, made)(travelled, "states")
    for shard, half in enumerate(halves):
        other = begun(flat, made, shard)
        other.load_state(travelled[shard])
        assert bits_of(other.state()) == bits_of(states[shard])
        if solver == "local SGD":
            other._local.parameters.copy_(half._local.parameters)  # those of the round, not of the shard
        for turn in (turns, turns + 1):
            turned(half, shard, turn, made.answer().settings[0])
            turned(other, shard, turn, made.answer().settings[0])
        assert bits_of(other.state()) == bits_of(half.state())
        assert np.array_equal(other.point(), half.point())


FORGED: dict[str, tuple[str, Any, str]] = {
    "another shape": ("model", np.zeros(6, "f4"), "states.0.model is float32 of shape (6,), but must be"),
    "another type": ("model", np.zeros(7, "f8"), "states.0.model is float64 of shape (7,), but must be"),
    "no array": ("model", [0.0] * 7, "states.0.model is a list, but must be float32 of shape (7,)"),
    "a weight that is NaN": ("weight", np.asarray(np.nan), "states.0.weight is nan, but must be a finite"),
    "momentum of one number": ("momentum_buffer", np.asarray(1.0), "states.0.momentum_buffer is float64 of"),
    "an unknown name": ("exp_avg", np.zeros(7, "f4"), "states.0 has the unknown key 'exp_avg'"),
    "a third parameter": ("has.2", np.asarray(1.0), "states.0 has the unknown key 'has.2'"),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_was_forged_is_named(case: str) -> None:
    config, flat, made = of("push")
    _, states = states_of(flat, made, 2)
    name, value, words = FORGED[case]
    rule = rule_of_shards(config, flat, made)
    with pytest.raises(DataError) as refused:
        rule({0: states[0] | {name: value}, 1: states[1]}, "states")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        (lambda states: {0: states[0]}, "states has 1 shards, but must have 2"),
        (
            lambda states: states | {2: states[1]},
            "a key of states is 2, but must be a whole number from 0 to 1",
        ),
        (lambda states: {0: states[0], 1: {}}, "states.1 has no model"),
        (lambda states: [], "states is a list, but must be a table"),
    ],
)
def test_missing_and_strange_shards_are_named(deed: Any, words: str) -> None:
    config, flat, made = of("push")
    _, states = states_of(flat, made, 2)
    with pytest.raises(DataError) as refused:
        rule_of_shards(config, flat, made)(deed(states), "states")
    assert words in str(refused.value)


def test_shards_that_keep_nothing_have_no_rule() -> None:
    config, flat, _ = of("push")
    synchronous = Config.from_dict({"data": {"train": "rows"}, "model": {"name": "lenet"}})
    experiment = Experiment(
        optimizer=config.optimizer, schedule=config.schedule, num_shards=2, turns_per_epoch=9, total_turns=9
    )
    assert rule_of_shards(synchronous, flat, make_solver(synchronous, flat, experiment)) is None
