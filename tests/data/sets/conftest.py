"""The tiny data set as one to ask for, its files in a folder, and where to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_dataset import CONTENTS, tiny

from sparksgd.data.sets import DATASETS


@pytest.fixture
def tiny_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", tiny())
    monkeypatch.setattr("sparksgd.data.sets.parquet.ROWS_PER_GROUP", 5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "out"
