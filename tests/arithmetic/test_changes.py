"""Changed elements are found by their bytes, united over pieces, and written where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparksgd.arithmetic import changes as changes_module
from sparksgd.arithmetic.changes import (
    PARAMETERS,
    ChangedElements,
    Changes,
    bits,
    constants_changed,
    equal,
    most_bytes,
    pack,
    unite,
    unpack,
)
from sparksgd.arithmetic.flat import FlatModule, FlatStrip
from sparksgd.errors import ModelError, TrainingError


def part(values: dict[int, int]) -> ChangedElements:
    positions = sorted(values)
    return ChangedElements(
        positions=np.array(positions, np.int64), values=np.array([values[p] for p in positions], np.int32)
    )


def as_dict(found: ChangedElements) -> dict[int, int]:
    places = range(len(found)) if found.positions is None else found.positions.tolist()
    return dict(zip(places, found.values.tolist(), strict=True))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0.0, 1.0]),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex128),
        torch.ones(2, 3).t(),
        torch.ones(1).expand(4),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.empty(0, 3),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
    ],
    ids=str,
)
def test_every_kind_of_tensor_is_bytes(tensor: torch.Tensor) -> None:
    assert equal(bits(tensor), bits(tensor.clone()))
    if tensor.numel():
        other = tensor.clone() * 0 if tensor.dtype != torch.bool else ~tensor
        assert not equal(bits(tensor), bits(other))


def test_zeros_of_both_signs_and_every_nan_are_told_apart() -> None:
    assert not equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))
    assert equal(bits(torch.tensor([float("nan")])), bits(torch.tensor([float("nan")])))


def test_without_c_bytes_are_compared_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "_memcmp", None)
    one = bits(torch.arange(5.0))
    assert equal(one, one.copy())
    assert not equal(one, one + 1)


def test_what_differs_is_a_part() -> None:
    before, after = np.array([1, 2, 3], np.int32), np.array([1, 5, 3], np.int32)
    found = ChangedElements.between(before, after)
    assert found is not None
    assert as_dict(found) == {1: 5}
    assert ChangedElements.between(before, before.copy()) is None
    everything = ChangedElements.between(before, before + 1)
    assert everything is not None
    assert (everything.positions, everything.values.tolist()) == (None, [2, 3, 4])


VALUES = st.dictionaries(st.integers(0, 11), st.integers(0, 2))


@given(VALUES, VALUES)
def test_united_parts_have_the_values_of_both_and_note_the_first_conflict(
    one: dict[int, int], other: dict[int, int]
) -> None:
    found, conflict = part(one).over(part(other))
    assert as_dict(found) == {**other, **one}
    differing = [place for place in sorted(one.keys() & other.keys()) if one[place] != other[place]]
    assert (conflict.position if conflict else None) == (differing[0] if differing else None)
    if conflict:
        assert conflict.values.tolist() == [one[differing[0]], other[differing[0]]]


def test_a_part_that_is_everything_unites_with_any() -> None:
    everything = ChangedElements(positions=None, values=np.array([4, 5, 6], np.int32))
    assert everything.over(everything)[1] is None
    for found, conflict in (everything.over(part({1: 5})), part({1: 5}).over(everything)):
        assert as_dict(found) == {0: 4, 1: 5, 2: 6}
        assert conflict is None
    assert everything.over(part({2: 0}))[1] is not None


@given(VALUES, st.integers(0, 12), st.integers(0, 12))
def test_a_strip_takes_its_elements(values: dict[int, int], start: int, length: int) -> None:
    whole = np.full(12, -1, np.int32)
    part(values).write(whole)
    strip = np.full(len(range(start, min(12, start + length))), -1, np.int32)
    part(values).write(strip, start)
    assert strip.tolist() == whole[start : start + length].tolist()


def test_of_two_turns_the_later_value_counts_and_only_for_constants() -> None:
    first = Changes(parts={PARAMETERS: part({0: 1}), "t": part({0: 1, 1: 1})})
    second = Changes(parts={"t": part({0: 2})})
    found = constants_changed(constants_changed(None, first), second)
    assert found is not None
    assert {name: as_dict(one) for name, one in found.parts.items()} == {"t": {0: 2, 1: 1}}
    assert constants_changed(None, None) is None


SIZES = {PARAMETERS: (12, np.dtype(np.int32)), "t": (12, np.dtype(np.int32))}


@given(VALUES, VALUES, VALUES)
def test_changes_travel_as_bytes(one: dict[int, int], two: dict[int, int], constant: dict[int, int]) -> None:
    made = [Changes(parts={PARAMETERS: part(values)}) for values in (one, two) if values]
    if constant:
        made.append(Changes(parts={"t": part(constant)}))
    total: Changes | None = None
    for each in made:
        total = unite(total, each)
    if total is None:
        return
    packed = pack(total, list(SIZES))
    assert len(packed) <= most_bytes(SIZES.values())
    found = unpack(packed, SIZES)
    assert {name: as_dict(each) for name, each in found.parts.items()} == {
        name: as_dict(each) for name, each in total.parts.items()
    }
    assert {name: each.position for name, each in found.conflicts.items()} == {
        name: each.position for name, each in total.conflicts.items()
    }


@given(st.binary(max_size=200), st.integers(0, 40), st.integers(0, 255))
def test_what_fits_no_tensor_is_refused_and_never_more(noise: bytes, place: int, value: int) -> None:
    good = pack(Changes(parts={"t": part({3: 1, 7: 2})}), list(SIZES))
    good[place] = value
    for packed in (np.frombuffer(noise, np.uint8), good, good[:-1]):
        try:
            found = unpack(packed, SIZES)
        except TrainingError:
            continue
        for each in found.parts.values():
            each.write(np.zeros(12, np.int32))


class Held(nn.Module):
    """Has two parameters, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
        self.c = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("d", torch.zeros(2, dtype=torch.bfloat16))


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.int32)


