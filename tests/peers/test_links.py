"""Every pair of a mesh is measured once, both ways, and nobody measures two at the same moment."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from sparksgd.errors import PeerLost, PeerSilent
from sparksgd.peers.credentials import Credentials
from sparksgd.peers.links import Link, measured_links, partner
from sparksgd.peers.mesh import Rendezvous

HOST = "127.0.0.1"


@pytest.mark.parametrize("players", range(2, 12))
def test_in_a_tournament_each_meets_each_once_and_one_at_a_time(players):
    met = Counter()
    for number in range(players - 1 + players % 2):
        partners = [partner(rank, number, players) for rank in range(players)]
        for rank, other in enumerate(partners):
            if other is not None:
                assert partners[other] == rank != other
                met[frozenset((rank, other))] += 1
    assert met == {frozenset((a, b)): 2 for a in range(players) for b in range(a)}


def measure(company: int, come: int, *, encrypt: bool = False, timeout_s: float = 60) -> list[object]:
    """Let some of a company measure; return what each returned or raised."""
    rendezvous = Rendezvous(
        run=b"a run...", num_workers=company, credentials=Credentials.new(encrypt=encrypt), host=HOST,
        listen_on=HOST, ports=None, timeout_s=timeout_s,
    )  # fmt: skip
    rendezvous.start()
    meeting, results = rendezvous.call(), list[object]([None] * come)

    def one(worker: int) -> None:
        try:
            results[worker] = measured_links(meeting, worker)
        except PeerLost as error:
            results[worker] = error

    threads = [threading.Thread(target=one, args=[worker]) for worker in range(come)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rendezvous.close()
    return results


@pytest.mark.parametrize(("company", "encrypt"), [(2, False), (3, True), (4, False)])
def test_every_direction_of_every_pair_is_measured(company, encrypt):
    results = measure(company, company, encrypt=encrypt)
    links = [link for found in results for link in found]
    assert all(isinstance(link, Link) for link in links)
    ways = Counter((link.sender, link.receiver) for link in links)
    assert ways == {(a, b): 1 for a in range(company) for b in range(company) if a != b}
    assert all(0 < link.round_trip_s < 60 and link.bytes_per_s > 1 for link in links)


def test_who_does_not_come_is_an_error_of_those_who_wait():
    results = measure(3, 2, timeout_s=0.5)
    assert [type(result) for result in results] == [PeerSilent, PeerSilent]
