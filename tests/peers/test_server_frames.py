"""What the server and its workers say to each other survives the wire, and nothing else is believed."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparksgd.arithmetic.flat import Weights
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.data.shard import Descriptor
from sparksgd.engines.replies import Evaluation
from sparksgd.errors import ConfigError, NotFinite, PeerLost, SparkSGDError, UserCodeError
from sparksgd.peers import server_frames as frames
from sparksgd.peers.frames import Frame
from sparksgd.solvers.protocol import Answer, Message

P, Q, C = 5, 2, 1
DRAWN = np.random.default_rng(3)
WEIGHTS = Weights(
    version=7,
    parameters=DRAWN.standard_normal(P).astype(np.float32),
    statistics=DRAWN.standard_normal(Q),
    counters=np.array([4]),
)
VECTORS = frames.Vectors.of(WEIGHTS, trainable=2)
SHARD = Descriptor(shard=1, host="a", path="/b", rows=3, repeats=0, row_digest=(2**64 - 1, 7), digest="c")
ANSWER = Answer(
    weights=WEIGHTS,
    turn=3,
    settings=({"lr": 0.1, "betas": (0.9, 0.999)},),
    vectors={"momentum": DRAWN.standard_normal(P).astype(np.float32)},
    scalars={"alpha": 1 / 3},
)
MESSAGE = Message(
    vectors={"gradient": DRAWN.standard_normal(P).astype(np.float32)},
    scalars={"norm": 0.1},
    statistics=DRAWN.standard_normal(Q),
    counters=np.array([5]),
    loss=1 / 7,
    rows=16,
    weight=15.5,
    touched=np.array([True, False]),
)
TIMES = frames.Times(started_at_s=1.5e9, computed_s=0.25, waited_s=0.125)


def over_the_wire(frame: Frame) -> Frame:
    """Return what JSON makes of a frame's fields; arrays cross as they are."""
    return replace(frame, fields=json.loads(json.dumps(frame.fields)))


def test_an_order_with_an_answer_survives() -> None:
    frame = over_the_wire(frames.turn_frame(2, 9, ANSWER))
    got = frames.answer_in(frame, VECTORS)
    assert got is not None
    assert (frames.field_of(frame, "shard", int), frames.field_of(frame, "turn", int)) == (2, 9)
    assert (got.turn, got.turns, got.settings, got.scalars) == (3, 1, ANSWER.settings, ANSWER.scalars)
    assert got.weights.version == 7
    assert got.weights.parameters is WEIGHTS.parameters
    assert got.vectors.keys() == {"momentum"}
    assert frames.answer_in(over_the_wire(frames.turn_frame(2, 9, None)), VECTORS) is None


@pytest.mark.parametrize("changed", [{}, {"weight": None, "touched": None}, {"loss": float("inf")}])
def test_a_message_survives(changed: dict[str, Any]) -> None:
    message = replace(MESSAGE, **changed)
    frame = over_the_wire(frames.sent_frame(2, 9, message, TIMES))
    got = frames.message_in(frame, VECTORS)
    assert frames.times_in(frame) == TIMES
    for name in ("scalars", "loss", "rows", "weight", "shards", "changes"):
        assert getattr(got, name) == getattr(message, name)
    for name in ("statistics", "counters", "touched"):
        assert getattr(got, name) is getattr(message, name)
    assert got.vectors["gradient"] is message.vectors["gradient"]


def test_numbers_of_a_rule_of_one_s_own_are_the_same_on_every_engine() -> None:
    tenth = np.float32(0.1)
    numbers = {"alpha": tenth, "beta": torch.tensor(0.1), "gamma": 2}
    same = {"alpha": float(tenth), "beta": float(tenth), "gamma": 2.0}
    message, answer = replace(MESSAGE, scalars=numbers), replace(ANSWER, scalars=numbers)
    sent = frames.message_in(over_the_wire(frames.sent_frame(2, 9, message, TIMES)), VECTORS)
    got = frames.answer_in(over_the_wire(frames.turn_frame(2, 9, answer)), VECTORS)
    assert got is not None
    for scalars in (message.scalars, answer.scalars, sent.scalars, got.scalars):
        assert scalars == same
        assert {type(value) for value in scalars.values()} == {float}


def test_the_other_frames_survive() -> None:
    sums = Evaluation(loss=0.5, correct=3.0, rows=4, weight=None, sums={"f1": np.ones((3, 2))})
    got = frames.evaluation_in(over_the_wire(frames.evaluated_frame(1, 7, sums)))
    assert got is not None
    assert (got.loss, got.correct, got.rows, got.weight) == (0.5, 3.0, 4, None)
    assert got.sums["f1"] is sums.sums["f1"]
    assert frames.evaluation_in(over_the_wire(frames.evaluated_frame(1, 7, None))) is None
    order = over_the_wire(frames.evaluate_frame(SHARD, 7, WEIGHTS))
    assert frames.descriptor_in(order) == SHARD
    assert frames.weights_in(order, VECTORS).counters is WEIGHTS.counters
    numerics = Numerics.here(1)
    here = frames.here_in(3, over_the_wire(frames.here_frame("host", numerics)))
    assert here == frames.Here(seat=3, host="host", numerics=numerics)