def test_changes_become_the_weights_of_every_strip() -> None:
    changed = Changes(
        parts={
            PARAMETERS: ChangedElements(positions=np.array([1, 5]), values=floats(2, 3)),
            "c": ChangedElements(positions=np.array([1]), values=floats(4)),
        }
    )
    flat = FlatModule(Held())
    FlatStrip(flat, range(4)).apply(changed)
    assert flat.parameters.tolist() == [0, 2, 0, 0, 0, 0, 0]
    strip = FlatStrip(flat, range(4, 7))
    strip.apply(changed)
    assert flat.parameters.tolist() == [0, 2, 0, 0, 0, 3, 0]
    assert flat.module.c.tolist() == [0, 4]
    assert list(strip.weights(1).constants) == ["c"]


def test_loaded_weights_take_back_what_changed_since() -> None:
    flat = FlatModule(Held())
    before = flat.weights(0)
    flat.apply(
        Changes(
            parts={"d": ChangedElements(positions=None, values=bits(torch.ones(2, dtype=torch.bfloat16)))}
        )
    )
    after = flat.weights(1)
    assert flat.module.d.tolist() == [1, 1]
    other = FlatModule(Held())
    for made in (flat, other):
        made.load(before)
        assert made.module.d.tolist() == [0, 0]
        made.load(after)
        assert made.module.d.tolist() == [1, 1]
        made.load(before)
        assert made.module.d.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "position", "said"),
    [(PARAMETERS, 5, "changes b, .* its element 1 becomes 2.0 and 3.0"), ("c", 1, "changes c, .* element 1")],
)
def test_a_conflict_is_named_by_its_parameter(name: str, position: int, said: str) -> None:
    flat = FlatModule(Held())
    one, other = (
        Changes(parts={name: ChangedElements(positions=np.array([position]), values=floats(value))})
        for value in (2, 3)
    )
    with pytest.raises(ModelError, match=said):
        flat.apply(unite(one, other))
    assert not flat.parameters.any()


def test_a_piece_that_raises_leaves_everything_as_it_was() -> None:
    flat = FlatModule(Held())
    flat.standing.at(flat.parameters.numpy())
    module = flat.module
    a = module.a

    def fail() -> None:
        with flat.standing.piece():
            module.b.data = torch.ones(3)
            module.c.data.add_(1)
            module.d = torch.ones(2)
            module.a = nn.Parameter(torch.ones(2, 2))
            module.made = nn.Linear(1, 1)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert module.a is a
    assert [name for name, _ in module.named_modules()] == [""]
    assert not any(tensor.any() for tensor in module.state_dict().values())
    flat.parameters.fill_(7)
    assert module.b.tolist() == [7, 7, 7]


class Graph(nn.Module):
    """Has a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.register_buffer("edges", torch.eye(3).to_sparse())


def test_a_sparse_buffer_may_be_there_but_not_change() -> None:
    flat = FlatModule(Graph())
    flat.standing.at(flat.parameters.numpy())
    with flat.standing.piece() as made:
        flat.module.edges @ flat.module.w
    assert made.changes is None
    with pytest.raises(ModelError, match="forward changes edges, which is sparse"), flat.standing.piece():
        flat.module.edges = flat.module.edges * 2
    assert flat.module.edges.to_dense().equal(torch.eye(3))
