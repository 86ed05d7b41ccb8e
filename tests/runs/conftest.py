"""What tests of runs share: the log, and time that is virtual."""

from __future__ import annotations

import logging

import pytest
from virtual_leases import Time


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sparksgd")
    return caplog
