"""Random numbers follow from their place, and are the same on every machine for ever."""

from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.arithmetic.seeds import permutation, seed32

calm = settings(deadline=None, derandomize=True, database=None)  # no clock, no chance


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 of Salmon et al. 2011, figure 2, counting from 1 as numpy does."""
    mask, numbers = (1 << 64) - 1, []
    for block in range(1, count // 4 + 2):
        (k0, k1), c = key, [block, 0, 0, 0]
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 1 << 64)
            high1, low1 = divmod(0xCA5A826395121157 * c[2], 1 << 64)
            c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
            k0, k1 = k0 + 0x9E3779B97F4A7C15 & mask, k1 + 0xBB67AE8584CAA73B & mask
        numbers += c
    return numbers[:count]


def test_a_seed_is_the_blake2_of_its_seed_purpose_and_place() -> None:
    digest = blake2b(b"7/dropout/3/500", digest_size=4).digest()
    assert seed32(7, "dropout", 3, 500) == sum(byte << 8 * i for i, byte in enumerate(digest))


@pytest.mark.parametrize(
    "other",
    [(8, "dropout", 3, 500), (7, "shuffle", 3, 500), (7, "dropout", 4, 500), (7, "dropout", 35, 0)],
)
def test_another_seed_purpose_or_place_gives_another_seed(other: tuple[int, str, int, int]) -> None:
    assert seed32(*other) != seed32(7, "dropout", 3, 500)


def test_a_permutation_sorts_the_bits_of_philox_keyed_by_its_place() -> None:
    digest = blake2b(b"1/shuffle/0/0", digest_size=16).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    bits = philox(key, 10)
    expected = sorted(range(10), key=bits.__getitem__)
    assert permutation(10, 1, "shuffle", 0, 0).tolist() == expected
    assert expected == [9, 0, 7, 4, 2, 8, 5, 1, 6, 3]  # as every run before this one drew it


@calm
@given(st.integers(0, 300), st.integers(0, 5))
def test_a_permutation_holds_every_number_once(rows: int, place: int) -> None:
    assert sorted(permutation(rows, 0, "shuffle", place)) == list(range(rows))
