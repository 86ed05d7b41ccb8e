"""Modules drawn at random, with losses, optimisers and schedules: as plain torch at each step, or refused.

A number of examples in SPARKSGD_EXAMPLES replaces those of `make test`.
"""

from __future__ import annotations

import os

import pytest
from grammar import Sentence, sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_torch import Data, Verdict, compared

ROUNDING = 1e-6
"""Some optimisers divide a gradient's rounding by as little as 1e-10."""

MIXED = 2e-3
"""Rows that mix by less than a thousandth of a gradient are not refused."""

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own words on deprecated and slow layers


def check_examples(data: Data, count: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(sentences(), st.sampled_from((4, 1)))
    def check(sentence: Sentence, num_shards: int) -> None:
        rounding = MIXED if sentence.mixes else ROUNDING
        verdict = compared(sentence.make, sentence.recipe(), data, num_shards, rounding)
        require_right_or_refused(sentence, num_shards, verdict)

    check()


def require_right_or_refused(sentence: Sentence, num_shards: int, verdict: Verdict) -> None:
    """Refuse whatever differs, an error that came late, and a refusal of what is ordinary."""
    if verdict.is_right or verdict.by_torch:
        return
    assert verdict.difference is None, f"{sentence} on {num_shards} shards: {verdict}"
    assert not sentence.is_ordinary, f"{sentence} is ordinary, but on {num_shards} shards {verdict}"
    assert verdict.is_refused or sentence.shows_late, f"{sentence} on {num_shards} shards: {verdict}"


def test_three_hundred_modules_of_the_grammar_are_right_or_refused(data: Data) -> None:
    check_examples(data, int(os.environ.get("SPARKSGD_EXAMPLES", "300")))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_thousand_modules_of_the_grammar_are_right_or_refused(data: Data) -> None:
    check_examples(data, 3000)
