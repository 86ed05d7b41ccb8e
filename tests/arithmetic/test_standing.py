"""What forward changes is found, and taken back: if a copy is kept, and if the memory is mapped twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from sparksgd.arithmetic.changes import PARAMETERS, Changes, equal_changes
from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.errors import ModelError

KEPT: list[torch.Tensor] = []
"""What `Remembered` has seen of its weight."""


class Wide(nn.Module):
    """y = sum(w x) with more in w than in one page, and a parameter that others lie behind."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(3))
        self.w = nn.Parameter(torch.linspace(-1, 1, 40_000).view(40, 1000))
        self.w.data[0, :2] = torch.tensor([0.0, float("nan")])
        self.v = nn.Parameter(torch.linspace(0, 1, 1000))

    def change(self) -> None:
        """Change what a test is about."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change()
        return (x @ self.w.nan_to_num() * self.v).sum() + self.odd.sum()


class Clamped(Wide):
    def change(self) -> None:
        self.w.data.clamp_(-0.9, 2)


class AlwaysClamped(Wide):
    def change(self) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.5, 0.5)


class Rebound(Wide):
    def change(self) -> None:
        self.v.data = self.v.data * 2


class ReboundAndWritten(Wide):
    def change(self) -> None:
        self.w.data[3].add_(1)
        self.w.data = self.w.data.clone()
        self.odd.data.neg_()


class SameValues(Wide):
    def change(self) -> None:
        self.w.data.copy_(self.w.data.clone())
        self.v.data[0] = self.v.data[0].item()


class SignOfZero(Wide):
    def change(self) -> None:
        self.w.data[0, 0] = -0.0


class OtherNan(Wide):
    def change(self) -> None:
        self.w.data.view(torch.int32)[0, 1] ^= 1


class HookedBackward(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.w.register_hook(Hook())

    def change(self) -> None:
        Hook.weight = self.w


class Hook:
    """Writes a weight as its gradient comes."""

    weight: torch.Tensor

    def __call__(self, gradient: torch.Tensor) -> None:
        Hook.weight.data[5].fill_(0.25)


class Remembered(Wide):
    def change(self) -> None:
        for tensor in KEPT:
            if tensor.data_ptr() == self.w.data_ptr():
                tensor[7, 7] = 3
        KEPT.append(self.w.detach())


class ByNumpy(Wide):
    def change(self) -> None:
        self.w.detach().numpy()[-1, -1] = 8


class Renormed(nn.Module):
    """An embedding that holds the norm of the rows it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(3))
        self.table = nn.Embedding(3000, 20, max_norm=1.0)
        self.table.weight.data.copy_(torch.linspace(-1, 1, 60_000).view(3000, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(0, 3000, 700)
        return self.table(rows).sum() * x.sum() + self.odd.sum()


class ConvolvedLast(nn.Module):
    """A convolution, computed channels last, that clamps what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 40, 5)
        self.inner.weight.data.copy_(torch.linspace(-1, 1, 3000).view(40, 3, 5, 5))
        self.inner.bias.data.zero_()
        self.w = nn.Parameter(torch.linspace(-1, 1, 20_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight.data.clamp_(-0.5, 0.5)
        self.w.data[9] = 9
        image = x.new_ones(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        return self.inner(image).sum() + self.w.sum()


class Pairs(nn.Module):
    """Complex weights, which lie behind an odd number of others."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(3))
        self.pairs = nn.Parameter(torch.linspace(-1, 1, 20_000).view(10_000, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.view_as_complex(self.pairs.data)[7] = 1 + 2j
        return torch.view_as_complex(self.pairs).abs().sum() * x.sum() + self.odd.sum()


class Tied(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Module()
        self.second.w = self.w

    def change(self) -> None:
        self.second.w.data[2].zero_()


KINDS: dict[type[nn.Module], int | None] = {
    Wide: None,
    Clamped: 1998,  # a twentieth, but the two that are zero and NaN
    AlwaysClamped: 20_501,  # half of them, but those two; all three; half of 1000
    Rebound: 999,
    ReboundAndWritten: 1003,
    SameValues: None,
    SignOfZero: 1,
    OtherNan: 1,
    HookedBackward: 1000,
    Remembered: None,
    ByNumpy: 1,
    Renormed: 80,  # five rows of 20; that in the middle is short enough
    ConvolvedLast: 1501,
    Pairs: 2,
    Tied: 1000,
}
"""How many elements the first piece changes; None: nothing."""


def pair(kind: type[nn.Module]) -> list[FlatModule]:
    """Return a module twice, of which the second one's memory is mapped twice."""
    KEPT.clear()
    flats = [FlatModule(kind()), FlatModule(kind())]
    flats[1].map_twice(0)
    assert [flat.is_mapped for flat in flats] == [False, True]
    return flats


def piece(flat: FlatModule, raises: bool = False) -> tuple[Changes | None, bytes]:
    with flat.standing.piece() as made, flat.new_gradient() as gradient:
        flat.module(torch.ones(1, 40)).backward()
        if raises:
            raise InterruptedError
    return made.changes, gradient.tobytes()


def seen(flat: FlatModule) -> bytes:
    """Return the parameters as the module has them."""
    return b"".join(parameter.detach().numpy().tobytes() for parameter in flat.trainable)


def number(changes: Changes | None) -> int | None:
    return None if changes is None or changes.parameters is None else len(changes.parameters)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_both_find_the_same_changes_and_leave_the_same_bytes(kind: type[nn.Module]) -> None:
    flats = pair(kind)
    generator = np.random.default_rng(0)
    for step in range(4):
        move = torch.from_numpy(generator.standard_normal(len(flats[0].parameters), np.float32)) * 0.01
        found = []
        for flat in flats:
            before = flat.parameters.numpy().tobytes()
            flat.standing.at(flat.parameters.numpy())
            last = flat.channels_last() if kind is ConvolvedLast else None
            if last is not None:
                last.__enter__()
            pieces = [piece(flat) for _ in range(2)]
            if last is not None:
                last.__exit__(None, None, None)
            assert flat.parameters.numpy().tobytes() == seen(flat) == before
            with flat.standing.unchanged(), torch.no_grad():
                flat.module(torch.ones(1, 40))
            assert flat.parameters.numpy().tobytes() == seen(flat) == before
            flat.apply(pieces[0][0])
            flat.parameters.add_(move)
            found.append((pieces, flat.parameters.numpy().tobytes()))
        (copied, weights), (mapped, same) = found
        for (one, gradient), (other, same_gradient) in zip(copied, mapped, strict=True):
            assert equal_changes(one, other)
            assert gradient == same_gradient
        assert weights == same
        if not step:
            assert number(mapped[0][0]) == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_piece_that_raises_leaves_what_stood(kind: type[nn.Module]) -> None:
    for flat in pair(kind):
        for value in (0.25, 0.75):
            flat.parameters.fill_(value)
            flat.standing.at(flat.parameters.numpy())
            with pytest.raises(InterruptedError):
                piece(flat, raises=True)
            assert set(np.frombuffer(seen(flat), np.float32).tolist()) == {value}
            assert flat.parameters.equal(torch.full_like(flat.parameters, value))


def test_what_an_earlier_piece_gave_away_still_writes_the_modules_memory() -> None:
    for flat in pair(Remembered):
        flat.standing.at(flat.parameters.numpy())
        assert [number(piece(flat)[0]) for _ in range(3)] == [None, 1, 1]


def test_what_is_written_between_points_is_not_what_the_next_ones_show() -> None:
    flat = pair(Wide)[1]
    flat.standing.at(flat.parameters.numpy())
    piece(flat)
    flat.module.v.data.fill_(6)
    flat.parameters.fill_(5)
    flat.standing.at(flat.parameters.numpy())
    assert set(np.frombuffer(seen(flat), np.float32).tolist()) == {5}
    assert piece(flat)[0] is None


def written_by() -> dict[str, Callable[[FlatModule], object]]:
    """Return all of ours that writes parameters, by what it is: each makes them 2."""
    two = pair(Wide)[0]
    two.parameters.fill_(2)
    weights = two.weights(3)

    def strip_of(flat: FlatModule) -> FlatStrip:
        flat.parameters[: len(flat.parameters) - 4].fill_(2)
        return FlatStrip(flat, range(len(flat.parameters) - 4, len(flat.parameters)))

    def applied(flat: FlatModule) -> None:
        with two.standing.piece() as made:
            two.module.get_parameter("w").data.fill_(2)
            two.module.get_parameter("v").data.fill_(2)
            two.module.get_parameter("odd").data.fill_(2)
        flat.apply(made.changes)

    two.parameters.fill_(1)
    two.standing.at(two.parameters.numpy())
    part = copy.copy(weights)
    object.__setattr__(part, "parameters", weights.parameters[-4:])
    return {
        "in place": lambda flat: flat.parameters.fill_(2),
        "by numpy": lambda flat: flat.parameters.numpy().fill(2),
        "as one parameter": lambda flat: flat.whole.data.fill_(2),
        "loaded": lambda flat: flat.load(weights),
        "a strip": lambda flat: strip_of(flat).parameters.fill_(2),
        "a strip as one parameter": lambda flat: strip_of(flat).whole.data.fill_(2),
        "a strip that is loaded": lambda flat: strip_of(flat).load(part),
        "received as bytes": lambda flat: (
            flat.parameters.numpy()
            .view(np.uint8)
            .data.__setitem__(slice(None), weights.parameters.view(np.uint8).data)
        ),
        "what forward changed": applied,
        "another point": lambda flat: flat.standing.at(weights.parameters),
    }


@pytest.mark.parametrize("writer", written_by())
def test_the_module_sees_whatever_of_ours_writes(writer: str) -> None:
    for flat in pair(Clamped):
        flat.standing.at(flat.parameters.numpy())
        piece(flat)
        written_by()[writer](flat)
        flat.standing.at(flat.parameters.numpy())
        assert set(np.frombuffer(seen(flat), np.float32).tolist()) == {2}, writer
        assert flat.weights(4).parameters.tobytes() == seen(flat)
        assert piece(flat)[0] is None


def test_a_tensor_of_another_shape_is_refused_and_taken_back() -> None:
    for flat in pair(Wide):
        flat.standing.at(flat.parameters.numpy())
        before = seen(flat)
        flat.module.w.data.zero_()
        with pytest.raises(ModelError, match=r"makes parameter v \(2,\)"), flat.standing.piece():
            flat.module.v.data = torch.ones(2)
        assert seen(flat) == before == flat.parameters.numpy().tobytes()


def test_memory_that_moves_with_all_its_views_is_refused() -> None:
    flat = pair(Wide)[1]
    flat.standing.at(flat.parameters.numpy())
    with pytest.raises(ModelError, match="moves the memory of parameter w,"), flat.standing.piece():
        flat.module.w.share_memory_()


def test_a_point_comes_before_the_first_piece() -> None:
    for flat in pair(Wide):
        with pytest.raises(AssertionError, match="at"), flat.standing.piece():
            pass


def test_the_changes_of_all_parameters_have_one_name() -> None:
    for flat in pair(AlwaysClamped):
        flat.standing.at(flat.parameters.numpy())
        changes, _ = piece(flat)
        assert changes is not None
        assert list(changes.parts) == [PARAMETERS]
