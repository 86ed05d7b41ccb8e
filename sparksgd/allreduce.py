"""Part-reduce and part-broadcast: workers sum their gradients among themselves, in the tree's order.

    part-reduce     every worker receives its strip of all others' partial sums, and adds them up
    part-broadcast  every worker sends its strip of a vector to all others

Together they are an all-reduce whose order of addition is that of the addition tree, whoever holds
which shard.  Das et al. 2016, "Distributed Deep Learning Using Synchronous Stochastic Gradient
Descent" (arXiv:1602.06709), section 3.4.

Legend: W workers, S shards, P parameters, Q running statistics, C counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparksgd.flat import FlatModule
from sparksgd.mesh import Mesh
from sparksgd.ranges import balanced_range
from sparksgd.solvers.protocol import GradientSum
from sparksgd.treesum import Partials, add_partial, nodes_of

__all__ = ["AllReduce"]

_REDUCE, _BROADCAST = 1, 2


class AllReduce:
    """One process's part, for one segment: strips go by rank, shards by worker.

    Args:
        mesh: of a meeting.
        owned: the shards of each worker; all together, the leaves of the addition tree.
        flat: a module of the run's shapes.
    """

    def __init__(self, mesh: Mesh, owned: Sequence[Sequence[int]], flat: FlatModule) -> None:
        vector, processes = flat.parameters.numpy(), len(mesh.workers)
        self._mesh = mesh
        self._rank = mesh.rank
        self._leaves = sum(map(len, owned))
        self._peers = [peer for peer in range(processes) if peer != mesh.rank]
        self._strips = [balanced_range(rank, processes, len(vector)) for rank in range(processes)]
        self.strip = self._strips[mesh.rank]
        self._nodes = [nodes_of(owned[worker], self._leaves) for worker in mesh.workers]
        strip, tail = len(self.strip), _tail_type(flat)
        self._gradients = [[np.empty(strip, vector.dtype) for _ in nodes] for nodes in self._nodes]
        self._tails = [np.zeros(len(nodes), tail) for nodes in self._nodes]
        self._receives = {
            peer: [*map(_bytes, self._gradients[peer]), _bytes(self._tails[peer])] for peer in self._peers
        }
        self._absent = np.empty_like(vector)

    def part_reduce(self, step: int, partials: Partials) -> GradientSum:
        """Return the sum over all shards: this process's strip of the gradient, and all of the rest.

        Args:
            step: which step, from 0.
            partials: its worker's sums by node; changed in place.

        Raises:
            PeerLost: another process has ended or is silent.
        """
        own = self._tails[self._rank]
        mine: list[npt.NDArray[np.floating]] = []
        for tail, node in zip(own, self._nodes[self._rank], strict=True):  # a tail is a view of its record
            partial = partials[node]
            assert partial is None or isinstance(partial, GradientSum)
            _fill(tail, partial)
            mine.append(self._absent if partial is None else partial.gradient)
        sends = {
            peer: [*(_bytes(gradient[_slice(self._strips[peer])]) for gradient in mine), _bytes(own)]
            for peer in self._peers
        }
        self._mesh.exchange(step, _REDUCE, sends, self._receives)
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
            step,
            _BROADCAST,
            {peer: [own] for peer in self._peers},
            {peer: [_bytes(vector[_slice(self._strips[peer])])] for peer in self._peers},
        )


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
