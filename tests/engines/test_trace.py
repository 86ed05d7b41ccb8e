"""A trace is written line by line, and read back as it was, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.engines.trace import (
    MOST_LINE_BYTES,
    Trace,
    TraceEvent,
    event_line,
    first_line,
    read_trace,
    took_part_of,
)
from sparksgd.errors import DataError
from sparksgd.storage import location
from sparksgd.storage.reading import read_lines


def lines(events: Iterable[TraceEvent], family: str = "rounds") -> list[bytes]:
    texts = [first_line(family), *(event_line(order, event) for order, event in enumerate(events))]
    return [f"{text}\n".encode() for text in texts]


def push(version: int, shard: int | None, turn: int | None = None) -> TraceEvent:
    return TraceEvent(kind="push", turn=version if turn is None else turn, version=version, shard=shard)


DEAL = TraceEvent(kind="deal", turn=2, version=2)

SOME = [
    TraceEvent(kind="start", worker=2, shard=3, turn=0, version=0),
    TraceEvent(kind="push", worker=2, shard=3, turn=0, version=0),
    TraceEvent(kind="pull", worker=2, shard=3, turn=1, version=1, strip=0),
    TraceEvent(kind="hold", shard=3, turn=1, version=1),
    TraceEvent(kind="lost", worker=2, shard=3, turn=1, version=1),
    TraceEvent(kind="deal", turn=7, version=5),
]


# Lines


def test_a_trace_looks_like_this() -> None:
    assert b"".join(lines(SOME)).decode() == (
        '{"trace": 1, "family": "rounds"}\n'
        '{"order": 0, "kind": "start", "turn": 0, "version": 0, "worker": 2, "shard": 3}\n'
        '{"order": 1, "kind": "push", "turn": 0, "version": 0, "worker": 2, "shard": 3}\n'
        '{"order": 2, "kind": "pull", "turn": 1, "version": 1, "worker": 2, "shard": 3, "strip": 0}\n'
        '{"order": 3, "kind": "hold", "turn": 1, "version": 1, "shard": 3}\n'
        '{"order": 4, "kind": "lost", "turn": 1, "version": 1, "worker": 2, "shard": 3}\n'
        '{"order": 5, "kind": "deal", "turn": 7, "version": 5}\n'
    )


numbers = st.integers(0, 10**12)


@given(
    family=st.sampled_from(["rounds", "arrivals", "gossip"]),
    events=st.lists(
        st.builds(
            TraceEvent,
            kind=st.sampled_from(["start", "push", "pull", "hold", "lost", "deal"]),
            turn=numbers,
            version=numbers,
            worker=st.none() | numbers,
            shard=st.none() | numbers,
            strip=st.none() | numbers,
        )
    ),
)
def test_what_is_written_is_read_back(family: str, events: list[TraceEvent]) -> None:
    assert read_trace(lines(events, family), "trace.jsonl") == (family, events)


def test_events_are_taken_once_in_the_order_in_which_they_were_noted() -> None:
    trace = Trace()
    trace.note("start", turn=0, version=0, shard=1, worker=4)
    trace.note("push", turn=0, version=0, shard=1)
    assert trace.take() == (
        TraceEvent(kind="start", worker=4, shard=1, turn=0, version=0),
        TraceEvent(kind="push", shard=1, turn=0, version=0),
    )
    assert trace.take() == ()


def test_what_came_to_nothing_is_withdrawn() -> None:
    trace = Trace()
    for version in (0, 1):
        trace.note("start", turn=version, version=version, shard=0)
        trace.note("push", turn=version, version=version, shard=0)
    trace.withdraw("push", 1)
    assert [(event.kind, event.version) for event in trace.take()] == [
        ("start", 0),
        ("push", 0),
        ("start", 1),
    ]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    whole, file = lines(SOME), tmp_path / "trace.jsonl"
    for cut in range(len(whole[-1])):
        file.write_bytes(b"".join([*whole[:-1], whole[-1][:cut]]))
        found = read_trace(read_lines(location(file), MOST_LINE_BYTES), "trace.jsonl")
        assert found == ("rounds", SOME[:-1])


@pytest.mark.parametrize("gone", range(1, len(SOME)))
def test_a_trace_that_lacks_a_line_is_refused(gone: int) -> None:
    found = lines(SOME)
    del found[gone]
    with pytest.raises(DataError, match=r"/run/trace\.jsonl is not whole: the orders of its events"):
        read_trace(found, "/run/trace.jsonl")


def test_lines_in_another_order_are_refused() -> None:
    found = lines(SOME)
    found[2], found[3] = found[3], found[2]
    with pytest.raises(DataError, match="is not whole"):
        read_trace(found, "trace.jsonl")


def test_another_format_is_refused() -> None:
    found = [b'{"trace": 2, "family": "rounds"}\n', *lines(SOME)[1:]]
    with pytest.raises(DataError, match=r"^trace\.jsonl is a trace of format 2, but this version reads 1$"):
        read_trace(found, "trace.jsonl")


@pytest.mark.parametrize(
    "found",
    [
        [],
        [b""],
        [b'{"trace": 1'],
        [b"[]\n"],
        [b"3\n"],
        [b"{}\n"],
        [b'{"trace": 1}\n'],
        [b"not JSON\n"],
        [b"\xff\xfe\n"],
        [lines([])[0], b"[0]\n"],
        [lines([])[0], b"0\n"],
        [lines([])[0], b'{"order": 0}\n'],
        [lines([])[0], b'{"order": 0, "kind": "push", "turn": 0}\n'],
        [lines([])[0], b'{"order": 0, "kind": "push", "turn": 0, "version": 0, "mood": 1}\n'],
        [lines([])[0], lines(SOME)[1][:20] + b"\n", lines(SOME)[2]],
    ],
    ids=str,
)
def test_what_is_no_trace_is_refused(found: list[bytes]) -> None:
    with pytest.raises(DataError, match=r"^trace\.jsonl is no trace: \w+Error: "):
        read_trace(found, "trace.jsonl")


def test_events_of_another_kind_are_refused() -> None:
    line = json.dumps({"order": 0, "kind": "pushed", "turn": 0, "version": 0}).encode() + b"\n"
    with pytest.raises(DataError, match=r"^trace\.jsonl has an event of kind 'pushed', which this version"):
        read_trace([lines([])[0], line], "trace.jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("turn", None),
        ("turn", "1"),
        ("version", True),
        ("version", 0.5),
        ("shard", [1]),
        ("worker", "0"),
        ("strip", {}),
    ],
)
def test_a_count_that_is_no_whole_number_is_refused(name: str, value: object) -> None:
    line = json.dumps({"order": 0, "kind": "push", "turn": 0, "version": 0, "shard": 0} | {name: value})
    with pytest.raises(DataError, match=f"is no trace: TypeError: {name} is .*, but must be a whole number"):
        read_trace([lines([])[0], f"{line}\n".encode()], "trace.jsonl")


ODD = [
    b"", b"{", b"[]", b"3", b"null", b"NaN", b"\xff", b"[" * 5000, b"9" * 5000, b'{"order": 0}',
    b'"' + b"x" * 5000,
    b'{"trace": 1}', b'{"trace": 1, "family": 3}', b'{"trace": "' + b"x" * 5000 + b'", "family": "rounds"}',
    b'{"order": 0, "kind": [], "turn": 0, "version": 0}', b'{"order": 0, "turn": 0}',
    b'{"order": 0, "kind": "' + b"k" * 5000 + b'", "turn": 0, "version": 0}',
    b'{"' + b"k" * 5000 + b'": 0, "order": 0}',
]  # fmt: skip


@given(
    st.lists(
        st.sampled_from([*ODD, *(line[:-1] for line in lines(SOME))]) | st.binary(max_size=9), max_size=4
    )
)
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_any_lines_are_a_trace_or_refused(found: list[bytes]) -> None:
    refused = ""
    try:
        _, events = read_trace([line + b"\n" for line in found], "trace.jsonl")
        took_part_of(events)
    except DataError as error:
        refused = str(error)
    assert len(refused) < 1000


# Who took part


def test_the_shards_of_each_step_are_those_that_were_pushed() -> None:
    start = TraceEvent(kind="start", turn=0, version=0, shard=7)
    lost = TraceEvent(kind="lost", turn=0, version=0, shard=2)
    events = [start, push(0, 1), push(0, 0), lost, push(1, 3), start, push(2, 0), push(2, 3)]
    assert took_part_of(events) == ([{0, 1}, {3}, {0, 3}], [0, 0, 0])
    assert took_part_of([]) == ([], [])
    assert took_part_of([start, lost]) == ([], [])


def test_versions_count_steps_however_many_turns_they_have() -> None:
    assert took_part_of([push(0, 0, turn=0), push(1, 1, turn=16)]) == ([{0}, {1}], [0, 0])


def test_a_deal_counts_from_the_next_step() -> None:
    events = [push(0, 0), push(1, 0), DEAL, push(2, 1), push(3, 1), DEAL, DEAL, push(4, 1)]
    assert took_part_of(events) == ([{0}, {0}, {1}, {1}, {1}], [0, 0, 1, 1, 3])


@pytest.mark.parametrize(
    ("events", "step"),
    [
        ([push(1, 0)], 2),
        ([push(0, 0), push(2, 0)], 3),
        ([push(0, 0), push(1, 0), push(0, 1)], 1),
        ([push(0, None)], 1),
    ],
    ids=["no first step", "a gap", "back again", "a push of nobody"],
)
def test_steps_out_of_order_are_refused(events: Sequence[TraceEvent], step: int) -> None:
    with pytest.raises(DataError, match=rf"^the trace is out of order at step {step}$"):
        took_part_of(events)
