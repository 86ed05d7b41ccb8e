"""What forward makes of a parameter or buffer is part of the step, as where one process computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compared_states import IMAGES, NUMBERS, WORDS, Rows, assert_equal, plain, product
from torch import nn

from sparksgd.errors import ModelError

LINE: Rows = [([x], 2 * x) for x in (-1.0, 1.0, -2.0, 2.0)]


# Modules whose forward changes something


class Rebound(nn.Module):
    """y = w x, with |w| at most 5."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.w.data = self.w.data.clamp(-5, 5)
        return x[:, 0] * self.w


class Projected(nn.Module):
    """A linear module whose weights forward clamps, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.how, self.linear = how, nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        if self.how == "data":
            weight.data.clamp_(-0.1, 0.1)
        elif self.how == "no_grad":
            with torch.no_grad():
                weight.clamp_(-0.1, 0.1)
        elif self.how == "rebound":
            weight.data = weight.data.clamp(-0.1, 0.1)
        elif self.how == "sliced":
            weight.data[:, :2] *= 0.5
        return self.linear(x)[:, 0]


class Words(nn.Module):
    """Embeddings whose norms forward holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words = nn.Embedding(6, 4, max_norm=1.0)
        self.out = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x[:, 0].long()))[:, 0]


class HeldConvolution(nn.Conv2d):
    """A convolution whose filters have a norm of at most 0.3, as EEGNet has them."""

    in_place = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        if self.in_place:
            self.weight.data.copy_(held)
        else:
            self.weight.data = held
        return super().forward(x)


class Images(nn.Module):
    """A convolution with held filters, and a frozen one that is held, too."""

    def __init__(self, in_place: bool, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = HeldConvolution(1, 4, 3)
        self.second = HeldConvolution(4, 3, 2)
        self.first.in_place = self.second.in_place = in_place
        if frozen:
            self.first.requires_grad_(False)
        self.out = nn.Linear(27, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x.view(-1, 1, 6, 6)).relu()).flatten(1))[:, 0]


class Averaged(nn.Module):
    """Keeps an average of its weights in a buffer, in place or by a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.in_place, self.linear = in_place, nn.Linear(6, 1)
        self.register_buffer("average", torch.zeros(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            self.average.lerp_(self.linear.weight.detach(), 0.1)
        else:
            self.average = 0.9 * self.average + 0.1 * self.linear.weight.detach()
        return self.linear(x)[:, 0]


class Taught(nn.Module):
    """A frozen teacher follows the student, who also learns from it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.student, self.teacher = nn.Linear(6, 1), nn.Linear(6, 1)
        self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs, 0.01)
        return (0.8 * self.student(x) + 0.2 * self.teacher(x))[:, 0]


class Counting(nn.Module):
    """Counts its steps in buffers of several types, and lowers the output with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.linear = nn.Linear(6, 1)
        self.register_buffer("t", torch.zeros(()))
        self.register_buffer("whole", torch.zeros((), dtype=torch.int64))
        self.register_buffer("halved", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("wave", torch.zeros(1, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.t += 1
        self.whole = self.whole + 2
        self.halved.mul_(0.5)
        self.flag.logical_not_()
        self.wave += 1 + 2j
        return self.linear(x)[:, 0] / (1 + 0.1 * self.t)


class Spectral(nn.Module):
    """Power iterations move the vectors of spectral_norm, old and new."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
        self.linear, self.out = norm(nn.Linear(6, 5)), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.linear(x).relu())[:, 0]


class OwnNorm(nn.BatchNorm1d):
    """A batch-norm that replaces its statistics by new tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
        return x - self.running_mean.detach()


class Normed(nn.Module):
    """Has a batch-norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.norm, self.linear = OwnNorm(6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))[:, 0]


