"""Shard files are not encrypted: a session that must keep nothing readable on disks is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from pyspark.sql import SparkSession

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.spark.session import refuse_plain_shards
from sparksgd.spark.train import train


@pytest.mark.parametrize("value", ["true", "TRUE"])
def test_a_session_that_encrypts_its_disks_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"spark\.io\.encryption\.enabled is true.*not encrypted"):
        refuse_plain_shards({"spark.io.encryption.enabled": value}.get)


class Encrypting:
    """A cluster whose session encrypts its disks; it has no slots yet."""

    def __init__(self, *_: object) -> None:
        self.context = SimpleNamespace(getConf=lambda: {"spark.io.encryption.enabled": "true"})

    def settle(self) -> None:
        raise AssertionError("somebody waits for slots first")


def test_a_run_asks_before_it_waits_for_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparksgd.spark.train.Cluster", Encrypting)
    with pytest.raises(ConfigError, match=r"spark\.io\.encryption\.enabled is true"):
        train(cast(SparkSession, None), Config.from_dict({}), "nowhere")


def test_others_are_not_refused() -> None:
    refuse_plain_shards({}.get)
    refuse_plain_shards({"spark.io.encryption.enabled": "false"}.get)
