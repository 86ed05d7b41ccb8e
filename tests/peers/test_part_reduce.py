"""Sums among workers have the bits of the one addition tree, whoever holds which shard."""

from __future__ import annotations

import functools
import threading
import time

import numpy as np
import pytest
import torch
from company_of_workers import ENDLESS_S, Company
from torch import nn

from sparksgd.arithmetic.addition_tree import Partials, add_partial
from sparksgd.arithmetic.changes import PARAMETERS, ChangedElements, Changes
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.errors import GradientChanged, PeerLost, PeerSilent
from sparksgd.peers import part_reduce as allreduce_module
from sparksgd.peers.part_reduce import AllReduce, buckets_of
from sparksgd.solvers.protocol import Message
from sparksgd.solvers.synchronous import GRADIENT


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.Linear(11, 3))


SIZE = sum(p.numel() for p in module().parameters())


def piece(shard: int, absent: frozenset[int]) -> Message | None:
    """Return some shard's sum, of values that show every other order of addition."""
    if shard in absent:
        return None
    source = np.random.default_rng(shard)
    scale = np.float32(10.0 ** (shard % 5))
    touched = np.array([False, shard in (1, 5), shard == 2, True, True, False])  # each by some, or by nobody
    return Message(
        touched=touched,
        vectors={"gradient": source.standard_normal(SIZE, np.float32) * scale},
        statistics=source.standard_normal(22, np.float32),
        counters=np.array([shard], np.int64),
        loss=source.standard_normal() * float(scale),
        rows=shard + 1,
        weight=source.random() * float(scale),
    )


def owned(num_workers: int, num_shards: int) -> list[range]:
    return [balanced_range(worker, num_workers, num_shards) for worker in range(num_workers)]


def added(shards: range, num_shards: int, absent: frozenset[int]) -> Partials:
    partials: Partials = {}
    for shard in shards:
        add_partial(partials, (shard, shard + 1), piece(shard, absent), num_shards)
    return partials