class Precise(nn.Module):
    """A batch-norm with float64 statistics, of features near a million."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.norm, self.linear = nn.BatchNorm1d(6, affine=False), nn.Linear(6, 1)
        self.norm.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x.double() + 1e6).float())[:, 0]


# Each step is that of plain torch


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_weight_that_forward_rebinds_ends_where_a_person_works_out(tmp_path: Path, shards: int) -> None:
    states = product(tmp_path, Rebound(), LINE, 20, shards)
    assert [states[step - 1]["w"].item() for step in (1, 5, 20)] == pytest.approx([1, 1.9375, 2.0], abs=1e-5)


class Shifting(nn.Module):
    """Keeps the average of its weights, and that of the step before, whose tensor it hands on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.linear = nn.Linear(6, 1)
        self.register_buffer("now", torch.zeros(1, 6))
        self.register_buffer("before", torch.zeros(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.before = self.now
        self.now = 0.5 * self.now + 0.5 * self.linear.weight.detach()
        return self.linear(x)[:, 0] + (x @ self.before.T)[:, 0]


KINDS: dict[str, tuple[Callable[[], nn.Module], Rows]] = {
    "rebound": (lambda: Projected("rebound"), NUMBERS),
    "data.clamp_": (lambda: Projected("data"), NUMBERS),
    "under no_grad": (lambda: Projected("no_grad"), NUMBERS),
    "a slice": (lambda: Projected("sliced"), NUMBERS),
    "embedding with max_norm": (Words, WORDS),
    "convolution, rebound": (lambda: Images(in_place=False), IMAGES),
    "convolution, in place": (lambda: Images(in_place=True), IMAGES),
    "frozen convolution, rebound": (lambda: Images(in_place=False, frozen=True), IMAGES),
    "frozen convolution, in place": (lambda: Images(in_place=True, frozen=True), IMAGES),
    "average in place": (lambda: Averaged(in_place=True), NUMBERS),
    "average, a new tensor": (lambda: Averaged(in_place=False), NUMBERS),
    "teacher": (Taught, NUMBERS),
    "a buffer handed on": (Shifting, NUMBERS),
    "counters": (Counting, NUMBERS),
    "spectral_norm": (lambda: Spectral(old=False), NUMBERS),
    "old spectral_norm": (lambda: Spectral(old=True), NUMBERS),
}


@pytest.mark.parametrize("chunk", [None, 3], ids=["whole", "chunks"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_plain_torch_s(tmp_path: Path, kind: str, shards: int, chunk: int | None) -> None:
    make, rows = KINDS[kind]
    expected = plain(make(), rows, 6, lr=0.3)
    keys = {} if chunk is None else {"train": {"rows_per_backward": chunk}}
    made = product(tmp_path, make(), rows, 6, shards, lr=0.3, **keys)
    assert_equal(made, expected)
    assert any(not torch.equal(made[0][name], made[5][name]) for name in made[0])


# Statistics of batch-norm


def test_float64_statistics_stay_float64(tmp_path: Path) -> None:
    made, expected = product(tmp_path, Precise(), NUMBERS, 5, 1), plain(Precise(), NUMBERS, 5)
    assert_equal(made, expected)
    for name in ("norm.running_mean", "norm.running_var"):
        assert made[4][name].dtype == torch.float64
        torch.testing.assert_close(made[4][name], expected[4][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shards", [1, 4])
def test_statistics_that_a_batch_norm_replaces_are_averaged_over_the_rows(
    tmp_path: Path, shards: int
) -> None:
    made = product(tmp_path, Normed(), NUMBERS, 3, shards)
    mean = torch.tensor([x for x, _ in NUMBERS]).mean(0)
    for step, state in enumerate(made, start=1):
        torch.testing.assert_close(state["norm.running_mean"], mean * (1 - 0.9**step), rtol=1e-5, atol=1e-6)


# Local turns


LOCAL = {"solver": {"name": "local_sgd", "turns_per_round": 3}}


def test_in_local_turns_what_forward_makes_of_a_weight_belongs_to_the_local_model(tmp_path: Path) -> None:
    rows: Rows = [([1.0], 9.0)] * 12  # every piece of 4 is the same
    made = product(tmp_path, Rebound(), rows, 2, 1, train={"rows_per_step": 4}, **LOCAL)
    expected = plain(Rebound(), rows[:4], 6)
    assert_equal(made, [expected[2], expected[5]])
    assert expected[5]["w"].item() > 5  # it was clamped on the way


@pytest.mark.parametrize("shards", [1, 4])
def test_in_local_turns_constants_go_on_from_turn_to_turn(tmp_path: Path, shards: int) -> None:
    made = product(tmp_path, Counting(), NUMBERS, 2, shards, train={"rows_per_step": 8}, **LOCAL)
    assert [state["t"].item() for state in made] == [3, 6]
    assert made[1]["halved"].tolist() == [1 / 64] * 2


def test_averages_of_local_weights_differ_and_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="forward changes average"):
        product(tmp_path, Averaged(True), NUMBERS, 2, 4, train={"rows_per_step": 8}, **LOCAL)
