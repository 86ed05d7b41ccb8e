"""Modules drawn at random, with losses, optimisers and schedules: as plain torch at each step, or refused.

A number of examples in SPARKSGD_EXAMPLES replaces the 300 of `make test`: half of them on one shard, half on
four.  They are the same in every run.
"""

from __future__ import annotations

import os

import pytest
from grammar import Sentence, sentences
from hypothesis import HealthCheck, given, seed, settings
from plain_torch import Data, Verdict, compared

ROUNDING = 1e-6
"""Some optimisers divide a gradient's rounding by as little as 1e-10."""

PARTS = 5
"""Tests that share the examples: two processes have as much to do then."""

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own words on deprecated and slow layers


def check_examples(data: Data, count: int, num_shards: int, part: int = 0) -> None:
    @seed(num_shards + 10 * part)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(sentences())
    def check(sentence: Sentence) -> None:
        verdict = compared(sentence.make, sentence.recipe(), data, num_shards, ROUNDING)
        require_right_or_refused(sentence, num_shards, verdict)

    check()


def require_right_or_refused(sentence: Sentence, num_shards: int, verdict: Verdict) -> None:
    """Refuse whatever differs, an error that came late, and a refusal of what is ordinary."""
    if verdict.is_right or verdict.by_torch:
        return
    assert verdict.difference is None, f"{sentence} on {num_shards} shards: {verdict}"
    assert not sentence.is_ordinary, f"{sentence} is ordinary, but on {num_shards} shards {verdict}"
    assert verdict.is_refused or sentence.shows_late, f"{sentence} on {num_shards} shards: {verdict}"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("num_shards", [1, 4])
def test_modules_of_the_grammar_are_right_or_refused(data: Data, num_shards: int, part: int) -> None:
    count = int(os.environ.get("SPARKSGD_EXAMPLES", "300")) // 2 // PARTS
    check_examples(data, count, num_shards, part)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_shards", [1, 4])
def test_many_modules_of_the_grammar_are_right_or_refused(data: Data, num_shards: int) -> None:
    check_examples(data, 1500, num_shards)