@pytest.mark.parametrize("absent", [frozenset(), frozenset({0, 1}), frozenset({2, 3, 4, 5, 6, 7})], ids=str)
@pytest.mark.parametrize(("num_workers", "num_shards"), [(1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (3, 3)])
def test_every_worker_ends_with_the_bits_of_the_whole_tree(num_workers, num_shards, absent):
    absent = absent & frozenset(range(1, num_shards))
    whole = added(range(num_shards), num_shards, absent)[(0, num_shards)]
    company = Company(num_workers)
    company.meet()

    def one(worker, mesh):
        allreduce = AllReduce(mesh, owned(num_workers, num_shards), FlatModule(module()))
        sums = []
        for step in range(2):  # the second one in used buffers
            partials = added(balanced_range(worker, num_workers, num_shards), num_shards, absent)
            total = allreduce.part_reduce(step, partials, GRADIENT)
            vector = np.full(SIZE, np.nan, np.float32)
            strip = allreduce.strip
            vector[strip.start : strip.stop] = total.vectors["gradient"]
            allreduce.part_broadcast(step, vector)
            sums.append((vector, total))
        return sums

    for worker, sums in enumerate(company.all(one)):
        assert not isinstance(sums, Exception), (worker, sums)
        for vector, total in sums:
            assert vector.tobytes() == whole.vectors["gradient"].tobytes()
            assert total.statistics.tobytes() == whole.statistics.tobytes()
            assert (total.rows, total.shards, total.loss) == (whole.rows, whole.shards, whole.loss)
            assert total.weight == whole.weight
            assert total.counters.tolist() == [max(set(range(num_shards)) - absent)]
            there = set(range(num_shards)) - absent
            by_some = [bool(there & {1, 5}), 2 in there]
            assert total.touched.tolist() == whole.touched.tolist() == [False, *by_some, True, True, False]
    company.close()


@pytest.mark.parametrize(
    ("num_workers", "num_shards", "partials_sent"),
    [(2, 2, 1), (4, 4, 1), (2, 8, 1), (4, 8, 1), (3, 8, 5 / 3)],
)
def test_a_worker_sends_two_vectors_less_its_own_share_where_shards_divide(
    num_workers, num_shards, partials_sent
):
    company = Company(num_workers)
    company.meet()

    def one(worker, mesh):
        layers = nn.Sequential(nn.Linear(0, 1, bias=False), nn.Linear(60, 1, bias=False))  # one has nothing
        allreduce = AllReduce(mesh, owned(num_workers, num_shards), FlatModule(layers))
        torch.manual_seed(0)
        make = functools.partial(
            Message, statistics=np.empty(0, np.float32), counters=np.empty(0, np.int64), loss=1.0, rows=1
        )
        partials: Partials = {}
        for shard in balanced_range(worker, num_workers, num_shards):
            add_partial(
                partials, (shard, shard + 1), make(vectors={"gradient": np.ones(60, np.float32)}), num_shards
            )
        allreduce.part_reduce(0, partials, GRADIENT)
        allreduce.part_broadcast(0, np.ones(60, np.float32))
        records = len(partials) * 42 * (num_workers - 1)  # rows, shards, loss, weight, changes, 2 parameters
        return mesh.sent_bytes - records

    sent = company.all(one)
    vector = 60 * 4
    share = (num_workers - 1) / num_workers
    assert sum(sent) / num_workers == pytest.approx((partials_sent + 1) * share * vector)
    company.close()


def take_parts(allreduce: AllReduce, step: int, gradient: np.ndarray, order: list[int]) -> None:
    for parameter in order:
        allreduce.take_part(step, gradient, parameter)


@pytest.mark.parametrize("absent", [frozenset(), frozenset({1})], ids=str)
@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_a_sum_that_begins_with_the_last_layers_has_the_same_bits(monkeypatch, num_workers, absent):
    monkeypatch.setattr(allreduce_module, "_BUCKET_BYTES", 30 * 4)
    whole = added(range(num_workers), num_workers, absent)[(0, num_workers)]
    company = Company(num_workers)
    company.meet()
    orders = [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [2, 5, 3], []]  # as backward has it, and any other

    def one(worker, mesh):
        owned_by = owned(num_workers, num_workers)
        with AllReduce(mesh, owned_by, FlatModule(module()), overlaps=True) as allreduce:
            assert allreduce.overlaps
            sums = []
            for step, order in enumerate(orders):
                partials = added(owned_by[worker], num_workers, absent)
                own = partials[(worker, worker + 1)]
                if own is not None:
                    take_parts(allreduce, step, own.vectors["gradient"], order)
                total = allreduce.part_reduce(step, partials, GRADIENT)
                vector = np.full(SIZE, np.nan, np.float32)
                vector[allreduce.strip.start : allreduce.strip.stop] = total.vectors["gradient"]
                allreduce.part_broadcast(step, vector)
                sums.append((vector, total))
            return sums

    for worker, sums in enumerate(company.all(one)):
        assert not isinstance(sums, Exception), (worker, sums)
        assert len(sums) == len(orders)
        for vector, total in sums:
            assert vector.tobytes() == whole.vectors["gradient"].tobytes()
            assert total.statistics.tobytes() == whole.statistics.tobytes()
            assert (total.rows, total.loss) == (whole.rows, whole.loss)
    company.close()


def test_a_bucket_waits_for_every_parameter_though_another_comes_twice(monkeypatch):
    monkeypatch.setattr(allreduce_module, "_BUCKET_BYTES", 30 * 4)
    whole = added(range(2), 2, frozenset())[(0, 2)]
    company = Company(2)
    company.meet()

    def one(worker, mesh):
        with AllReduce(mesh, owned(2, 2), FlatModule(module()), overlaps=True) as allreduce:
            partials = added(range(worker, worker + 1), 2, frozenset())
            gradient = partials[(worker, worker + 1)].vectors["gradient"]
            late, gradient[-36:-3] = gradient[-36:-3].copy(), np.nan  # of parameter 4, the last but one
            take_parts(allreduce, 0, gradient, [5, 5])
            time.sleep(0.1)  # if the bucket did not wait, it would be gone by now
            gradient[-36:-3] = late
            return allreduce.strip, allreduce.part_reduce(0, partials, GRADIENT).vectors["gradient"]

    for strip, gradient in company.all(one):
        assert gradient.tobytes() == whole.vectors["gradient"][strip.start : strip.stop].tobytes()
    company.close()


def test_a_part_that_changed_after_it_had_gone_is_refused(monkeypatch):
    monkeypatch.setattr(allreduce_module, "_BUCKET_BYTES", 30 * 4)
    company = Company(2)
    company.meet()

    def one(worker, mesh):
        with AllReduce(mesh, owned(2, 2), FlatModule(module()), overlaps=True) as allreduce:
            partials = added(range(worker, worker + 1), 2, frozenset())
            gradient = partials[(worker, worker + 1)].vectors["gradient"]
            take_parts(allreduce, 0, gradient, [5, 4, 3, 2, *([4] if worker else [])])
            try:
                allreduce.part_reduce(0, partials, GRADIENT)
            except (GradientChanged, PeerLost) as error:
                mesh.leave()
                return error

    other, refused = company.all(one)
    assert isinstance(refused, GradientChanged)
    assert isinstance(other, PeerLost)
    company.close()


@pytest.mark.parametrize("error", [PeerSilent, MemoryError])
def test_who_gives_up_while_buckets_are_under_way_is_gone_at_once(monkeypatch, error):
    monkeypatch.setattr(allreduce_module, "_BUCKET_BYTES", 30 * 4)
    company = Company(2, timeout_s=0.5 if error is PeerSilent else ENDLESS_S)
    company.meet()
    left = threading.Event()

    def fail(mesh):
        with AllReduce(mesh, owned(2, 2), FlatModule(module()), overlaps=True) as allreduce:
            partials = added(range(1), 2, frozenset())
            take_parts(allreduce, 0, partials[(0, 1)].vectors["gradient"], [5, 4, 3, 2, 1, 0])
            time.sleep(0.1)  # buckets are on their way
            if error is MemoryError:
                raise error
            allreduce.part_reduce(0, partials, GRADIENT)

    def one(worker, mesh):
        if worker:
            return left.wait(200)  # it hangs until the other one has closed
        with pytest.raises(error):
            fail(mesh)
        mesh.close()
        left.set()
        return None

    assert company.all(one) == [None, True]
    company.close()
    deadline = time.monotonic() + 120
    while any(thread.name.startswith("sparksgd-reduce") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_buckets_end_between_parameters_and_hold_all_of_the_vector():
    for sizes in ([7], [1, 1, 1], [100, 3], [3, 100], [0, 0, 60, 0, 70, 0], [20, 30, 50, 10, 90, 5]):
        for least in (1, 10, 60, 1000):
            buckets = buckets_of(sizes, least)
            assert [x for bucket in reversed(buckets) for x in bucket] == list(range(sum(sizes)))
            assert all(len(bucket) >= least for bucket in buckets[:-1])
            assert all(buckets)
            assert {bucket.start for bucket in buckets} <= {sum(sizes[:n]) for n in range(len(sizes))}


class Changing(nn.Module):
    """Has all that forward may change, for the order of names."""

    def __init__(self):
        super().__init__()
        self.layers, self.frozen = module(), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("t", torch.zeros((), dtype=torch.int16))
        self.register_buffer("wide", torch.zeros(40, dtype=torch.complex128))


def changed(shard, values):
    """Return what a shard's forward changed: two elements of the vector, and a constant of each kind."""
    words = functools.partial(np.array, dtype=np.int32)
    return Changes(
        parts={
            PARAMETERS: ChangedElements(positions=np.array([2 + shard, 40]), values=words([100 + shard, 7])),
            "frozen.weight": ChangedElements(positions=None, values=np.full(9, values, np.int32)),
            "t": ChangedElements(positions=None, values=np.array([5], np.int16)),
            "wide": ChangedElements(positions=np.array([79]), values=np.array([-1])),
        }
    )


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_every_worker_gets_the_changes_of_all(num_workers):
    shards, company = 4, Company(num_workers)
    company.meet()

    def one(worker, mesh):
        allreduce = AllReduce(mesh, owned(num_workers, shards), FlatModule(Changing()))
        found = []
        for values in (None, [3] * shards, range(shards), None):
            partials: Partials = {}
            for shard in balanced_range(worker, num_workers, shards):
                message = piece(shard, frozenset())
                if values is not None and shard != 1:
                    message.changes = changed(shard, values[shard])
                add_partial(partials, (shard, shard + 1), message, shards)
            found.append(allreduce.part_reduce(len(found), partials, GRADIENT).changes)
        return found

    for nothing, united, conflicting, again in company.all(one):
        assert (nothing, again) == (None, None)
        assert united.parts.keys() == {PARAMETERS, "frozen.weight", "t", "wide"}
        assert not united.conflicts
        assert united.parameters.positions.tolist() == [2, 4, 5, 40]
        assert united.parameters.values.tolist() == [100, 102, 103, 7]
        assert united.parts["frozen.weight"].values.tolist() == [3] * 9
        assert united.parts["wide"].values.tolist() == [-1]
        values = conflicting.conflicts["frozen.weight"].values.tolist()
        assert values[0] != values[1]
        assert set(values) < {0, 2, 3}  # which two of them depends on who met first
        assert list(conflicting.conflicts) == ["frozen.weight"]
    company.close()