@pytest.mark.parametrize(
    "failure",
    [
        UserCodeError("the user's own mistake\n  in turn 3"),
        NotFinite("x" * 200_000),
        NotFinite("\N{DIRECT HIT}" * 200_000),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_an_error_stays_the_same_error(failure: SparkSGDError) -> None:
    frame = frames.failed_frame(failure)
    assert len(frame.buffers(b"run-0001")[0]) < 1 << 20
    got = frames.failure_in(over_the_wire(frame))
    assert type(got) is type(failure)
    assert str(failure).startswith(str(got))
    assert len(str(got)) > 10


@pytest.mark.parametrize("name", ["SystemExit", "os", "annotations", "", 7])
def test_an_error_that_is_none_of_ours_is_not_raised(name: Any) -> None:
    fields = {"error": name, "text": "x"}
    with pytest.raises(PeerLost):
        frames.failure_in(Frame(kind="failed", fields=fields))


def test_a_schedule_that_sets_a_tensor_is_refused_in_words() -> None:
    answer = replace(ANSWER, settings=({"lr": torch.tensor(0.1)},))
    with pytest.raises(ConfigError, match=r"the schedule sets lr of the optimiser to tensor\(0.1000\)"):
        frames.turn_frame(0, 0, answer)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": 0}, "of 0 rows"),
        ({"rows": 17}, "of 17 rows, where its turns had 16"),
        ({"rows": 2**63}, "of 9223372036854775808 rows"),
        ({"weight": 0.0}, "weigh 0.0"),
        ({"weight": -1.0}, "weigh -1.0"),
        ({"weight": float("nan")}, "weigh nan"),
        ({"weight": float("inf")}, "weigh inf"),
        ({"vectors": []}, r"has vectors \[\], where gradient was due"),
    ],
)
def test_a_message_that_no_turns_can_have_made_is_refused(changed: dict[str, Any], words: str) -> None:
    good = frames.sent_frame(2, 9, MESSAGE, TIMES)
    with pytest.raises(PeerLost, match=words):
        frames.message_in(replace(good, fields=good.fields | changed), VECTORS, 16, ("gradient",))
    assert frames.message_in(good, VECTORS, 16, ("gradient",)).rows == 16


wrong = st.sampled_from([None, "text", -1, 1.5, True, [], {}, [[]], [7], [{}], {"a": 1}, {"a": []}, 10**30])


@given(name=st.sampled_from(sorted(frames.sent_frame(0, 0, MESSAGE, TIMES).fields)), value=wrong)
def test_a_field_that_is_wrong_ends_in_our_error_or_in_a_message(name: str, value: Any) -> None:
    good = frames.sent_frame(0, 0, MESSAGE, TIMES)
    frame = replace(good, fields={**good.fields, name: value})
    with suppress(PeerLost):
        frames.message_in(frame, VECTORS)
        frames.times_in(frame)
        frames.field_of(frame, "shard", int)


@given(name=st.sampled_from(sorted(frames.turn_frame(0, 0, ANSWER).fields["answer"])), value=wrong)
def test_so_it_is_in_an_answer(name: str, value: Any) -> None:
    good = frames.turn_frame(0, 0, ANSWER)
    frame = replace(good, fields={**good.fields, "answer": {**good.fields["answer"], name: value}})
    with suppress(PeerLost):
        frames.answer_in(frame, VECTORS)


@pytest.mark.parametrize("name", ["statistics", "counters", "vector/gradient", "touched"])
@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros(P), np.zeros((P, 1), np.float32), np.zeros(P, np.int64)], ids=str
)
def test_an_array_of_another_form_is_refused(name: str, array: Any) -> None:
    good = frames.sent_frame(0, 0, MESSAGE, TIMES)
    with pytest.raises(PeerLost, match=r"a frame has "):
        frames.message_in(replace(good, arrays={**good.arrays, name: array}), VECTORS)


@pytest.mark.parametrize(
    ("fields", "arrays"),
    [
        ({"rows": -1}, {}),
        ({"rows": 3, "loss": None}, {}),
        ({}, {"other": np.zeros(1)}),
        ({}, {"sums/f1": np.zeros(1, np.float32)}),
    ],
)
def test_sums_that_are_none_are_refused(fields: dict[str, Any], arrays: dict[str, Any]) -> None:
    good = frames.evaluated_frame(1, 7, Evaluation(loss=0.5, correct=None, rows=4))
    with pytest.raises(PeerLost):
        frames.evaluation_in(replace(good, fields={**good.fields, **fields}, arrays=arrays))


def test_a_frame_is_no_longer_than_it_may_be() -> None:
    assert frames.sent_frame(0, 0, MESSAGE, TIMES).array_bytes <= VECTORS.most_bytes(1)
    assert frames.turn_frame(0, 0, ANSWER).array_bytes <= VECTORS.most_bytes(2)
