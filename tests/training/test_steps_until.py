"""How many steps the loop asks an engine for: those until something is due."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sparksgd.training.loop import steps_until


def solver(turns: int, rounds: list[int]) -> Any:
    """Return a solver that has made some turns, whose rounds from the first turn on are of these lengths."""
    starts = [sum(rounds[:number]) for number in range(len(rounds))]
    return SimpleNamespace(turns=turns, turns_at=dict(zip(starts, rounds, strict=True)).__getitem__)


@pytest.mark.parametrize(
    ("turn", "most", "steps"),
    [
        (5, 100, 5),
        (5, 3, 3),  # the engine likes no more
        (1, 100, 1),
        (0, 100, 1),  # at least one, whatever is due
    ],
)
def test_where_each_turn_is_a_step_they_are_the_turns_that_are_left(turn: int, most: int, steps: int) -> None:
    assert steps_until(solver(0, [1] * 8), turn, most) == steps


@pytest.mark.parametrize(
    ("made", "turn", "steps"),
    [
        (0, 3, 1),
        (0, 4, 2),  # what is due within a round waits for its end
        (0, 6, 2),
        (0, 8, 3),
        (3, 8, 2),
        (8, 8, 1),
        (3, 14, 4),
    ],
)
def test_rounds_are_counted_until_the_turn_is_reached(made: int, turn: int, steps: int) -> None:
    assert steps_until(solver(made, [3, 3, 2, 3, 3]), turn, 100) == steps
