"""The last checkpoints are kept, and the best one of those that were evaluated on the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparksgd.config import Config
from sparksgd.runs.checkpoints import CheckpointFolder, manifests
from sparksgd.storage import location
from sparksgd.training.checkpoint import Checkpoint, Part, RunIdentity

IDENTITY = RunIdentity(experiment={}, data_digest="d", total_turns=99, turns_per_epoch=9, test_digest="one")


def folder(path: Path, identity: RunIdentity) -> CheckpointFolder:
    config = Config.load(None, ["data.train=/rows", "checkpoint.keep=1"])
    about: dict[str, Any] = {"run_id": "r", "config": config.to_dict(), "fingerprints": {}}
    found = CheckpointFolder(location(path), about, manifests(location(path)))
    found.begin(identity)
    return found


def written(to: CheckpointFolder, step: int, loss: float | None) -> list[int]:
    """Write a checkpoint; return the steps of those that are kept."""
    parts = {"run": Part(version=1, values={"a": step})}
    to.write(Checkpoint(step=step, turns=step, parts=parts, test_loss=loss))
    return [one.step for one in manifests(to.folder)]


def test_the_smallest_loss_is_kept_beside_the_last(tmp_path: Path) -> None:
    run = folder(tmp_path, IDENTITY)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None}
    assert [written(run, step, loss) for step, loss in losses.items()] == [[1], [2], [3, 2], [4, 2]]


def test_a_loss_on_other_test_rows_gives_way(tmp_path: Path) -> None:
    written(folder(tmp_path, IDENTITY), 1, 0.1)
    run = folder(tmp_path, replace(IDENTITY, test_digest="other"))
    assert written(run, 2, None) == [2, 1], "nothing is known on the new rows yet"
    assert written(run, 3, 5.0) == [3]
    assert written(run, 4, 7.0) == [4, 3]


def test_a_run_without_test_rows_keeps_the_best_of_before(tmp_path: Path) -> None:
    written(folder(tmp_path, IDENTITY), 1, 0.1)
    run = folder(tmp_path, replace(IDENTITY, test_digest=None))
    assert [written(run, step, None) for step in (2, 3)] == [[2, 1], [3, 1]]


def test_a_loss_of_a_version_that_noted_no_test_rows_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = CheckpointFolder._write_parts

    def as_before(*given: Any) -> Any:
        values, entries = before(*given)
        del values["test_digest"]
        return values, entries

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "_write_parts", as_before)
        written(folder(tmp_path, IDENTITY), 1, 0.1)
    run = folder(tmp_path, IDENTITY)
    assert [written(run, step, 0.5) for step in (2, 3)] == [[2, 1], [3, 1]]
