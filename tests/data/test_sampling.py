"""Every row takes part exactly once an epoch, in steps of equal size, however uneven the shards."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.data.sampling import Sampling

calm = settings(deadline=None, derandomize=True, database=None)  # no clock, no chance

shard_rows = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any).map(tuple)
rows_per_step = st.integers(1, 60)


def sampling_of(shard_rows: tuple[int, ...], rows_per_step: int, seed: int = 0) -> Sampling:
    return Sampling(shard_rows=shard_rows, rows_per_step=rows_per_step, seed=seed)


def dealt_by_hand(shard_rows: tuple[int, ...], steps: int) -> list[list[int]]:
    """Rows of each shard in each step, as a person would deal them: equal shares, then the left-over
    rows one by one to the steps in turn, going on at the next shard where the last one ended."""
    pieces = [[rows // steps] * steps for rows in shard_rows]
    turn = 0
    for shard, rows in enumerate(shard_rows):
        for _ in range(rows % steps):
            pieces[shard][turn % steps] += 1
            turn += 1
    return pieces


def test_nine_rows_in_two_steps_are_dealt_as_a_person_would() -> None:
    sampling = sampling_of((5, 0, 4), rows_per_step=5)
    # shares 2, 0, 2; the odd row of shard 0 goes to the first step
    assert sampling.turns_per_epoch == 2
    assert [[sampling.piece_rows(shard, step) for step in (0, 1)] for shard in (0, 1, 2)] == [
        [3, 2],
        [0, 0],
        [2, 2],
    ]
    assert sampling.piece_sizes() == {2, 3}


def test_the_cursor_of_the_left_over_rows_runs_on_across_shards() -> None:
    sampling = sampling_of((2, 2, 2), rows_per_step=2)
    # 3 steps; shard 0 gives to steps 0 1, shard 1 to 2 0, shard 2 to 1 2
    assert [[sampling.piece_rows(shard, step) for step in (0, 1, 2)] for shard in (0, 1, 2)] == [
        [1, 1, 0],
        [1, 0, 1],
        [0, 1, 1],
    ]


@calm
@given(shard_rows, rows_per_step)
def test_an_epoch_is_the_fewest_steps_that_hold_all_rows(rows: tuple[int, ...], per_step: int) -> None:
    steps = sampling_of(rows, per_step).turns_per_epoch
    assert steps * per_step >= sum(rows) > (steps - 1) * per_step


@calm
@given(shard_rows, rows_per_step, st.integers(0, 3))
def test_every_row_takes_part_exactly_once_an_epoch(rows: tuple[int, ...], per_step: int, epoch: int) -> None:
    sampling = sampling_of(rows, per_step)
    steps = range(epoch * sampling.turns_per_epoch, (epoch + 1) * sampling.turns_per_epoch)
    for shard, count in enumerate(rows):
        order = sampling.shuffled(shard, epoch)
        taken = [row for step in steps for row in order[slice(*sampling.piece_bounds(shard, step))]]
        assert sorted(taken) == list(range(count))


@calm
@given(shard_rows, rows_per_step)
def test_every_step_takes_floor_or_ceil_of_the_mean_and_never_more_than_asked(
    rows: tuple[int, ...], per_step: int
) -> None:
    sampling = sampling_of(rows, per_step)
    steps = sampling.turns_per_epoch
    taken = [sampling.rows_of_turn(step) for step in range(steps)]
    assert set(taken) <= {sum(rows) // steps, -(-sum(rows) // steps)}
    assert sum(taken) == sum(rows)
    assert max(taken) <= per_step


@calm
@given(shard_rows, rows_per_step)
def test_pieces_are_what_dealing_by_hand_gives_in_every_epoch(rows: tuple[int, ...], per_step: int) -> None:
    sampling = sampling_of(rows, per_step)
    steps = sampling.turns_per_epoch
    by_hand = dealt_by_hand(rows, steps)
    for epoch in (0, 2):
        for shard in range(len(rows)):
            pieces = [sampling.piece_rows(shard, epoch * steps + step) for step in range(steps)]
            assert pieces == by_hand[shard]
    assert sampling.piece_sizes() == {size for pieces in by_hand for size in pieces} - {0}


@calm
@given(shard_rows, rows_per_step)
def test_pieces_follow_one_another_without_gap_or_overlap(rows: tuple[int, ...], per_step: int) -> None:
    sampling = sampling_of(rows, per_step)
    for shard, count in enumerate(rows):
        bounds = [sampling.piece_bounds(shard, step) for step in range(sampling.turns_per_epoch)]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == count
        assert all(before[1] == after[0] for before, after in pairwise(bounds))


def test_shuffles_differ_between_epochs_shards_and_seeds() -> None:
    sampling, other_seed = sampling_of((50, 50), 10), sampling_of((50, 50), 10, seed=1)
    orders = [
        sampling.shuffled(0, 0),
        sampling.shuffled(0, 1),
        sampling.shuffled(1, 0),
        other_seed.shuffled(0, 0),
    ]
    assert len({order.tobytes() for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_a_shuffle_depends_on_nothing_but_its_key() -> None:
    np.random.seed(7)  # the global generator must not matter
    first = sampling_of((8, 3), 2).shuffled(0, 5)
    np.random.seed(8)
    assert first.tolist() == sampling_of((8, 100, 7), 50).shuffled(0, 5).tolist()


def test_epochs_are_counted_by_whole_passes() -> None:
    sampling = sampling_of((5, 0, 4), rows_per_step=4)
    assert [sampling.epoch_of(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
