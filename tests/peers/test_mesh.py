"""Workers who meet at the driver, keep their connections, and lose them together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from company_of_workers import ENDLESS_S, Company

from sparksgd.errors import PeerLost, PeerSilent
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.mesh import Meeting, Mesh
from sparksgd.peers.wire import connect


@pytest.fixture
def company() -> Iterator[Callable[..., Company]]:
    made: list[Company] = []

    def make(count: int, **options) -> Company:
        made.append(Company(count, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def threads_of_ours() -> int:
    return sum(thread.name.startswith("sparksgd-") for thread in threading.enumerate())


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_hear_all(company, count, encrypt):
    workers = company(count, encrypt=encrypt)
    assert workers.meet() == [False] * count
    assert workers.talk(0) == [[other for other in range(count) if other != one] for one in range(count)]


def test_connections_are_kept_from_meeting_to_meeting(company):
    workers = company(3)
    workers.meet()
    before = [dict(mesh._peers) for mesh in workers.meshes]
    for step in range(5):
        assert workers.meet() == [True] * 3
        assert workers.talk(step) == [[1, 2], [0, 2], [0, 1]]
    assert [mesh._peers for mesh in workers.meshes] == before


def test_processes_that_change_places_keep_their_connections_and_ranks(company):
    workers = company(3)
    workers.meet()
    workers.meshes.reverse()
    assert workers.meet() == [True] * 3
    assert [mesh.rank for mesh in workers.meshes] == [2, 1, 0]
    assert all(mesh.workers == [2, 1, 0] for mesh in workers.meshes)
    assert workers.talk(0) == [[1, 2], [0, 2], [0, 1]]


def test_one_process_that_is_new_makes_all_connect_anew(company):
    workers = company(3)
    workers.meet()
    workers.meshes[1].close()
    workers.meshes[1] = Mesh()
    assert workers.meet() == [False] * 3
    assert workers.talk(0) == [[1, 2], [0, 2], [0, 1]]


def test_a_worker_that_ends_is_told_to_all_others_at_once(company):
    workers = company(3, timeout_s=ENDLESS_S)
    workers.meet()

    def one(worker: int, mesh: Mesh) -> None:
        if worker == 1:
            mesh.close()
            return
        nothing = {rank: [] for rank in range(3)}
        mesh.exchange(mesh.number, 0, 1, nothing, {rank: [memoryview(bytearray(1))] for rank in range(3)})

    first, _, third = workers.all(one)
    assert isinstance(first, PeerLost)
    assert isinstance(third, PeerLost)


def test_a_worker_that_never_comes_is_told_in_time(company):
    workers = company(2, timeout_s=0.5)
    meeting = workers.rendezvous.call()
    with pytest.raises(PeerSilent, match=r"not all 2 workers came within 0\.5 s"):
        workers.meshes[0].meet(meeting, 0)


def test_who_is_late_for_a_meeting_is_turned_away_and_no_stranger(company):
    workers = company(2)
    old = workers.rendezvous.call()
    workers.rendezvous.call()
    with pytest.raises(PeerLost):
        workers.meshes[0].meet(old, 0)
    assert not workers.rendezvous.take_dropped()


def test_when_the_driver_ends_every_worker_closes_all_it_has(company):
    before = threads_of_ours()
    workers = company(3)
    workers.meet()
    assert all(mesh._peers for mesh in workers.meshes)
    workers.rendezvous.close()
    deadline = time.monotonic() + 120
    while any(mesh._peers or mesh._listener for mesh in workers.meshes) or threads_of_ours() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # their threads see it


def test_two_runs_on_the_same_hosts_do_not_meet(company):
    one, other = company(2), company(2)
    meeting, foreign = one.rendezvous.call(), other.rendezvous.call()
    with pytest.raises(PeerLost, match="cannot reach the driver"):
        Mesh().meet(
            Meeting(**{**vars(meeting), "address": foreign.address, "timeout_s": 0.5}),
            0,
        )
    assert other.rendezvous.take_dropped()["wrong secret"] >= 1
    one.meet()
    other.meet()
    assert one.talk(0) == other.talk(0) == [[1], [0]]


def test_a_stranger_at_a_workers_door_is_counted_there(company):
    workers = company(2)
    workers.meet()
    stranger = Credentials.new(encrypt=False)
    with pytest.raises(PeerLost):
        connect(stranger, workers.meshes[0]._listener.address, b"", "worker 0", 0.3)
    assert workers.meshes[0].take_dropped()["wrong secret"] >= 1
    assert workers.talk(0) == [[1], [0]]


def test_who_leaves_waits_until_all_others_have_seen_it_and_names_who_has_not(company):
    workers = company(3, timeout_s=0.5)
    workers.meet()
    assert workers.all(lambda worker, mesh: mesh.leave()) == [[], [], []]
    workers.meet()

    def one(worker: int, mesh: Mesh) -> list[int] | None:
        return None if worker == 1 else mesh.leave()  # worker 1 hangs

    assert workers.all(one) == [[1], None, [1]]


def test_workers_and_the_driver_listen_on_one_address_alone(company):
    workers = company(2)
    workers.meet()
    listeners = [workers.rendezvous._listener, *(mesh._listener for mesh in workers.meshes)]
    for host, port in (listener.address for listener in listeners):
        socket.create_connection((host, port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))  # of this host, too


def be_worker_1_and_die_in_an_exchange(meeting: Meeting) -> None:
    mesh = Mesh()
    mesh.meet(meeting, 1)
    (to_worker_0,) = mesh._peers.values()
    to_worker_0.sock.setblocking(True)
    assert to_worker_0.sock.recv(1 << 16)  # all of it: worker 0 is in its exchange, and gets no reset
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "tls"])
def test_a_process_that_is_killed_is_missed_at_once(company, encrypt):
    workers = company(2, encrypt=encrypt, timeout_s=ENDLESS_S)
    meeting, mesh = workers.rendezvous.call(), workers.meshes[0]
    spawn = multiprocessing.get_context("spawn")
    other = spawn.Process(target=be_worker_1_and_die_in_an_exchange, args=[meeting])
    other.start()
    mesh.meet(meeting, 0)
    with pytest.raises(PeerLost, match="worker 1"):
        mesh.exchange(mesh.number, 0, 1, {1: [memoryview(b"1")]}, {1: [memoryview(bytearray(1))]})
    other.join()


def test_a_mesh_that_closed_with_the_driver_exchanges_nothing(company):
    workers = company(2)
    workers.meet()
    number = workers.meshes[0].number
    workers.rendezvous.close()
    deadline = time.monotonic() + 120
    while any(mesh._peers for mesh in workers.meshes):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # their threads see it
    with pytest.raises(PeerLost, match="the driver has ended"):
        workers.meshes[0].exchange(number, 0, 1, {1: []}, {1: []})


def test_many_meetings_leave_one_thread_for_each_lifeline():
    company = Company(3)
    for _ in range(60):
        company.meet()
    deadline = time.monotonic() + 120
    while (count := lifelines()) > 3 and time.monotonic() < deadline:
        time.sleep(0.01)  # the last one ends by itself
    assert count == 3
    company.close()


def lifelines() -> int:
    return sum(thread.name == "sparksgd-lifeline" for thread in threading.enumerate())
