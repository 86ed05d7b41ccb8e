"""What tests of runs share: the log, time that is virtual, and jobs on the same rows."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from resumed_jobs import SHORT, Jobs, made_jobs
from virtual_leases import Time


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sparksgd")
    return caplog


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture
def whole(jobs: Jobs) -> dict[str, Any]:
    """Return the summary of a short run that nobody interrupts; made once in a process."""
    if not (jobs.folder / "reference" / "summary.json").exists():
        jobs.run("reference", SHORT)
    found: dict[str, Any] = json.loads((jobs.folder / "reference" / "summary.json").read_text())
    return found
