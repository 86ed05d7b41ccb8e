"""The addition tree gives the same bits however its leaves are grouped and in whatever order they come."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.arithmetic.addition_tree import (
    Partials,
    add_partial,
    merge_partials,
    partials_sent,
    split,
    useful_workers,
)

calm = settings(deadline=None, derandomize=True, database=None)  # no clock, no chance


class Text:
    """A leaf whose sum can be read: it writes down what was added to what."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __iadd__(self, other: Text) -> Text:
        self.text = f"({self.text}+{other.text})"
        return self


def added(leaves: list, order: list[int] | None = None):
    """Add leaves one by one, in an order of arrival, and return the root."""
    partials: Partials = {}
    for leaf in order or range(len(leaves)):
        add_partial(partials, (leaf, leaf + 1), leaves[leaf], len(leaves))
    assert list(partials) == [(0, len(leaves))]
    return partials[(0, len(leaves))]


def tree_sum(leaves: list[np.ndarray | None]) -> np.ndarray | None:
    """The definition: split at the largest power of two below the width, add the halves' sums."""
    if len(leaves) == 1:
        return leaves[0]
    middle = 1
    while 2 * middle < len(leaves):
        middle *= 2
    left, right = tree_sum(leaves[:middle]), tree_sum(leaves[middle:])
    if left is None or right is None:
        return right if left is None else left
    return left + right


def vectors(count: int, present: list[bool], seed: int) -> list[np.ndarray | None]:
    """Float32 vectors whose magnitudes differ so much that every order of adding has its own bits."""
    drawn = np.random.default_rng(seed)
    return [
        (drawn.standard_normal(16) * 10.0 ** drawn.integers(-4, 5, 16)).astype(np.float32) if here else None
        for here in present[:count]
    ]


def copied(leaf: np.ndarray | None) -> np.ndarray | None:
    return None if leaf is None else leaf.copy()


@pytest.mark.parametrize(
    ("leaves", "sum_"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (4, "((0+1)+(2+3))"),
        (5, "(((0+1)+(2+3))+4)"),
        (6, "(((0+1)+(2+3))+(4+5))"),
        (7, "(((0+1)+(2+3))+((4+5)+6))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
        (9, "((((0+1)+(2+3))+((4+5)+(6+7)))+8)"),
    ],
)
def test_the_order_of_addition_is_the_one_that_is_drawn(leaves: int, sum_: str) -> None:
    assert added([Text(str(leaf)) for leaf in range(leaves)]).text == sum_


def test_the_left_child_stays_on_the_left_when_leaves_arrive_backwards() -> None:
    assert added([Text(leaf) for leaf in "01234"], order=[4, 3, 2, 1, 0]).text == "(((0+1)+(2+3))+4)"


def test_an_absent_leaf_is_passed_over() -> None:
    leaves = [Text("0"), Text("1"), None, Text("3"), None]
    assert added(leaves).text == "((0+1)+3)"
    assert added([None, None, None]) is None


def test_an_absent_leaf_is_not_a_zero() -> None:
    negative_zero = np.array([-0.0], np.float32)
    assert np.signbit(added([negative_zero.copy(), None]))
    assert not np.signbit(added([negative_zero.copy(), np.zeros(1, np.float32)]))


def test_a_node_splits_at_the_largest_power_of_two_below_its_width() -> None:
    assert split((0, 2)) == ((0, 1), (1, 2))
    assert split((0, 5)) == ((0, 4), (4, 5))
    assert split((4, 7)) == ((4, 6), (6, 7))
    assert split((0, 17)) == ((0, 16), (16, 17))


def test_adding_in_sequence_gives_other_bits_than_the_tree() -> None:
    # 2^24 is where float32 stops counting by ones: 2^24 + 1 rounds back to 2^24.
    leaves = [np.array([value], np.float32) for value in (2.0**24, 1, 1, 1)]
    in_sequence = ((leaves[0] + leaves[1]) + leaves[2]) + leaves[3]
    assert in_sequence == 16_777_216
    assert added([leaf.copy() for leaf in leaves]) == 16_777_218  # (2^24 + 1) + (1 + 1)


@calm
@given(
    count=st.integers(1, 17),
    present=st.lists(st.booleans(), min_size=17, max_size=17),
    seed=st.integers(0, 2**32 - 1),
    choice=st.randoms(use_true_random=False),
)
def test_any_grouping_and_any_order_of_arrival_gives_the_bits_of_the_definition(
    count: int, present: list[bool], seed: int, choice: random.Random
) -> None:
    leaves = vectors(count, present, seed)
    expected = tree_sum(leaves)

    groups: list[Partials] = [{} for _ in range(choice.randint(1, count))]
    for leaf in choice.sample(range(count), count):
        add_partial(choice.choice(groups), (leaf, leaf + 1), copied(leaves[leaf]), count)
    while len(groups) > 1:  # merge any two, as a tree of tasks would
        into = groups.pop(choice.randrange(len(groups)))
        merge_partials(into, groups.pop(choice.randrange(len(groups))), count)
        groups.append(into)

    (partials,) = groups
    assert list(partials) == [(0, count)]
    total = partials[(0, count)]
    if expected is None:
        assert total is None
    else:
        assert total.tobytes() == expected.tobytes()


def test_a_node_that_is_added_twice_is_caught() -> None:
    partials: Partials = {}
    add_partial(partials, (1, 2), Text("1"), 4)
    with pytest.raises(AssertionError, match=r"node \(1, 2\) was added twice"):
        add_partial(partials, (1, 2), Text("1"), 4)


@pytest.mark.parametrize(
    ("first", "end", "leaves", "count"),
    [
        (0, 8, 8, 1),  # the root
        (0, 4, 8, 1),  # its left half
        (1, 4, 8, 2),  # 1 and (2,4)
        (1, 7, 8, 4),  # 1, (2,4), (4,6) and 6
        (3, 5, 8, 2),  # neighbours, but no siblings
        (4, 5, 5, 1),  # the lone leaf on the right of five
        (3, 5, 5, 2),  # it and a leaf that is not its sibling
        (2, 2, 8, 0),  # nothing
    ],
)
def test_a_range_of_leaves_collapses_to_so_many_partial_sums(
    first: int, end: int, leaves: int, count: int
) -> None:
    partials: Partials = {}
    for leaf in range(first, end):
        add_partial(partials, (leaf, leaf + 1), None, leaves)
    assert len(partials) == count
    partials: Partials = {}
    for leaf in range(first, end):
        add_partial(partials, (leaf, leaf + 1), Text(str(leaf)), leaves)
    assert len(partials) == count


@pytest.mark.parametrize(
    ("workers", "leaves", "sent"),
    [(1, 7, [1]), (2, 8, [1, 1]), (3, 8, [1, 2, 2]), (2, 7, [2, 2]), (3, 7, [1, 1, 1])],
)
def test_a_worker_sends_what_it_could_not_add_up(workers, leaves, sent):
    assert list(partials_sent(workers, leaves)) == sent


@pytest.mark.parametrize(
    ("leaves", "useful"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 3, 6]), (7, [1, 3, 7]), (8, [1, 2, 4, 8])]
)
def test_workers_are_useful_where_none_waits_and_each_sends_one_sum(leaves, useful):
    assert useful_workers(leaves) == useful
