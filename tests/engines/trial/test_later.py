"""What shows after more steps than the trial makes: rows that mix once forward has counted so far."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.engines.trials import Around, refused, tried


def minus_the_mean(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


class Counting(Around):
    """It counts its forwards in a buffer.

    Args:
        mixes: whether rows mix at a count.
        by: how far the buffer moves in each.
        first: the buffer.
    """

    n_steps: torch.Tensor

    def __init__(
        self, mixes: Callable[[float], bool], by: float = 1, first: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.mixes, self.by = mixes, by
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64) if first is None else first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.n_steps += self.by
        return self.inner(minus_the_mean(x) if self.mixes(self.n_steps.item()) else x)


LATER = {
    "after two": Counting(lambda n: n > 2),
    "after a warm-up": Counting(lambda n: n > 1000),
    "every tenth": Counting(lambda n: n >= 10 and n % 10 == 0),
    "before every hundredth": Counting(lambda n: n % 100 == 99),
    "by a half": Counting(lambda n: n > 50, by=0.5, first=torch.zeros(1)),
    "backwards": Counting(lambda n: n < 0, by=-1, first=torch.tensor(90, dtype=torch.int32)),
    "up to the end of its type": Counting(lambda n: n == 127, first=torch.tensor(0, dtype=torch.int8)),
}


@pytest.mark.parametrize("kind", LATER)
@pytest.mark.parametrize("has_pieces", [True, False])
def test_rows_that_mix_once_forward_has_counted_are_refused(kind: str, has_pieces: bool) -> None:
    refused(LATER[kind], "depends on the other rows of its piece", has_pieces=has_pieces)


def test_the_error_says_which_count_it_was() -> None:
    refused(LATER["after a warm-up"], "where n_steps is as after 251,999 steps, 4 rows together")


class Evaluated(Counting):
    """As Counting, in evaluation alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.n_steps += 1
            return self.inner(x)
        return super().forward(x)


@pytest.mark.parametrize("first", [2, 1000])
def test_so_are_those_of_evaluations(first: int) -> None:
    refused(Evaluated(lambda n: n > first), "in evaluation mode, ", "depends on the other rows")
    assert tried(Evaluated(lambda n: n > first), evaluates=False).shapes[""] == (4, 1)


class Normed(Around):
    """Its rows mix once its batch-norm has seen two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        assert self.norm.num_batches_tracked is not None
        return self.inner(minus_the_mean(x) if self.norm.num_batches_tracked > 2 else x)


def test_a_batch_norm_s_counter_is_one() -> None:
    refused(Normed(), "depends on the other rows of its piece")


class Scheduled(Around):
    """It looks its temperature up in a table, by the step."""

    table: torch.Tensor
    n_steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(1, 2, 50))
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = self.table[self.n_steps]
        if self.training:
            self.n_steps += 1
        return self.inner(x) / at


@pytest.mark.parametrize("make", [lambda: Counting(lambda n: False), Scheduled])
def test_a_counter_is_no_false_alarm(make: Callable[[], nn.Module]) -> None:
    assert tried(make()).shapes[""] == (4, 1)
