"""Gathering of gossip: events in, instructions out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.engines.gathering.gossip import GossipGathering
from sparksgd.engines.gathering.shards import Back, Deliver, Lost, Pushed, Start
from sparksgd.engines.trace import TraceEvent


class Graph:
    """Who sends to whom, by a function of the turn and the shard."""

    def __init__(self, peers: Callable[[int, int], Sequence[int]]) -> None:
        self.peers = peers


def ring(shards: int) -> Graph:
    """Everyone sends to the next one."""
    return Graph(lambda turn, shard: [(shard + 1) % shards])


def gathering(shards: int, graph: Graph, turns: int) -> GossipGathering:
    machine = GossipGathering({shard: shard for shard in range(shards)}, graph, turns)
    assert machine.begin() == [start(shard, 0) for shard in range(shards)]
    return machine


def start(shard: int, turn: int) -> Start:
    return Start(shard=shard, turn=turn, version=turn)


def told(sender: int, turn: int, to: int) -> Deliver:
    return Deliver(shard=sender, version=turn, to=to)


def pushed(shard: int) -> Pushed:
    return Pushed(shard=shard)


def traced(events: Iterable[TraceEvent]) -> list[tuple[str, int | None, int]]:
    return [(event.kind, event.shard, event.turn) for event in events]


def test_a_shard_goes_on_when_it_has_sent_and_its_sender_has() -> None:
    machine = gathering(3, ring(3), 5)
    assert machine.handle(pushed(0)) == [told(0, 0, to=1)]  # waits for 2
    assert machine.handle(pushed(1)) == [told(1, 0, to=2), start(1, 1)]  # 0 had sent to it
    assert machine.handle(pushed(1)) == [told(1, 1, to=2)]  # a turn ahead; waits for 0
    assert machine.handle(pushed(2)) == [told(2, 0, to=0), start(2, 1), start(0, 1)]
    assert traced(machine.trace.take()) == [
        ("start", 0, 0),
        ("start", 1, 0),
        ("start", 2, 0),
        ("push", 0, 0),
        ("hold", 0, 1),
        ("push", 1, 0),
        ("start", 1, 1),
        ("push", 1, 1),
        ("hold", 1, 2),
        ("push", 2, 0),
        ("start", 2, 1),
        ("start", 0, 1),
    ]


def test_all_senders_are_waited_for() -> None:
    machine = gathering(4, Graph(lambda turn, shard: [0] if shard else [1]), 3)
    assert machine.handle(pushed(0)) == [told(0, 0, to=1)]
    assert machine.handle(pushed(1)) == [told(1, 0, to=0), start(1, 1)]
    assert machine.handle(pushed(3)) == [told(3, 0, to=0), start(3, 1)]  # nobody sends to 3
    assert machine.handle(pushed(2)) == [told(2, 0, to=0), start(2, 1), start(0, 1)]


def test_a_message_to_several_is_delivered_to_each() -> None:
    machine = gathering(3, Graph(lambda turn, shard: [other for other in range(3) if other != shard]), 2)
    assert machine.handle(pushed(1)) == [told(1, 0, to=0), told(1, 0, to=2)]
    assert machine.handle(pushed(2)) == [told(2, 0, to=0), told(2, 0, to=1)]
    assert machine.handle(pushed(0)) == [
        told(0, 0, to=1), told(0, 0, to=2), start(0, 1), start(1, 1), start(2, 1),
    ]  # fmt: skip


def test_a_shard_that_sends_to_itself_waits_for_nobody_else() -> None:
    machine = gathering(2, Graph(lambda turn, shard: [shard]), 3)
    assert machine.handle(pushed(1)) == [told(1, 0, to=1), start(1, 1)]
    assert machine.handle(pushed(1)) == [told(1, 1, to=1), start(1, 2)]


def test_a_shard_without_peers_goes_on_by_itself() -> None:
    machine = gathering(2, Graph(lambda turn, shard: []), 3)
    assert machine.handle(pushed(0)) == [start(0, 1)]


def test_peers_are_those_of_the_turn() -> None:
    machine = gathering(4, Graph(lambda turn, shard: [(shard + 1 + turn) % 4]), 3)
    first = [machine.handle(pushed(shard)) for shard in range(4)]
    assert [one[0] for one in first] == [
        told(0, 0, to=1),
        told(1, 0, to=2),
        told(2, 0, to=3),
        told(3, 0, to=0),
    ]
    assert machine.handle(pushed(0)) == [told(0, 1, to=2)]
    assert machine.handle(pushed(1)) == [told(1, 1, to=3)]
    assert machine.handle(pushed(2)) == [told(2, 1, to=0), start(2, 2), start(0, 2)]
    assert machine.handle(pushed(3)) == [told(3, 1, to=1), start(3, 2), start(1, 2)]


def test_nothing_starts_after_the_last_turn_whose_messages_are_delivered() -> None:
    machine = gathering(2, ring(2), 1)
    assert machine.handle(pushed(0)) == [told(0, 0, to=1)]
    assert machine.handle(pushed(1)) == [told(1, 0, to=0)]
    assert [kind for kind, _, _ in traced(machine.trace.take())] == ["start", "start", "push", "push"]
    machine.handle(Lost(shard=0))
    assert machine.handle(Back(shard=0)) == []  # it has nothing more to do


# Lost, and back again


def test_who_is_lost_while_computing_makes_its_turn_again() -> None:
    machine = gathering(2, ring(2), 3)
    assert machine.handle(Lost(shard=0)) == []
    assert machine.handle(pushed(0)) == []  # what still came of it is nobody's
    assert machine.handle(pushed(1)) == [told(1, 0, to=0)]  # kept until it is back
    assert machine.handle(Back(shard=0)) == [start(0, 0)]
    assert machine.handle(pushed(0)) == [told(0, 0, to=1), start(0, 1), start(1, 1)]
    assert traced(machine.trace.take())[2:5] == [("lost", 0, 0), ("push", 1, 0), ("hold", 1, 1)]


def test_who_is_lost_while_waiting_waits_on() -> None:
    machine = gathering(2, ring(2), 3)
    machine.handle(pushed(0))
    machine.handle(Lost(shard=0))
    assert machine.handle(Back(shard=0)) == []
    assert machine.handle(pushed(0)) == []  # it was asked for nothing
    assert machine.handle(pushed(1)) == [told(1, 0, to=0), start(1, 1), start(0, 1)]


def test_what_a_lost_shard_waited_for_may_come_before_it_is_back() -> None:
    machine = gathering(2, ring(2), 3)
    machine.handle(pushed(0))
    machine.handle(Lost(shard=0))
    assert machine.handle(pushed(1)) == [told(1, 0, to=0), start(1, 1)]
    assert machine.handle(Back(shard=0)) == [start(0, 1)]


def test_a_lost_shard_holds_up_those_it_sends_to_and_no_other() -> None:
    machine = gathering(3, Graph(lambda turn, shard: [1 - shard] if shard < 2 else [2]), 9)
    machine.handle(Lost(shard=0))
    assert machine.handle(pushed(1)) == [told(1, 0, to=0)]
    assert machine.handle(pushed(2)) == [told(2, 0, to=2), start(2, 1)]
    assert machine.handle(pushed(2)) == [told(2, 1, to=2), start(2, 2)]


def test_what_is_known_already_changes_nothing() -> None:
    machine = gathering(2, ring(2), 3)
    assert machine.handle(Back(shard=0)) == []
    machine.handle(Lost(shard=0))
    assert machine.handle(Lost(shard=0)) == []
    assert machine.handle(Back(shard=0)) == [start(0, 0)]
    assert machine.handle(Back(shard=0)) == []
    assert [kind for kind, _, _ in traced(machine.trace.take())] == ["start", "start", "lost", "start"]


# Whatever happens


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), shards=st.integers(1, 5), turns=st.integers(1, 6))
def test_whoever_is_slow_or_lost_each_turn_has_all_that_was_sent_to_it(
    seed: int, shards: int, turns: int
) -> None:
    chance = random.Random(seed)
    drawn = [
        [chance.sample(range(shards), chance.randint(0, min(2, shards))) for _ in range(shards)]
        for _ in range(turns)
    ]
    graph = Graph(lambda turn, shard: drawn[turn][shard])
    machine = GossipGathering({shard: shard for shard in range(shards)}, graph, turns)
    running: dict[int, int] = {}
    lost: set[int] = set()
    mail: set[tuple[int, int, int]] = set()  # sender, turn, receiver
    made = dict.fromkeys(range(shards), 0)

    def do(instructions: Iterable[Start | Deliver]) -> None:
        for one in instructions:
            if isinstance(one, Deliver):
                assert one.to is not None
                assert (one.shard, one.version, one.to) not in mail
                mail.add((one.shard, one.version, one.to))
                continue
            assert one.shard not in running
            assert one.shard not in lost
            assert one.turn == made[one.shard]
            due = [s for s in range(shards) if one.turn and one.shard in graph.peers(one.turn - 1, s)]
            assert all((sender, one.turn - 1, one.shard) in mail for sender in due)
            running[one.shard] = one.turn

    do(machine.begin())
    while min(made.values()) < turns:
        assert running or lost, "nobody computes, and nobody ever will"
        choice = chance.random()
        if choice < 0.7 and running:
            shard = chance.choice(sorted(running))
            del running[shard]
            made[shard] += 1
            do(machine.handle(pushed(shard)))
        elif choice < 0.85 and len(lost) < shards:
            shard = chance.choice([shard for shard in range(shards) if shard not in lost])
            lost.add(shard)
            running.pop(shard, None)
            do(machine.handle(Lost(shard=shard)))
        elif lost:
            shard = chance.choice(sorted(lost))
            lost.discard(shard)
            do(machine.handle(Back(shard=shard)))
    assert mail == {(s, turn, to) for turn in range(turns) for s in range(shards) for to in drawn[turn][s]}
    pushes = [(event.shard, event.turn) for event in machine.trace.take() if event.kind == "push"]
    assert sorted(pushes) == [(shard, turn) for shard in range(shards) for turn in range(turns)]


def test_what_all_have_taken_is_forgotten() -> None:
    machine = gathering(2, ring(2), 1000)
    for _ in range(1000):
        machine.handle(pushed(0))
        machine.handle(pushed(1))
    assert len(machine._sent) <= 3
