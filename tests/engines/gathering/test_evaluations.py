"""Who evaluates which test shard: everybody is given work, late workers hold up nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparksgd.engines.gathering.evaluations import EvaluationGathering
from sparksgd.engines.replies import Evaluation


def sums(rows: int) -> Evaluation:
    return Evaluation(loss=1.0, correct=None, rows=rows)


def test_shards_are_given_one_by_one_and_those_of_a_late_worker_to_others_too() -> None:
    gathering = EvaluationGathering({0: "a", 1: "a", 2: "a"})
    assert gathering.give(0, "a") == 0
    assert gathering.give(1, "a") == 1
    gathering.answered(1, sums(1))
    assert gathering.give(1, "a") == 2
    gathering.answered(2, None)
    assert not gathering.is_complete
    assert gathering.give(1, "a") == 0  # worker 0 is late
    gathering.answered(0, sums(5))
    assert gathering.is_complete
    gathering.answered(0, sums(7))  # the late one
    assert gathering.found == {0: sums(5), 1: sums(1), 2: None}
    assert gathering.give(0, "a") is None


def test_a_worker_is_given_shards_of_its_host_alone() -> None:
    gathering = EvaluationGathering({0: "a", 1: "b"})
    assert gathering.give(0, "b") == 1
    assert gathering.give(0, "b") is None
    assert not gathering.can_go_on({"b"})
    assert gathering.can_go_on({"a", "b"})
    gathering.answered(0, sums(1))
    assert gathering.can_go_on({"b"})


@given(st.data())
def test_whoever_is_late_or_lost_all_shards_are_answered(data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, 6))
    gathering = EvaluationGathering(dict.fromkeys(range(shards), "a"))
    working: dict[int, int] = {}
    for _ in range(200):
        for worker in range(3):
            if worker not in working and (shard := gathering.give(worker, "a")) is not None:
                working[worker] = shard
        if gathering.is_complete:
            break
        assert working, "somebody has something to do"
        worker = data.draw(st.sampled_from(sorted(working)))
        shard = working.pop(worker)
        if data.draw(st.integers(0, 3)):
            gathering.answered(shard, sums(shard + 1))
        else:
            gathering.left(worker)
    else:
        return  # drawn to be lost again and again
    assert {shard: one and one.rows for shard, one in gathering.found.items()} == {
        shard: shard + 1 for shard in range(shards)
    }
