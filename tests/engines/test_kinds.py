"""Every engine carries what its row says, and is refused for anything else."""

from __future__ import annotations

import pytest

from sparksgd.config import EngineConfig
from sparksgd.engines.kinds import (
    ALLREDUCE,
    INLINE,
    KINDS,
    SERVER,
    SIMULATED,
    STAGES,
    TREE,
    EngineKind,
    candidates,
    refuse_uncarried,
)
from sparksgd.errors import ConfigError
from sparksgd.imports import resolve
from sparksgd.solvers.protocol import Need

ROUNDS, ARRIVALS, GOSSIP, QUORUM = Need.ROUNDS, Need.ARRIVALS, Need.GOSSIP, Need.QUORUM
RECORDED, REPLAY, SHARD_STATE, LAG = Need.RECORDED_ARRIVALS, Need.REPLAY, Need.SHARD_STATE, Need.LAG

CARRIED = {
    #             inline  tree   stages  allreduce  server  simulated
    ROUNDS:      (True,   True,  True,   True,      False,  True),
    ARRIVALS:    (False,  False, False,  False,     True,   True),
    RECORDED:    (True,   False, False,  False,     False,  False),
    GOSSIP:      (True,   False, False,  False,     False,  True),
    QUORUM:      (False,  False, True,   False,     False,  True),
    REPLAY:      (True,   True,  True,   False,     False,  False),
    SHARD_STATE: (True,   False, False,  False,     False,  True),
    LAG:         (True,   False, False,  False,     True,   True),
}  # fmt: skip

WORDS = {
    ROUNDS: "messages of all shards in one sum",
    ARRIVALS: "messages that reach the centre one by one",
    RECORDED: "messages in the order of a trace",
    GOSSIP: "messages from shard to shard",
    QUORUM: "steps that end when the first shards have arrived",
    REPLAY: "steps of the shards that a trace names",
    SHARD_STATE: "a state of each shard that outlives the round",
    LAG: "an exchange that runs beside the next turn",
}

INSTEAD = {
    ROUNDS: (
        'use engine.name = "inline" or engine.name = "tree" or engine.name = "tree" (in ordinary stages) or '
        'engine.name = "allreduce" or engine.name = "simulated" (in virtual time)'
    ),
    ARRIVALS: 'use engine.name = "server" or engine.name = "simulated" (in virtual time)',
    RECORDED: 'use engine.name = "inline"',
    GOSSIP: 'use engine.name = "inline" or engine.name = "simulated" (in virtual time)',
    QUORUM: 'use engine.name = "tree" (in ordinary stages) or engine.name = "simulated" (in virtual time)',
    REPLAY: (
        'use engine.name = "inline" or engine.name = "tree" or engine.name = "tree" (in ordinary stages)'
    ),
    SHARD_STATE: 'use engine.name = "inline" or engine.name = "simulated" (in virtual time)',
    LAG: (
        'use engine.name = "inline" or engine.name = "server" or engine.name = "simulated" (in virtual time)'
    ),
}

CALLED = {
    INLINE: 'engine.name = "inline"',
    TREE: 'engine.name = "tree"',
    STAGES: 'engine.name = "tree" (in ordinary stages)',
    ALLREDUCE: 'engine.name = "allreduce"',
    SERVER: 'engine.name = "server"',
    SIMULATED: 'engine.name = "simulated" (in virtual time)',
}

PAIRS = [
    pytest.param(kind, need, carried, id=f"{CALLED[kind]} and {need.name}")
    for need, row in CARRIED.items()
    for kind, carried in zip(KINDS, row, strict=True)
]


def test_the_table_has_every_engine_and_every_need() -> None:
    assert list(CALLED) == list(KINDS)
    assert CARRIED.keys() == set(Need)


@pytest.mark.parametrize(("kind", "need", "carried"), PAIRS)
def test_what_is_not_carried_is_refused_with_the_engines_that_would(
    kind: EngineKind, need: Need, carried: bool
) -> None:
    if carried:
        refuse_uncarried(kind, frozenset({need}), "the rule")
        return
    with pytest.raises(ConfigError) as refused:
        refuse_uncarried(kind, frozenset({need}), "the rule")
    assert str(refused.value) == (
        f"the rule needs {WORDS[need]}, which {CALLED[kind]} does not carry: {INSTEAD[need]}"
    )


def test_all_that_is_lacking_is_named_and_nothing_else() -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_uncarried(TREE, frozenset({SHARD_STATE, ROUNDS, QUORUM}), "the rule")
    assert str(refused.value) == (
        f"the rule needs {WORDS[QUORUM]} and {WORDS[SHARD_STATE]}, which "
        f'engine.name = "tree" does not carry: use engine.name = "simulated" (in virtual time)'
    )


def engine(name: str, *, barrier: bool = True) -> EngineConfig:
    return EngineConfig(name=name, barrier=barrier)


