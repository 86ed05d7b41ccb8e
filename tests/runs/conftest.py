"""What tests of runs share: the log, time that is virtual, jobs on the same rows, a saved model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from resumed_jobs import SHORT, Jobs, made_jobs
from saved_models import trained
from virtual_leases import Time

from sparksgd.imports import trust


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


@pytest.fixture
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_of_process", set())
    monkeypatch.delenv("SPARKSGD_TRUST", raising=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """Return a copy of a model."""
    return Path(shutil.copytree(original, tmp_path / "model"))
