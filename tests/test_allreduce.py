"""Sums among workers have the bits of the one addition tree, whoever holds which shard."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from test_mesh import Company
from torch import nn

from sparksgd.allreduce import AllReduce
from sparksgd.flat import FlatModule
from sparksgd.ranges import balanced_range
from sparksgd.solvers.protocol import GradientSum
from sparksgd.treesum import Partials, add_partial


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.Linear(11, 3))


SIZE = sum(p.numel() for p in module().parameters())


def piece(shard: int, absent: frozenset[int]) -> GradientSum | None:
    """Return some shard's sum, of values that show every other order of addition."""
    if shard in absent:
        return None
    source = np.random.default_rng(shard)
    scale = np.float32(10.0 ** (shard % 5))
    return GradientSum(
        gradient=source.standard_normal(SIZE, np.float32) * scale,
        statistics=source.standard_normal(22, np.float32),
        counters=np.array([shard], np.int64),
        loss=source.standard_normal() * float(scale),
        rows=shard + 1,
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
            total = allreduce.part_reduce(step, partials)
            vector = np.full(SIZE, np.nan, np.float32)
            strip = allreduce.strip
            vector[strip.start : strip.stop] = total.gradient
            allreduce.part_broadcast(step, vector)
            sums.append((vector, total))
        return sums

    for worker, sums in enumerate(company.all(one)):
        assert not isinstance(sums, Exception), (worker, sums)
        for vector, total in sums:
            assert vector.tobytes() == whole.gradient.tobytes()
            assert total.statistics.tobytes() == whole.statistics.tobytes()
            assert (total.rows, total.shards, total.loss) == (whole.rows, whole.shards, whole.loss)
            assert total.counters.tolist() == [max(set(range(num_shards)) - absent)]
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
        allreduce = AllReduce(mesh, owned(num_workers, num_shards), FlatModule(nn.Linear(60, 1, bias=False)))
        torch.manual_seed(0)
        make = functools.partial(
            GradientSum, statistics=np.empty(0, np.float32), counters=np.empty(0, np.int64), loss=1.0, rows=1
        )
        partials: Partials = {}
        for shard in balanced_range(worker, num_workers, num_shards):
            add_partial(partials, (shard, shard + 1), make(gradient=np.ones(60, np.float32)), num_shards)
        allreduce.part_reduce(0, partials)
        allreduce.part_broadcast(0, np.ones(60, np.float32))
        records = len(partials) * 24 * (num_workers - 1)  # rows, shards and loss of each partial sum
        return mesh.sent_bytes - records

    sent = company.all(one)
    vector = 60 * 4
    share = (num_workers - 1) / num_workers
    assert sum(sent) / num_workers == pytest.approx((partials_sent + 1) * share * vector)
    company.close()
