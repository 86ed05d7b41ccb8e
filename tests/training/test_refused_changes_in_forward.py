"""What forward may not change: values that differ from piece to piece, and what the module is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compared_states import NUMBERS, States, assert_equal, plain, product
from torch import nn

from sparksgd.errors import ModelError


class Peak(nn.Module):
    """Keeps the largest feature that it saw, always or at every so many steps."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.linear, self.every = nn.Linear(6, 1), every
        self.register_buffer("peak", torch.zeros(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls % self.every == 0:
            self.peak = torch.maximum(self.peak, x.abs().max())
        return self.linear(x)[:, 0]


class Rowwise(nn.Module):
    """Moves a weight by its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear.weight.data[0, 3] += x.mean()
        return self.linear(self.first(x))[:, 0]


class Growing(nn.Module):
    """Makes, removes or replaces a part of itself in forward, or gives it another form."""

    def __init__(self, how: str, after: int = 0) -> None:
        super().__init__()
        self.linear, self.how, self.head, self.after = nn.Linear(6, 1), how, None, after
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(6))
        self.spare, self.kept = nn.Parameter(torch.ones(1)), torch.zeros(1)
        self.register_buffer("cache", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.after < self.calls <= 100:  # the trial sets counters to 100 and more
            self._change()
        return self.linear(x)[:, 0]

    def _change(self) -> None:
        if self.how == "submodule":
            self.head = self.head or nn.Linear(8, 2)
        elif self.how == "parameter":
            self.extra = nn.Parameter(torch.ones(1))
        elif self.how == "replaced":
            self.linear.weight = nn.Parameter(self.linear.weight.detach().clone())
        elif self.how == "removed":
            self.linear.bias = None
        elif self.how == "buffer":
            self.cache = torch.ones(1)
        elif self.how == "shape":
            self.mask = torch.ones(7)
        elif self.how == "type":
            self.mask = self.mask.double()
        elif self.how == "weight":
            self.spare.data = torch.ones(2)
        elif self.how == "weight's memory":
            self.mask = self.linear.weight.detach()[0]
        elif self.how == "attribute's memory":
            self.spare.data = self.kept
        elif self.how == "frozen":
            self.linear.bias.requires_grad_(False)


def test_a_buffer_with_a_value_for_each_piece_is_refused_by_the_trial(tmp_path: Path) -> None:
    states = States()
    with pytest.raises(ModelError, match=r"forward changes peak, .* element 0 becomes [\d.]+ and [\d.]+\. "):
        product(tmp_path, Peak(), NUMBERS, 5, 4, states=states)
    assert states.training is None


def test_a_buffer_that_changes_at_every_fifth_step_is_refused_at_the_fifth(tmp_path: Path) -> None:
    states = States()
    with pytest.raises(ModelError, match="forward changes peak"):
        product(tmp_path, Peak(every=5), NUMBERS, 9, 4, states=states)
    assert [state["calls"].item() for state in states.states] == [1, 2, 3, 4]
    assert states.training is not None
    after = states.training.module.state_dict()
    assert (after["calls"].item(), after["peak"].item()) == (4, 0)
    assert torch.equal(after["linear.weight"], states.states[3]["linear.weight"])


@pytest.mark.parametrize("every", [1, 5])
def test_of_one_piece_in_a_step_a_value_of_the_rows_is_plain_torch_s(tmp_path: Path, every: int) -> None:
    torch.manual_seed(0)
    one = Peak(every)
    torch.manual_seed(0)
    assert_equal(product(tmp_path, one, NUMBERS, 9, 1), plain(Peak(every), NUMBERS, 9))


def test_a_weight_that_each_piece_moves_elsewhere_is_named_with_its_element(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"forward changes linear\.weight, .* its element 3 becomes"):
        product(tmp_path, Rowwise(), NUMBERS, 5, 4)


@pytest.mark.parametrize(
    ("after", "steps"),
    [(0, 0), (3, 0), (8, 8)],
    ids=["at once", "in the trial", "after the trial, for a time"],
)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("submodule", "forward made submodule head, so other workers would not have it: make all of them in"),
        ("parameter", "forward made parameter extra"),
        ("replaced", "forward replaced parameter linear.weight"),
        ("removed", "forward removed parameter linear.bias"),
        ("buffer", "forward made buffer cache"),
        ("shape", r"forward makes mask \(7,\) of float32, but it was \(6,\) of float32"),
        ("type", r"forward makes mask \(6,\) of float64, but it was"),
        ("weight", r"forward makes parameter spare \(2,\)"),
        ("weight's memory", "forward gives mask the memory of linear.weight, .* by .clone"),
        ("attribute's memory", "forward gives spare the memory of kept"),
        ("frozen", "forward changed which parameters of linear require a gradient"),
    ],
)
def test_another_structure_is_refused_by_name(
    tmp_path: Path, how: str, said: str, after: int, steps: int
) -> None:
    states = States()
    with pytest.raises(ModelError, match=said):
        product(tmp_path, Growing(how, after), NUMBERS, 10, 4, states=states)
    assert len(states.states) == steps
