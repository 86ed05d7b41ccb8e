"""Which run a folder is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparisons import comparison_file

import sparksgd
from sparksgd.config import Config
from sparksgd.runs.comparing.grid import Settings
from sparksgd.runs.comparing.kept_runs import KeptRuns
from sparksgd.runs.comparing.reading import read_question
from sparksgd.storage import location


@pytest.fixture
def config(tmp_path: Path) -> Config:
    question = read_question(comparison_file(tmp_path))
    return question.config(question.competitors[0], "fast", Settings(rate=0.1, momentum=0.9), 1)


def name_of(config: Config) -> str:
    """Return the name that a new comparison gives to the folder of a run."""
    return KeptRuns(location("nowhere")).name_of(config)


@pytest.mark.parametrize("package", [sparksgd, torch], ids=["sparksgd", "torch"])
def test_another_version_makes_runs_anew(
    config: Config, monkeypatch: pytest.MonkeyPatch, package: object
) -> None:
    before = name_of(config)
    assert name_of(config) == before
    monkeypatch.setattr(package, "__version__", "99.0")
    assert name_of(config) != before


def test_other_rows_make_runs_anew(config: Config, tmp_path: Path) -> None:
    before = name_of(config)
    rows = tmp_path / "rows.parquet"
    rows.rename(tmp_path / "moved.parquet")
    rows.write_bytes((tmp_path / "moved.parquet").read_bytes() + b"more")
    assert name_of(config) != before
