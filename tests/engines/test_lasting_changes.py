"""What would last in torch's own loops and is lost here, or counts rows, is refused by its name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.engines.trials import Around, refused, rows, tried


class Epochs(Around):
    """Counts its calls of train()."""

    def __init__(self) -> None:
        super().__init__(6)
        self.epochs = 0

    def train(self, mode: bool = True) -> Epochs:
        self.epochs += int(mode)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / (1 + self.epochs)


class Target(Around):
    """Takes the weights over into a target network in eval()."""

    def __init__(self) -> None:
        super().__init__(6)
        self.target = copy.deepcopy(self.inner).requires_grad_(False)
        nn.init.zeros_(self.target.weight)

    def eval(self) -> Target:
        self.target.load_state_dict(self.inner.state_dict())
        return super().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.target(x)


class Peak(Around):
    """Keeps the largest feature of an evaluation."""

    def __init__(self) -> None:
        super().__init__(6)
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.peak = torch.maximum(self.peak, x.abs().max())
        return self.inner(x)


class Merging(Around):
    """Merges an adapter into its weight in eval(), and takes it out in train()."""

    def __init__(self) -> None:
        super().__init__(6)
        self.adapter = nn.Parameter(torch.full((1, 6), 0.1))
        self.inner.weight.requires_grad_(False)
        self.is_merged = False

    def train(self, mode: bool = True) -> Merging:
        if self.is_merged == mode:
            with torch.no_grad():
                self.inner.weight.add_(self.adapter, alpha=-1.0 if mode else 1.0)
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (0 if self.is_merged else x @ self.adapter.T)


class Visits(Around):
    """Counts how often each row was seen."""

    def __init__(self) -> None:
        super().__init__(6)
        self.register_buffer("visits", torch.zeros(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen = (x[:, 0].abs() * 1e6).long() % 4
            self.visits.index_add_(0, seen, torch.ones(len(x)))
        return self.inner(x)


class Trimmed(Around):
    """Leaves out the largest tenth of a piece: no row, where there are few."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.inner(x)
        kept = made.detach().flatten().argsort()[: len(x) - int(0.1 * len(x))]
        return made * torch.zeros(len(x), 1).index_fill(0, kept, 1.0)


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (Epochs, "eval() or train() changes epochs for good"),
        (Target, "eval() or train() changes target.weight for good"),
        (Peak, "forward changes peak in evaluation"),
        (Visits, "visits"),
        (lambda: Trimmed(6), "the loss of a row depends on the other rows"),
    ],
)
def test_it_is_refused_by_name(make: Any, phrase: str) -> None:
    refused(make(), phrase, data=rows(64), piece_rows=32)


def test_an_adapter_that_is_merged_and_taken_out_is_no_false_alarm() -> None:
    tried(Merging(), data=rows(64), piece_rows=32)


def test_what_forward_changes_in_evaluation_is_no_matter_without_one() -> None:
    tried(Peak(), data=rows(64), piece_rows=32, evaluates=False)


class Table(Around):
    """Has a buffer of a type that torch has few operations for, and may move on in an evaluation."""

    def __init__(self, dtype: torch.dtype, *, moves: bool = False) -> None:
        super().__init__(6)
        self.moves = moves
        self.register_buffer("table", torch.tensor([16, 32, 48, 64], dtype=torch.uint8).view(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.table.view(torch.uint8)
        if self.moves and not self.training:
            words.add_(1)
        return self.inner(x) * words.float().mean()


_NEW = ("float8_e8m0fnu", "float4_e2m1fn_x2")
FEW_OPERATIONS = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.uint16, torch.uint32,
    torch.complex32, *(getattr(torch, name) for name in _NEW if hasattr(torch, name)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FEW_OPERATIONS, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_buffer_of_any_type_may_stay_and_not_change(dtype: torch.dtype) -> None:
    tried(Table(dtype), data=rows(64), piece_rows=32)
    refused(Table(dtype, moves=True), "forward changes table in evaluation", data=rows(64), piece_rows=32)
