"""Part-reduce and part-broadcast: workers sum their gradients among themselves, in the tree's order.

    part-reduce     every worker receives its strip of all others' partial sums, and adds them up
    part-broadcast  every worker sends its strip of a vector to all others

Together they are an all-reduce whose order of addition is that of the addition tree, whoever holds
which shard.  Das et al. 2016, "Distributed Deep Learning Using Synchronous Stochastic Gradient
Descent" (arXiv:1602.06709), section 3.4.

A part-reduce may begin while the gradient is still being computed.  A backward pass comes from the last
layer to the first, so the vector goes out in buckets from its end, each as soon as it is there; nothing is
added before all of it is.  Li et al. 2020, "PyTorch Distributed" (arXiv:2006.15704), section 3.2.3.

Legend: W workers, S shards, P parameters, Q running statistics, C counters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sparksgd.errors import GradientChanged
from sparksgd.flat import FlatModule
from sparksgd.mesh import Mesh
from sparksgd.ranges import balanced_range
from sparksgd.solvers.protocol import GradientSum
from sparksgd.treesum import Partials, add_partial, nodes_of

__all__ = ["AllReduce", "buckets_of"]

_BROADCAST, _REDUCE = 0, 1  # each bucket is a phase of its own, from there
_BUCKET_BYTES = 1 << 20


class AllReduce:
    """One process's part, for one segment: strips go by rank, shards by worker.

    Args:
        mesh: of a meeting.
        owned: the shards of each worker; all together, the leaves of the addition tree.
        flat: a module of the run's shapes.
        overlaps: whether gradients go out in buckets; each worker has one shard then.
    """

    def __init__(
        self, mesh: Mesh, owned: Sequence[Sequence[int]], flat: FlatModule, *, overlaps: bool = False
    ) -> None:
        vector, processes = flat.parameters.numpy(), len(mesh.workers)
        self._mesh = mesh
        self._meeting = mesh.number
        self._rank = mesh.rank
        self._leaves = sum(map(len, owned))
        self._peers = [peer for peer in range(processes) if peer != mesh.rank]
        self._strips = [balanced_range(rank, processes, len(vector)) for rank in range(processes)]
        self.strip = self._strips[mesh.rank]
        self._nodes = [nodes_of(owned[worker], self._leaves) for worker in mesh.workers]
        strip, tail = len(self.strip), _tail_type(flat)
        self._gradients = [[np.empty(strip, vector.dtype) for _ in nodes] for nodes in self._nodes]
        self._tails = [np.zeros(len(nodes), tail) for nodes in self._nodes]
        self._absent = np.empty_like(vector)
        sizes = [parameter.numel() for parameter in flat.trainable]
        self._buckets = buckets_of(sizes, _BUCKET_BYTES // vector.itemsize if overlaps else len(vector))
        self._bucket_of = [
            next(number for number, bucket in enumerate(self._buckets) if max(0, end - 1) in bucket)
            for end in itertools.accumulate(sizes)
        ]
        self._thread = ThreadPoolExecutor(1, "sparksgd-reduce") if len(self._buckets) > 1 else None
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:  # after an error, what it does ends when the mesh is left
            self._thread.shutdown(wait=kind is None, cancel_futures=True)

    @property
    def overlaps(self) -> bool:
        """Whether there are several buckets, so that `take_part` is of use."""
        return self._thread is not None

    def take_part(self, step: int, gradient: npt.NDArray[np.floating], parameter: int) -> None:
        """Begin a step's part-reduce with the buckets that this parameter's part makes whole.

        The last bucket waits for `part_reduce`, and so does what goes wrong.

        Args:
            step: which step, from 0.
            gradient: float[P], of this worker's one shard.
            parameter: the number of the parameter whose part of it is there, and does not change again.
        """
        assert self._thread is not None
        bucket = self._bucket_of[parameter]
        self._changed_late |= bucket < len(self._begun)
        self._missing[bucket].discard(parameter)
        while (first := len(self._begun)) < len(self._buckets) - 1 and not self._missing[first]:
            self._begun.append(self._thread.submit(self._exchange, step, first, [gradient]))

    def part_reduce(self, step: int, partials: Partials) -> GradientSum:
        """Return the sum over all shards: this process's strip of the gradient, and all of the rest.

        Args:
            step: which step, from 0.
            partials: its worker's sums by node; changed in place.

        Raises:
            PeerLost: another process has ended or is silent.
            GradientChanged: a part of the gradient changed after it had gone.
        """
        mine: list[npt.NDArray[np.floating]] = []
        nodes = self._nodes[self._rank]
        for tail, node in zip(self._tails[self._rank], nodes, strict=True):  # a tail is a view of its record
            partial = partials[node]
            assert partial is None or isinstance(partial, GradientSum)
            _fill(tail, partial)
            mine.append(self._absent if partial is None else partial.gradient)
        if self._changed_late:
            raise GradientChanged(
                "a parameter's gradient changed within one backward pass after it had gone to the other "
                "workers, as with torch.utils.checkpoint(use_reentrant=True): set engine.overlap=never"
            )
        for begun in self._begun:
            begun.result()
        for bucket in range(len(self._begun), len(self._buckets)):
            self._exchange(step, bucket, mine)
        self._begin()
        strip = _slice(self.strip)
        self._gradients[self._rank] = [gradient[strip] for gradient in mine]
        total: Partials = {}
        for nodes, gradients, tails in zip(self._nodes, self._gradients, self._tails, strict=True):
            for node, gradient, tail in zip(nodes, gradients, tails, strict=True):
                add_partial(total, node, _read(tail, gradient), self._leaves)
        whole = total[(0, self._leaves)]
        assert isinstance(whole, GradientSum), "a step without a row"
        return whole

    def part_broadcast(self, step: int, vector: npt.NDArray[np.floating]) -> None:
        """Send this process's strip of a vector to all others, and receive theirs into it.

        Args:
            step: which step, from 0.
            vector: float[P]; changed in place.

        Raises:
            PeerLost: another process has ended or is silent.
        """
        own = _bytes(vector[_slice(self.strip)])
        self._mesh.exchange(
            self._meeting,
            step,
            _BROADCAST,
            {peer: [own] for peer in self._peers},
            {peer: [_bytes(vector[_slice(self._strips[peer])])] for peer in self._peers},
        )

    def _begin(self) -> None:
        """Forget the last step's buckets."""
        self._missing: list[set[int]] = [set() for _ in self._buckets]
        for parameter, bucket in enumerate(self._bucket_of):
            self._missing[bucket].add(parameter)
        self._begun: list[Future[None]] = []
        self._changed_late = False

    def _exchange(self, step: int, bucket: int, mine: Sequence[npt.NDArray[np.floating]]) -> None:
        """Send each peer its strip's part of a bucket, and receive this strip's part of theirs.

        With the last bucket go the records of the sums.
        """
        part, sends, receives = self._buckets[bucket], {}, {}
        for peer in self._peers:
            theirs, here = (_common(part, strip) for strip in (self._strips[peer], self.strip))
            within = slice(here.start - self.strip.start, here.stop - self.strip.start)
            sends[peer] = [_bytes(gradient[_slice(theirs)]) for gradient in mine if theirs]
            receives[peer] = [_bytes(gradient[within]) for gradient in self._gradients[peer] if here]
            if bucket == len(self._buckets) - 1:
                sends[peer].append(_bytes(self._tails[self._rank]))
                receives[peer].append(_bytes(self._tails[peer]))
        self._mesh.exchange(self._meeting, step, _REDUCE + bucket, sends, receives)


