"""Shard files are not encrypted: a session that must keep nothing readable on disks is refused."""

from __future__ import annotations

import pytest

from sparksgd.errors import ConfigError
from sparksgd.spark.session import refuse_plain_shards


@pytest.mark.parametrize("value", ["true", "TRUE"])
def test_a_session_that_encrypts_its_disks_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"spark\.io\.encryption\.enabled is true.*not encrypted"):
        refuse_plain_shards({"spark.io.encryption.enabled": value}.get)


def test_others_are_not_refused() -> None:
    refuse_plain_shards({}.get)
    refuse_plain_shards({"spark.io.encryption.enabled": "false"}.get)
