"""The server's desk: who is let in, what is told in which order, and what happens to who is cut off."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from company_of_workers import HOST

from sparksgd.peers.credentials import Credentials
from sparksgd.peers.frames import Frame, FrameReader, FrameWriter
from sparksgd.peers.server_desk import Came, Joined, Left, ServerDesk
from sparksgd.peers.server_worker import HELLO
from sparksgd.peers.wire import Connection, connect

WAIT_S = 20.0
MOST = 1 << 24


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def desk(request: pytest.FixtureRequest) -> Iterator[ServerDesk]:
    desk = ServerDesk(
        run=b"run-0001", credentials=Credentials.new(encrypt=request.param), host=HOST, listen_on=HOST,
        ports=None, num_workers=4, timeout_s=5,
    )  # fmt: skip
    desk.start(MOST)
    yield desk
    desk.close()


class Worker:
    """The other end, as simple as can be."""

    def __init__(self, desk: ServerDesk, number: int, request: int = 1) -> None:
        about = desk.address
        hello = HELLO.pack(request, number)
        self.connection: Connection = connect(about.credentials, about.address, hello, "the desk", 5)
        self.writer = FrameWriter(self.connection, about.run)
        self.reader = FrameReader(self.connection, about.run, "the desk", MOST)

    def say(self, *frames: Frame) -> None:
        for frame in frames:
            self.writer.put(frame)
        while not self.writer.is_empty:
            self.writer.write()

    def hear(self) -> Frame:
        while (frame := self.reader.read()) is None:
            assert select.select([self.connection.sock], [], [], WAIT_S)[0]
        return frame

    def is_cut_off(self) -> bool:
        return self.connection.ends(WAIT_S)


def test_frames_come_in_the_order_in_which_a_worker_sent_them(desk: ServerDesk) -> None:
    desk.expect(2, 1)
    worker = Worker(desk, 2)
    assert desk.next(WAIT_S) == Joined(worker=2, seat=1)
    assert desk.seats == {2: 1}
    vector = np.arange(300_000, dtype=np.float32)
    worker.say(*(Frame(kind=str(n), arrays={"v": vector}) for n in range(3)))
    for number in range(3):
        came = desk.next(WAIT_S)
        assert isinstance(came, Came)
        assert (came.worker, came.frame.kind) == (2, str(number))
        assert came.frame.arrays["v"].tobytes() == vector.tobytes()
    assert desk.next(0) is None
    worker.connection.close()
    left = desk.next(WAIT_S)
    assert isinstance(left, Left)
    assert left.worker == 2
    assert desk.seats == {}


def test_it_says_whose_news_wait_to_be_read(desk: ServerDesk) -> None:
    for number in (0, 1):
        desk.expect(number, 1)
    workers = [Worker(desk, number) for number in (0, 1)]
    assert {type(desk.next(WAIT_S)), type(desk.next(WAIT_S))} == {Joined}
    assert not desk.has_news(0)
    workers[0].say(Frame(kind="one"), Frame(kind="two"))
    arrived(workers[0], desk)
    assert (desk.has_news(0), desk.has_news(1), desk.has_news(2)) == (True, False, False)
    assert isinstance(desk.next(WAIT_S), Came)
    assert desk.has_news(0)
    assert isinstance(desk.next(WAIT_S), Came)
    assert not desk.has_news(0)


def arrived(worker: Worker, desk: ServerDesk) -> None:
    for _ in range(1000):
        if desk.has_news(0):
            return
        time.sleep(0.001)  # for the network


def test_a_large_frame_to_a_worker_that_does_not_listen_holds_up_nobody(desk: ServerDesk) -> None:
    desk.expect(0, 1)
    desk.expect(1, 1)
    slow = Worker(desk, 0)
    assert desk.next(WAIT_S) == Joined(worker=0, seat=1)
    large = np.random.default_rng(0).standard_normal(2_000_000)
    desk.send(0, 1, Frame(kind="large", arrays={"it": large}))
    quick = Worker(desk, 1)
    assert desk.next(WAIT_S) == Joined(worker=1, seat=2)
    desk.send(1, 2, Frame(kind="small"))
    assert quick.hear().kind == "small"
    heard: list[Frame] = []
    while not heard:  # the desk sends on as the worker takes more
        assert desk.next(0.001) is None
        frame = slow.reader.read()
        heard += [] if frame is None else [frame]
    assert heard[0].arrays["it"].tobytes() == large.tobytes()


@pytest.mark.parametrize(("worker", "request_number"), [(3, 1), (0, 2), (0, 0), (99, 1)])
def test_who_is_not_expected_is_turned_away(desk: ServerDesk, worker: int, request_number: int) -> None:
    desk.expect(0, 1)
    assert desk.seats == {}
    stranger = Worker(desk, worker, request_number)
    assert desk.next(0.2) is None
    assert stranger.is_cut_off()
    assert desk.seats == {}


def test_another_task_of_the_same_request_takes_the_place_of_the_first(desk: ServerDesk) -> None:
    desk.expect(0, 7)
    first = Worker(desk, 0, 7)
    assert desk.next(WAIT_S) == Joined(worker=0, seat=1)
    second = Worker(desk, 0, 7)
    assert desk.next(WAIT_S) == Left(worker=0, seat=1, request=7, why="another task has taken its place")
    assert desk.next(WAIT_S) == Joined(worker=0, seat=2)
    assert first.is_cut_off()
    desk.send(0, 1, Frame(kind="for the first"))  # what was meant for the first does not reach the second
    desk.drop(0, 1, "it is not there")
    desk.send(0, 2, Frame(kind="for the second"))
    assert second.hear().kind == "for the second"
    second.say(Frame(kind="here"))
    assert isinstance(desk.next(WAIT_S), Came)


def test_who_sends_what_is_no_frame_is_cut_off_and_the_others_go_on(desk: ServerDesk) -> None:
    for number in (0, 1):
        desk.expect(number, 1)
    bad, good = Worker(desk, 0), Worker(desk, 1)
    joined = [desk.next(WAIT_S), desk.next(WAIT_S)]
    assert {event.worker for event in joined if isinstance(event, Joined)} == {0, 1}
    bad.connection.sock.send(b"\0" * 64)
    left = desk.next(WAIT_S)
    assert isinstance(left, Left)
    assert left.worker == 0
    assert "sent a frame of run" in left.why
    assert bad.is_cut_off()
    good.say(Frame(kind="here"))
    assert isinstance(desk.next(WAIT_S), Came)


def test_who_sends_without_end_is_cut_off(desk: ServerDesk) -> None:
    desk.expect(0, 1)
    worker = Worker(desk, 0)
    assert desk.next(WAIT_S) == Joined(worker=0, seat=1)
    worker.say(*(Frame(kind=str(n)) for n in range(17)))
    time.sleep(0.02)  # for the network: all of them are there when it looks
    kinds = []
    while isinstance(event := desk.next(WAIT_S), Came):
        kinds.append(event.frame.kind)
    assert kinds == [str(n) for n in range(16)]
    assert isinstance(event, Left)
    assert event.why == "worker 0 sends without end"


def test_who_has_proved_itself_too_late_comes_to_a_closed_door(desk: ServerDesk) -> None:
    desk.expect(0, 1)
    worker = Worker(desk, 0)
    assert desk.next(WAIT_S) == Joined(worker=0, seat=1)
    desk.close()
    desk._welcome(worker.connection)
    assert worker.connection.sock.fileno() == -1
    assert not desk._at_the_door


def test_strangers_are_counted(desk: ServerDesk) -> None:
    desk.expect(0, 1)
    with socket.create_connection(desk.address.address):
        pass
    worker = Worker(desk, 0)
    assert desk.next(WAIT_S) == Joined(worker=0, seat=1)
    worker.connection.close()
    while not (dropped := desk.take_dropped()):
        desk.next(0.01)
    assert dropped.total() == 1


def test_a_frame_to_who_has_gone_is_no_error(desk: ServerDesk) -> None:
    desk.expect(0, 1)
    worker = Worker(desk, 0)
    assert desk.next(WAIT_S) == Joined(worker=0, seat=1)
    worker.connection.close()
    vector = np.zeros(1_000_000)
    for _ in range(20):
        desk.send(0, 1, Frame(kind="turn", arrays={"v": vector}))
    left = desk.next(WAIT_S)
    assert isinstance(left, Left)
    desk.send(0, 1, Frame(kind="turn"))
    assert desk.next(0) is None
