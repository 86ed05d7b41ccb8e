"""Frames between a server and its workers: whole, in order, and nothing that is not due."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from sparksgd.arithmetic.reused import ReusedArrays
from sparksgd.errors import PeerLost
from sparksgd.peers.frames import Frame, FrameReader, FrameWriter
from sparksgd.peers.wire import Connection

RUN = b"run-0001"
MOST = 1 << 20


@contextmanager
def connected() -> Iterator[tuple[Connection, Connection]]:
    """Yield both ends of a connection, without its proof."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = Connection(socket.create_connection(listening.getsockname()), b"")
        there = Connection(listening.accept()[0], b"")
    yield here, there
    here.close()
    there.close()


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    with connected() as both:
        yield both


def told(writer: FrameWriter, reader: FrameReader, connection: Connection) -> Frame:
    """Send all that waits, and return the frame that came."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    while (frame := reader.read()) is None:
        writer.write()
        assert poll.poll(5000)
    return frame


arrays = nps.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.bool_]),
    nps.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=300),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(
    kind=st.text(), fields=st.dictionaries(st.text(), plain, max_size=4),
    sent=st.dictionaries(st.text(), arrays, max_size=4),
)  # fmt: skip
def test_what_is_sent_comes_to_the_last_bit(kind: str, fields: dict[str, Any], sent: dict[str, Any]) -> None:
    with connected() as (here, there):
        writer, reader = FrameWriter(here, RUN), FrameReader(there, RUN, "it", 1 << 24)
        for _ in range(2):
            writer.put(Frame(kind=kind, fields=fields, arrays=sent))
        for _ in range(2):
            frame = told(writer, reader, there)
            assert (frame.kind, frame.fields) == (kind, fields)
            assert frame.arrays.keys() == sent.keys()
            for name, array in sent.items():
                got = frame.arrays[name]
                assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert writer.is_empty
        assert reader.read() is None


def test_a_frame_larger_than_the_buffers_of_sockets_is_sent_in_parts(
    ends: tuple[Connection, Connection],
) -> None:
    large = np.random.default_rng(0).standard_normal(1_000_000)
    writer, reader = FrameWriter(ends[0], RUN), FrameReader(ends[1], RUN, "it", large.nbytes)
    writer.put(Frame(kind="large", arrays={"it": large}))
    writer.write()
    assert not writer.is_empty
    assert told(writer, reader, ends[1]).arrays["it"].tobytes() == large.tobytes()


def test_frames_are_received_into_arrays_that_nobody_has_any_more(
    ends: tuple[Connection, Connection],
) -> None:
    vector = np.arange(1024, dtype=np.float32)
    writer, reader = FrameWriter(ends[0], RUN), FrameReader(ends[1], RUN, "it", MOST, ReusedArrays())
    places, kept = set(), []
    for number in range(6):
        writer.put(Frame(kind="it", arrays={"v": vector + number}))
        frame = told(writer, reader, ends[1])
        places.add(frame.arrays["v"].ctypes.data)
        if number == 3:
            kept.append(frame.arrays["v"][1:])
        del frame
    assert len(places) == 2
    assert kept[0].tolist() == (vector + 3)[1:].tolist()


def test_what_has_another_shape_each_time_is_not_kept(ends: tuple[Connection, Connection]) -> None:
    kept = ReusedArrays({(1024,)})
    writer, reader = FrameWriter(ends[0], RUN), FrameReader(ends[1], RUN, "it", MOST, kept)
    for number in range(100):
        writer.put(Frame(kind="evaluated", arrays={"sums/area": np.zeros((3, 500 + number))}))
        assert told(writer, reader, ends[1]).arrays["sums/area"].shape == (3, 500 + number)
    assert len(kept) == 0


def arrived(connection: Connection, count: int) -> None:
    """Wait until so many bytes are there."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    while len(connection.sock.recv(count, socket.MSG_PEEK)) < count if poll.poll(5000) else False:
        pass


