"""Part-reduce and part-broadcast: workers sum their messages among themselves, in the tree's order.

    part-reduce     every worker receives its strip of all others' partial sums, and adds them up
    part-broadcast  every worker sends its strip of a vector to all others

Together they are an all-reduce that adds in the order of the addition tree, whichever worker holds a shard.
Das et al. 2016, "Distributed Deep Learning Using Synchronous Stochastic Gradient Descent" (arXiv:1602.06709),
section 3.4.

A part-reduce may begin while the gradient is still being computed.  A backward pass goes from the last layer
to the first.  So the vector is sent in buckets from its end, each as soon as it is computed.  Nothing is
added before the whole vector is there.  Li et al. 2020, "PyTorch Distributed" (arXiv:2006.15704), section
3.2.3.

What forward changed in parameters and constants is rare: a record says how many bytes it has, and a second
exchange gathers it only where one is not 0.

Legend: W workers, S shards, P elements of K parameters, Q running statistics, C counters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sparksgd.arithmetic.addition_tree import Partials, add_partial, nodes_of
from sparksgd.arithmetic.changes import Changes, most_bytes, pack, unite, unpack
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.ranges import balanced_range
from sparksgd.errors import GradientChanged, TrainingError
from sparksgd.peers.mesh import Mesh
from sparksgd.solvers.protocol import Message, MessageShape, Vector

__all__ = ["AllReduce", "buckets_of"]

_BROADCAST, _REDUCE = 0, 1  # each bucket is a phase of its own; they begin here
_BUCKET_BYTES = 1 << 20


class AllReduce:
    """The part of one process, for one segment.  A rank has a strip, a worker has shards.

    A message has one or several vectors of P elements; all are cut into the same strips.

    Args:
        mesh: the processes of a meeting.
        owned: the shards of each worker; together they are the leaves of the addition tree.
        flat: a module of the run's shapes.
        overlaps: whether gradients are sent in buckets; each worker must have one shard.
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
        self._received: list[list[list[Vector]]] = [[] for _ in self._nodes]  # by rank, node and vector
        self._new_strip = partial(np.empty, len(self.strip), vector.dtype)
        self._flat = flat
        self._tails: list[npt.NDArray[Any]] = []
        self._absent = np.empty_like(vector)
        sizes = [parameter.numel() for parameter in flat.trainable]
        self._buckets = buckets_of(sizes, _BUCKET_BYTES // vector.itemsize if overlaps else len(vector))
        self._bucket_of = [
            next(number for number, bucket in enumerate(self._buckets) if max(0, end - 1) in bucket)
            for end in itertools.accumulate(sizes)
        ]
        self._cuts = [[self._cut(bucket, peer) for peer in self._peers] for bucket in self._buckets]
        self._awaited: dict[int, dict[int, list[memoryview]]] = {}  # by bucket and peer: where it is put
        self._thread = ThreadPoolExecutor(1, "sparksgd-reduce") if len(self._buckets) > 1 else None
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:  # after an error, its work ends when the mesh is left
            self._thread.shutdown(wait=kind is None, cancel_futures=True)

    @property
    def overlaps(self) -> bool:
        """Return whether there are several buckets, so that `take_part` is useful."""
        return self._thread is not None

    def take_part(self, step: int, gradient: npt.NDArray[np.floating], parameter: int) -> None:
        """Send the buckets that this parameter's part completes: the step's part-reduce begins.

        The last bucket is sent by `part_reduce`, which also raises what failed here.

        Args:
            step: which step, from 0.
            gradient: float[P], of this worker's one shard.
            parameter: the number of the parameter whose part is computed, and will not change again.
        """
        assert self._thread is not None
        bucket = self._bucket_of[parameter]
        self._changed_late |= bucket < len(self._begun)
        self._missing[bucket].discard(parameter)
        while (first := len(self._begun)) < len(self._buckets) - 1 and not self._missing[first]:
            self._make_room(1, 0)
            self._begun.append(self._thread.submit(self._exchange, step, first, [[gradient]]))

    def part_reduce(self, step: int, partials: Partials, shape: MessageShape) -> Message:
        """Return the sum over all shards: of the vectors this process's strip, of the rest everything.

        Args:
            step: which step, from 0.
            partials: this worker's sums by node; changed in place.
            shape: the names in the messages.

        Raises:
            PeerLost: another process has ended or is silent.
            GradientChanged: a part of the gradient changed after it was sent.
            TrainingError: no shard sent a message.
        """
        self._make_room(len(shape.vectors), len(shape.scalars))
        mine: list[list[Vector]] = []
        changed: Changes | None = None
        nodes = self._nodes[self._rank]
        for tail, node in zip(self._tails[self._rank], nodes, strict=True):  # a tail is a view of its record
            message = partials[node]
            assert message is None or isinstance(message, Message)
            _fill(tail, message, shape)
            changed = unite(changed, None if message is None else message.changes)
            mine.append(
                [self._absent if message is None else message.vectors[name] for name in shape.vectors]
            )
        packed = self._packed(changed)
        self._tails[self._rank]["changes"] = len(packed)
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
        changes = self._gathered(step, changed, packed)
        strip = _slice(self.strip)
        self._received[self._rank] = [[vector[strip] for vector in vectors] for vectors in mine]
        total: Partials = {}
        for nodes, received, tails in zip(self._nodes, self._received, self._tails, strict=True):
            for node, vectors, tail in zip(nodes, received, tails, strict=True):
                add_partial(total, node, _read(tail, vectors, shape), self._leaves)
        whole = total[(0, self._leaves)]
        if whole is None:
            raise TrainingError(f"no shard sent a message in step {step + 1}: no step can be made")
        assert isinstance(whole, Message)
        whole.changes = changes
        return whole

    def _packed(self, changed: Changes | None) -> npt.NDArray[np.uint8]:
        """Return what forward changed on this worker, as bytes."""
        if changed is None:
            return np.empty(0, np.uint8)
        return pack(changed, list(self._flat.standing.sizes()))

    def _gathered(self, step: int, changed: Changes | None, packed: npt.NDArray[np.uint8]) -> Changes | None:
        """Return what forward changed on all workers, the same on each; None if nothing."""
        counts = [int(tails["changes"][0]) if len(tails) else 0 for tails in self._tails]
        if not any(counts):
            return None
        sizes = self._flat.standing.sizes()
        if not all(0 <= count <= most_bytes(sizes.values()) for count in counts):
            raise TrainingError(
                f"a worker says that forward changed {max(counts)} bytes in step {step + 1}, which is more "
                f"than the module has"
            )
        theirs = {peer: np.empty(counts[peer], np.uint8) for peer in self._peers}
        self._mesh.exchange(
            self._meeting,
            step,
            _REDUCE + len(self._buckets),
            {peer: [packed.data] if len(packed) else [] for peer in self._peers},
            {peer: [array.data] if len(array) else [] for peer, array in theirs.items()},
        )
        total: Changes | None = None
        for rank, count in enumerate(counts):
            if count:
                total = unite(total, changed if rank == self._rank else unpack(theirs[rank], sizes))
        return total

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
        """Forget the buckets of the last step."""
        self._missing: list[set[int]] = [set() for _ in self._buckets]
        for parameter, bucket in enumerate(self._bucket_of):
            self._missing[bucket].add(parameter)
        self._begun: list[Future[None]] = []
        self._changed_late = False

    def _make_room(self, vectors: int, scalars: int) -> None:
        """Make a record for each node, and buffers for this strip of the others' vectors."""
        if not self._tails or self._tails[0]["scalars"].shape[1:] != (scalars,):
            tail = _tail_type(self._flat, scalars)
            self._tails = [np.zeros(len(nodes), tail) for nodes in self._nodes]
            self._awaited = {}
        for rank, nodes in enumerate(self._nodes):
            received = self._received[rank]
            if rank == self._rank or (received and len(received[0]) == vectors):
                continue
            self._received[rank] = [[self._new_strip() for _ in range(vectors)] for _ in nodes]
            self._awaited = {}

    def _exchange(self, step: int, bucket: int, mine: Sequence[Sequence[Vector]]) -> None:
        """Send each peer its strip's part of a bucket, and receive this strip's part of theirs.

        The records of the sums are sent with the last bucket.
        """
        is_last = bucket == len(self._buckets) - 1
        receives = self._awaited.get(bucket)
        if receives is None:
            receives = self._awaited[bucket] = {
                peer: [_bytes(v[here]) for vectors in self._received[peer] for v in vectors if _has(here)]
                + [_bytes(self._tails[peer])] * is_last
                for peer, _, here in self._cuts[bucket]
            }
        sends = {
            peer: [_bytes(v[theirs]) for vectors in mine for v in vectors if _has(theirs)]
            + [_bytes(self._tails[self._rank])] * is_last
            for peer, theirs, _ in self._cuts[bucket]
        }
        self._mesh.exchange(self._meeting, step, _REDUCE + bucket, sends, receives)

    def _cut(self, part: range, peer: int) -> tuple[int, slice, slice]:
        """Return a peer, its strip's part of a bucket, and where in this strip is this strip's part of it."""
        theirs, here = (_common(part, strip) for strip in (self._strips[peer], self.strip))
        return peer, _slice(theirs), slice(here.start - self.strip.start, here.stop - self.strip.start)


def buckets_of(sizes: Sequence[int], least: int) -> list[range]:
    """Cut a vector between parameters into buckets, from its end; all but the last have a least size.

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
    """Return the intersection of two ranges."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


def _slice(strip: range) -> slice:
    return slice(strip.start, strip.stop)


def _has(part: slice) -> bool:
    """Return whether there is an element in it."""
    return bool(part.stop > part.start)


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.view(np.uint8).data


def _tail_type(flat: FlatModule, scalars: int) -> np.dtype[Any]:
    """Return the record that a sum of messages is, without its vectors; absent where it has no rows."""
    statistics, counters = flat.statistics(), flat.counters()
    return np.dtype(
        [
            ("rows", "<i8"),
            ("shards", "<i8"),
            ("loss", "<f8"),
            ("weight", "<f8"),  # 0: the rows have none
            ("changes", "<i8"),  # bytes of what forward changed, of all sums of the worker
            ("scalars", "<f8", (scalars,)),
            ("counters", "<i8", counters.shape),
            ("statistics", statistics.dtype, statistics.shape),
            ("touched", "?", (len(flat.trainable),)),
        ]
    )


def _fill(tail: Any, message: Message | None, shape: MessageShape) -> None:
    """Write the record of a sum; an absent sum has no rows."""
    tail["rows"] = 0 if message is None else message.rows
    if message is not None:
        tail["shards"], tail["loss"] = message.shards, message.loss
        tail["weight"] = message.weight or 0.0
        tail["touched"] = True if message.touched is None else message.touched
        tail["counters"], tail["statistics"] = message.counters, message.statistics
        tail["scalars"] = [message.scalars[name] for name in shape.scalars]


def _read(tail: Any, vectors: Sequence[Vector], shape: MessageShape) -> Message | None:
    """Return the sum that a record and a strip of its vectors hold."""
    rows, shards, loss, weight, _, scalars, counters, statistics, touched = tail.item()
    if not rows:
        return None
    return Message(
        vectors=dict(zip(shape.vectors, vectors, strict=True)),
        scalars=dict(zip(shape.scalars, scalars.tolist(), strict=True)),
        statistics=statistics.copy(),
        counters=counters.copy(),
        loss=loss,
        rows=rows,
        weight=weight or None,
        shards=shards,
        touched=None if touched.all() else touched.copy(),
    )
