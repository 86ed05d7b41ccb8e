"""The addition tree: n leaves are always added in the same order, whoever holds them.

A node is a range of leaves, (first, last + 1).  It splits at the largest power of two below its width.
Partial sums are a dict {node: sum}.  Only siblings are ever added, so that any grouping and any order of
arrival gives the same bits.  An absent leaf is None: adding zeros instead would give other bits.

    0 1 2 3 4      (0,5) = (0,4) + (4,5)
    └┬┘ └┬┘ │      (0,4) = (0,2) + (2,4)
     └─┬─┘  │
       └─┬──┘
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import ceil
from typing import Protocol, Self

from sparksgd.arithmetic.ranges import balanced_range

__all__ = [
    "Addable",
    "Node",
    "Partials",
    "add_partial",
    "merge_partials",
    "nodes_of",
    "partials_sent",
    "split",
    "useful_workers",
]

Node = tuple[int, int]


class Addable(Protocol):
    """What a tree can add, in place: `left += right`."""

    def __iadd__(self, other: Self, /) -> Self: ...


Partials = dict[Node, Addable | None]


def split(node: Node) -> tuple[Node, Node]:
    """Return the two children of a node of at least two leaves.

    >>> split((0, 5))
    ((0, 4), (4, 5))
    """
    first, end = node
    middle = first + (1 << (end - first - 1).bit_length() - 1)
    return (first, middle), (middle, end)


def _family(node: Node, leaves: int) -> tuple[Node, Node, Node]:
    """Return (parent, left child, right child) of the parent of a node other than the root."""
    parent = (0, leaves)
    while True:
        left, right = split(parent)
        if node in (left, right):
            return parent, left, right
        parent = left if node[1] <= left[1] else right


def add_partial(partials: Partials, node: Node, value: Addable | None, leaves: int) -> None:
    """Add a node's sum to the partials, and merge siblings upwards.

    Args:
        partials: the sums so far; they and their vectors are changed in place.
        node: the node that `value` is the sum of.
        value: the sum, or None if no leaf below the node is present; the tree owns it from now on.
        leaves: how many leaves the whole tree has.
    """
    root = (0, leaves)
    while node != root:
        parent, left, right = _family(node, leaves)
        sibling = right if node == left else left
        if sibling not in partials:
            break
        other = partials.pop(sibling)
        augend, addend = (value, other) if node == left else (other, value)
        if augend is None:
            value = addend
        elif addend is None:
            value = augend
        else:
            augend += addend
            value = augend
        node = parent
    assert node not in partials, f"node {node} was added twice"
    partials[node] = value


def nodes_of(held: Iterable[int], leaves: int) -> list[Node]:
    """Return the nodes that are left when some leaves are added up as far as possible.

    >>> nodes_of([1, 2, 3], 4)
    [(1, 2), (2, 4)]
    """
    partials: Partials = {}
    for leaf in held:
        add_partial(partials, (leaf, leaf + 1), None, leaves)
    return list(partials)


def partials_sent(workers: int, leaves: int) -> Iterator[int]:
    """Yield how many partial sums each of some workers is left with, of its range of the leaves.

    >>> list(partials_sent(2, 8)), list(partials_sent(3, 8))
    ([1, 1], [1, 2, 2])
    """
    for worker in range(workers):
        yield len(nodes_of(balanced_range(worker, workers, leaves), leaves))


def useful_workers(leaves: int) -> list[int]:
    """Return the numbers of workers with which each sends one partial sum, and more are faster than fewer.

    >>> useful_workers(8)
    [1, 2, 4, 8]
    """
    return [
        workers
        for workers in range(1, leaves + 1)
        if ceil(leaves / ceil(leaves / workers)) == workers
        and all(sent == 1 for sent in partials_sent(workers, leaves))
    ]


def merge_partials(into: Partials, other: Mapping[Node, Addable | None], leaves: int) -> None:
    """Add every partial of `other` to `into`, in place."""
    for node, value in other.items():
        add_partial(into, node, value, leaves)