def short(value: object) -> str:
    """Return a test's part in few words."""
    if isinstance(value, EngineConfig):
        return value.name if value.barrier else f"{value.name} without barrier"
    return " ".join(sorted(need.name for need in value)) if isinstance(value, set) else ""


@pytest.mark.parametrize(
    ("config", "needs", "expected"),
    [
        (engine("inline"), {ROUNDS}, [INLINE]),
        (engine("inline", barrier=False), {ROUNDS, REPLAY, SHARD_STATE}, [INLINE]),
        (engine("tree"), {ROUNDS}, [TREE, STAGES]),
        (engine("tree"), {ROUNDS, REPLAY}, [TREE, STAGES]),
        (engine("tree"), {ROUNDS, QUORUM}, [STAGES]),
        (engine("tree", barrier=False), {ROUNDS}, [STAGES]),
        (engine("tree", barrier=False), {ROUNDS, QUORUM}, [STAGES]),
        (engine("allreduce"), {ROUNDS}, [ALLREDUCE]),
        (engine("auto"), {ROUNDS}, [ALLREDUCE, TREE, STAGES]),
        (engine("auto"), {ARRIVALS}, [SERVER]),
        (engine("auto", barrier=False), {ARRIVALS}, [SERVER]),
        (engine("auto"), {ROUNDS, REPLAY}, [TREE, STAGES]),
        (engine("auto"), {ROUNDS, QUORUM}, [STAGES]),
        (engine("auto", barrier=False), {ROUNDS}, [STAGES]),
    ],
    ids=short,
)
def test_the_engines_that_a_configuration_allows_in_the_order_in_which_they_are_tried(
    config: EngineConfig, needs: set[Need], expected: list[EngineKind]
) -> None:
    assert candidates(config, needs, "the rule") == expected


@pytest.mark.parametrize(
    ("config", "needs", "words"),
    [
        (engine("inline"), {ROUNDS, QUORUM}, f"the rule needs {WORDS[QUORUM]}, which {CALLED[INLINE]}"),
        (engine("inline"), {ROUNDS, QUORUM}, INSTEAD[QUORUM]),
        (engine("allreduce"), {ROUNDS, QUORUM}, f"the rule needs {WORDS[QUORUM]}, which {CALLED[ALLREDUCE]}"),
        (engine("allreduce", barrier=False), {ROUNDS, QUORUM}, INSTEAD[QUORUM]),
        (engine("allreduce"), {ROUNDS, REPLAY}, INSTEAD[REPLAY]),
        (engine("tree"), {ROUNDS, SHARD_STATE}, f"the rule needs {WORDS[SHARD_STATE]}"),
        (
            engine("tree"),
            {QUORUM, SHARD_STATE},
            f"the rule needs {WORDS[SHARD_STATE]}, which {CALLED[STAGES]}",
        ),
        (engine("tree", barrier=False), {ROUNDS, SHARD_STATE}, INSTEAD[SHARD_STATE]),
        (engine("auto"), {ROUNDS, SHARD_STATE}, INSTEAD[SHARD_STATE]),
        (engine("auto"), {GOSSIP}, INSTEAD[GOSSIP]),
        (engine("tree"), {ARRIVALS}, INSTEAD[ARRIVALS]),
    ],
    ids=short,
)
def test_where_no_engine_that_is_allowed_carries_the_rule_that_is_said(
    config: EngineConfig, needs: set[Need], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        candidates(config, needs, "the rule")
    assert words in str(refused.value)


def test_an_engine_that_is_all_barrier_is_refused_without_it() -> None:
    with pytest.raises(ConfigError) as refused:
        candidates(engine("allreduce", barrier=False), {ROUNDS}, "the rule")
    assert str(refused.value) == (
        'engine.barrier is false, but engine.name is "allreduce", whose workers all wait for each other: '
        'use engine.name = "tree"'
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("all-reduce", "did you mean allreduce?"),
        ("Tree", "did you mean tree?"),
        ("in_line", "did you mean inline?"),
        ("automatic", "did you mean auto?"),
        ("mpi", "valid: allreduce, auto, inline, server, simulated, tree"),
    ],
)
def test_an_engine_that_is_not_there_is_refused_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as refused:
        candidates(engine(name), {ROUNDS}, "the rule")
    assert str(refused.value) == f"engine.name is {name!r}, which is no engine ({nearest})"


def test_what_engines_need_of_a_cluster() -> None:
    #                       on Spark  barrier
    assert {kind: (kind.on_spark, kind.barrier) for kind in KINDS} == {
        INLINE:             (False,   False),
        TREE:               (True,    True),
        STAGES:             (True,    False),
        ALLREDUCE:          (True,    True),
        SERVER:             (True,    False),
        SIMULATED:          (False,   False),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_s_class_is_where_it_says_and_calls_itself_the_same(kind: EngineKind) -> None:
    found = resolve("engine.name", kind.home, {})
    assert (found.name, found.mode) == (kind.name, kind.mode)
