"""A replay is of the same experiment on the same rows, and says whether it ended where the run did."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError, ReplayDiffers
from sparksgd.training.replay import Replay, check_end

REPLAY = Replay(
    config=Config().to_dict(),
    data_digest="abc",
    model_name="lenet",
    took_part=[frozenset({0, 2}), frozenset({0, 1})],
    deals=[0, 1],
    parameters_sha256="1234",
)


def ended(version: int, parameters_sha256: str) -> Any:
    """Return what a replay is at its end."""
    return SimpleNamespace(version=version, flat=SimpleNamespace(parameters_sha256=lambda: parameters_sha256))


def test_the_same_experiment_on_the_same_rows_is_welcome_wherever_the_rows_are() -> None:
    REPLAY.check(Config(), "abc")
    REPLAY.check(Config.load(None, ["data.train=/moved", "train.steps=1", "engine.num_workers=3"]), "abc")


def test_another_experiment_or_other_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.seed is 5, but was 0 in the run to be replayed"):
        REPLAY.check(Config.load(None, ["train.seed=5"]), "abc")
    with pytest.raises(DataError, match="their digest is abd, but was abc"):
        REPLAY.check(Config(), "abd")


def test_a_fingerprint_knows_the_shards_of_each_step_and_the_deals() -> None:
    others = [
        replace(REPLAY, took_part=[frozenset({0, 1}), frozenset({0, 2})]),
        replace(REPLAY, took_part=REPLAY.took_part[:1], deals=[0]),
        replace(REPLAY, deals=[0, 0]),
    ]
    assert len({REPLAY.fingerprint(), *(other.fingerprint() for other in others)}) == 4
    assert replace(REPLAY, parameters_sha256=None).fingerprint() == REPLAY.fingerprint()


def test_an_end_at_other_parameters_is_an_error() -> None:
    with pytest.raises(ReplayDiffers, match="ended at parameters 1235, but the run at 1234"):
        check_end(ended(2, "1235"), REPLAY)


@pytest.mark.parametrize(
    ("replay", "version", "says"),
    [
        (REPLAY, 2, "replayed: the same 2 steps, the same parameters"),
        (REPLAY, 1, "replayed 1 steps; there is no digest of the run after that many"),
        (replace(REPLAY, parameters_sha256=None), 2, "there is no digest of the run after that many"),
    ],
)
def test_what_can_be_compared_is_said(
    replay: Replay, version: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sparksgd"):
        check_end(ended(version, "1234"), replay)
    assert says in caplog.text