def buckets_of(sizes: Sequence[int], least: int) -> list[range]:
    """Cut a vector between parameters into buckets, from its end, of at least so many elements but the last.

    >>> buckets_of([10, 50, 5, 60, 3], 60)
    [range(65, 128), range(0, 65)]
    """
    buckets, end = [], sum(sizes)
    start = end
    for size in reversed(sizes):
        start -= size
        if start < end and (end - start >= least or start == 0):
            buckets.append(range(start, end))
            end = start
    return buckets


def _common(one: range, other: range) -> range:
    """Return what is in both of two ranges."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


def _slice(strip: range) -> slice:
    return slice(strip.start, strip.stop)


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.view(np.uint8).data


def _tail_type(flat: FlatModule) -> np.dtype[Any]:
    """Return the record that a gradient sum is, without its gradient; absent where it has no rows."""
    statistics, counters = flat.statistics(), flat.counters()
    return np.dtype(
        [
            ("rows", "<i8"),
            ("shards", "<i8"),
            ("loss", "<f8"),
            ("counters", "<i8", counters.shape),
            ("statistics", statistics.dtype, statistics.shape),
        ]
    )


def _fill(tail: Any, partial: GradientSum | None) -> None:
    """Write a sum's record; that of an absent one has no rows."""
    tail["rows"] = 0 if partial is None else partial.rows
    if partial is not None:
        tail["shards"], tail["loss"] = partial.shards, partial.loss
        tail["counters"], tail["statistics"] = partial.counters, partial.statistics


def _read(tail: Any, gradient: npt.NDArray[np.floating]) -> GradientSum | None:
    """Return the sum that a record and a strip of its gradient are."""
    if not tail["rows"]:
        return None
    return GradientSum(
        gradient=gradient,
        statistics=tail["statistics"].copy(),
        counters=tail["counters"].copy(),
        loss=float(tail["loss"]),
        rows=int(tail["rows"]),
        shards=int(tail["shards"]),
    )