def head(kind: Any = "it", fields: Any = None, described: Any = ()) -> bytes:
    return json.dumps([kind, {} if fields is None else fields, described]).encode()


def framed(head: bytes, array_bytes: int = 0, run: bytes = RUN, head_bytes: int | None = None) -> bytes:
    length = len(head) if head_bytes is None else head_bytes
    return struct.pack(">8sIQ", run, length, array_bytes) + head


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (framed(head(), run=b"run-0002"), f"where run {RUN.hex()} was due"),
        (framed(head(), head_bytes=0), "with 0 and 0 bytes"),
        (framed(head(), head_bytes=1 << 31), "with 2,147,483,648 and 0 bytes"),
        (framed(head(), array_bytes=MOST + 1), "with 14 and 1,048,577 bytes"),
        (framed(head(), array_bytes=1 << 63), "9,223,372,036,854,775,808 bytes"),
        (framed(b"no JSON"), "is no frame"),
        (framed(b"\xff\xfe"), "is no frame"),
        (framed(b"[" * 100_000), "is no frame"),
        (framed(b"{}"), "is no frame"),
        (framed(b"[1, 2]"), "is no frame"),
        (framed(head(fields={"n": 10**400})), "is too large"),
        (framed(head(kind=7)), "its kind is no text"),
        (framed(head(fields=[])), "its fields are no object"),
        (framed(head(described=7)), "is no frame"),
        (framed(head(described={})), "its arrays are no list of 256 at most"),
        (framed(head(described=[["k", "<f4", [0]]] * 257)), "its arrays are no list of 256 at most"),
        (framed(head(described=[["a", "<f4"]])), "is no frame"),
        (framed(head(described=[["a", "|O8", [1]]]), array_bytes=8), "an array of type '|O8'"),
        (framed(head(described=[["a", "<f4", [-1]]])), "shape [-1]"),
        (framed(head(described=[["a", "<f4", [1.0]]]), array_bytes=4), "shape [1.0]"),
        (framed(head(described=[["a", "<f4", [True]]]), array_bytes=4), "shape [True]"),
        (framed(head(described=[["a", "<f4", [2]]]), array_bytes=4), "other lengths than it says"),
        (framed(head(described=[["a", "<f4", [1 << 62]]]), array_bytes=4), "other lengths than it says"),
        (framed(head(described=[[["a"], "<f4", [1]]]), array_bytes=4), "is no name"),
        (framed(head(described=[[7, "<f4", [1]]]), array_bytes=4), "7 is no name"),
        (framed(head(described=[["a", "<f4", {}]]), array_bytes=4), "shape {}"),
        (framed(head(described=[["a", "<f4", [1] * 100]]), array_bytes=4), "and shape [1, 1"),
        (framed(head(described=[["a", "<f4", [0, 1 << 62, 1 << 62]]])), "is no frame"),
        (framed(head(described=[["a", "<f4", [(1 << 64) - 1, 0]]])), "is no frame"),
    ],
)
def test_what_is_no_frame_of_this_run_is_refused_before_anything_is_allocated(
    ends: tuple[Connection, Connection], sent: bytes, words: str
) -> None:
    reader = FrameReader(ends[1], RUN, "worker 3", MOST)
    ends[0].sock.sendall(sent)
    arrived(ends[1], len(sent))
    with pytest.raises(PeerLost, match=r"^worker 3 sent ") as refused:
        reader.read()
    assert words in str(refused.value)


def test_an_end_that_closes_is_lost_also_within_a_frame(ends: tuple[Connection, Connection]) -> None:
    reader = FrameReader(ends[1], RUN, "worker 3", MOST)
    ends[0].sock.sendall(framed(head())[:10])
    arrived(ends[1], 10)
    assert reader.read() is None
    ends[0].close()
    select.select([ends[1].sock], [], [], 5)
    with pytest.raises(PeerLost, match=r"^worker 3 closed its connection$"):
        reader.read()
